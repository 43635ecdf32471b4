"""What is written to disk, and how: whole or not at all, by one program at a time, in a folder of this user's own."""

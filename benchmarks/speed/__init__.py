"""Where the time goes, and other programs on the same work."""

"""Data sets: layouts read, checked, described, and made into batches. Start at dataset.py."""

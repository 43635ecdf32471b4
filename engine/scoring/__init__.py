"""Score a run against references: score.py is the entry point, and each family of metrics has its own module."""

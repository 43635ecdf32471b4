"""Scores of a run against references. Start at score.py; there is one file for each family of metrics."""

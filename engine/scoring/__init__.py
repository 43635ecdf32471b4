"""Scores of a run against references. Start at report.py; one file per family of metrics."""

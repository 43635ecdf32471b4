"""From a directory to run.csv. Start at pipeline.py."""

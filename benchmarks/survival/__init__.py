"""Runs that are killed, starved and fed with broken files."""

"""Checkpoints: found by name, loaded safely."""

"""Measurements: they print machine, versions, spread and a checksum of the captions, and assert nothing about time."""

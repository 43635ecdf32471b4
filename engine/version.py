"""The release; the wheel and every signature carry it."""

__version__ = "0.1.0"

COMPARED_WITH = ("4.57.6", "5.24.0")
"""Releases of transformers whose `generate` this release says the same as; the tests run on both."""

"""The release; the wheel and every signature carry it."""

__version__ = "0.1.0"

"""The command line: one module per group of commands; app.py combines them, shared.py reports their errors."""

from engine.cli.app import main

__all__ = ["main"]

"""The command line: a module a group of commands; app.py holds them together, group.py their exit codes."""

from engine.cli.app import main

__all__ = ["main"]

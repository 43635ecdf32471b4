"""The command line: a module a group of commands; app.py holds the group, exit codes and `caption`."""

from engine.cli.app import main

__all__ = ["main"]

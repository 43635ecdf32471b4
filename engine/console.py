"""What every command shares: how a path option is read, and how a line reaches the user."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


def say(line: str) -> None:
    """Print one line to stderr, whatever the file names in it hold."""
    click.echo(" ".join(line.splitlines()), err=True)

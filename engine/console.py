"""What every command shares: how a path option is read, and how a line reaches the user."""

from __future__ import annotations

from pathlib import Path

import click

from engine.remote import Location, location

PATH = click.Path(path_type=Path)


class LocationType(click.ParamType[Location]):
    """A path, or the URI of a folder."""

    name = "path or URI"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Location:  # noqa: ARG002
        return location(value) if isinstance(value, str) else value  # type: ignore[return-value]


LOCATION = LocationType()


def say(line: str) -> None:
    """Print one line to stderr, whatever the file names in it hold."""
    click.echo(" ".join(line.splitlines()), err=True)

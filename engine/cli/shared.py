"""What commands share: how a path option is read, options of all that load or decode, how a line reaches the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from engine.errors import UsageError
from engine.inputs.remote import Location, location

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


def bundle_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options every command that loads a bundle takes."""
    for option in (
        click.option("--cuda-graphs", is_flag=True, help="Of --backend trt: capture steps of one shape, replay them."),
        click.option("--plans", type=PATH, help="Of --backend trt: folder that `engine plan` wrote."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads; all cores when absent."),
        click.option("--backend", default="auto", show_default=True, help="auto, cpu, cuda, tensorrt or trt."),
        click.option("--bundle", type=LOCATION, help="Exported bundle, or its URI; the embedded demo when absent."),
    ):
        command = option(command)
    return command


def _parse_rows(context: click.Context, parameter: click.Parameter, rows: str) -> int | None:  # noqa: ARG001
    if rows == "auto":
        return None
    if not rows.isdecimal() or int(rows) < 1:
        raise UsageError(f"--rows takes a whole number of at least 1, or auto, not {rows!r}")
    return int(rows)


def _parse_early_stopping(context: click.Context, parameter: click.Parameter, value: str | None) -> bool | str | None:  # noqa: ARG001
    return {"false": False, "true": True}.get(value or "", value)


def decoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options every command that decodes takes; None means not given, see Bundle.options."""
    for option in (
        click.option(
            "--rows",
            default="auto",
            show_default=True,
            callback=_parse_rows,
            help="Beams decoded side by side, or auto.",
        ),
        click.option("--prompt", help="Text every caption starts with."),
        click.option(
            "--early-stopping",
            type=click.Choice(["false", "true", "never"]),
            callback=_parse_early_stopping,
            help="When beam search may stop.",
        ),
        click.option("--length-penalty", type=float, help="Above 0 favours long captions, below 0 short ones."),
        click.option("--min-new-tokens", type=click.IntRange(0), help="Fewest tokens before a caption may end."),
        click.option("--max-new-tokens", type=click.IntRange(1), help="Most tokens a caption may add to the prompt."),
        click.option(
            "--no-repeat-ngram",
            "no_repeat_ngram_size",
            type=click.IntRange(0),
            help="Never repeat an n-gram of this size; 0: off.",
        ),
        click.option("--beams", "num_beams", type=click.IntRange(1), help="Beams; 1 is greedy."),
    ):
        command = option(command)
    return command

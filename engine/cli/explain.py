"""`engine explain`: a picture of where each word of one image's caption looks."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.cli.caption import DEMO_NOTE
from engine.cli.shared import PATH, log, takes, takes_bundle
from engine.errors import OutputError, UsageError
from engine.options import CLIP, DEPTH_HELP, DecodeOptions

if TYPE_CHECKING:  # for a quick --help
    from engine.bundle.open import BundleRef
    from engine.checkpoints.cache import ModelRef

OVERVIEW = "overview.png"
OWN = re.compile(r"overview\.png|word_\d{2,}(_[a-z0-9-]+)?\.png|attention\.npz|\.[a-z0-9_.-]+\.tmp")
"""Names of the files in the folder."""
LONGEST = 40
"""Most characters of a word in a file name."""


@click.command()
@click.argument("image", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder to write: a new or empty one, or an earlier explanation.")
@click.option(
    "--attention-layers",
    metavar="N,N,...",
    help="Decoder layers to average over, counted from 0; by default all.",
)
@click.option(
    "--dicom-frame", type=click.IntRange(0), default=0, show_default=True, help="Frame of DICOM files, counted from 0."
)
@click.option("--high-bit-depth", default=CLIP, show_default=True, help=DEPTH_HELP)
@takes(decoding=DecodeOptions)
@takes_bundle()
def explain(
    image: Path,
    out: Path,
    attention_layers: str | None,
    dicom_frame: int,
    high_bit_depth: str,
    decoding: DecodeOptions,
    bundle: BundleRef | ModelRef,
) -> None:
    """Caption one image and draw where each word looks: a PNG per word, overview.png for papers and attention.npz.

    The caption is printed. docs/attention.md says what such a map shows and what it does not.
    """
    from engine.attention import overview, word_pictures, write_attention
    from engine.captioner import Captioner
    from engine.files.atomic import replace_file
    from engine.inputs.images import ImageFile
    from engine.inputs.pixels import decode_image
    from engine.options import window_of
    from engine.run.job import parse_layers
    from engine.runtime import Runtime

    window_of(high_bit_depth)  # raises UsageError for an invalid value
    layers = parse_layers(attention_layers)
    if not image.is_file():
        raise UsageError(f"{image} is not a file: give one image")
    if out.exists() and (not out.is_dir() or any(OWN.fullmatch(path.name) is None for path in out.iterdir())):
        raise UsageError(f"--out {out} is a file or contains other files: name a new folder")
    if image.resolve().parent == out.resolve():  # an earlier overview.png as the image would be replaced
        raise UsageError(f"{image} is inside --out {out}: name another folder")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} does not exist, create it first")
    source = ImageFile(image.stem, image, dicom_frame, None, high_bit_depth)
    if not bundle.names:
        log(DEMO_NOTE)
    with Captioner.open(bundle, Runtime("cpu"), log) as captioner:
        wanted = True if layers is None else layers
        (caption,) = captioner.caption([source], decoding, attention=wanted)
    attention = caption.attention
    assert attention is not None, "it was asked for"
    decoded = decode_image(image, frame=dicom_frame, depth=high_bit_depth)
    pictures = {OVERVIEW: overview(decoded, attention)}
    for number, (word, picture) in enumerate(word_pictures(decoded, attention), 1):
        pictures[_file_name(number, word)] = picture
    try:
        out.mkdir(exist_ok=True)
        for path in out.iterdir():  # those of an earlier caption, which may have had more words
            path.unlink()
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}: choose another --out") from error
    for name, picture in pictures.items():
        content = io.BytesIO()
        picture.save(content, "PNG")
        replace_file(out / name, content.getvalue())
    write_attention(out / "attention.npz", attention)
    click.echo(caption.text)
    log(f"{len(pictures) - 1} words and {OVERVIEW} -> {out}")


def _file_name(number: int, word: str) -> str:
    """Return `word_03_chest.png`: words are untrusted, so only letters, digits and hyphens are kept."""
    plain = re.sub("[^a-z0-9]+", "-", word.lower()).strip("-")[:LONGEST]
    return f"word_{number:02}_{plain}.png" if plain else f"word_{number:02}.png"

"""Write a page of pairs of images, for `engine duplicates --page`: one HTML file without scripts, images included."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from engine.errors import ImageError
from engine.files.atomic import write_atomically
from engine.host import available_cores
from engine.inputs.images import ImageFile
from engine.inputs.pixels import decode_image, image_errors
from engine.inputs.twins import FILE, KINDS, NEAR, Twin, groups
from engine.report.build import ASSETS, hashes
from engine.version import __version__

SHOWN = 300
"""How many pairs of a kind the page shows; all are in the CSV file. A pair takes about 12 KB of the page."""
SIZE_PX, QUALITY = 192, 80
TITLES = {
    "file": ("The same file", "Both files have the same bytes."),
    "copy": ("Copies", "The same image: saved again, resized, or with another brightness or contrast."),
    "mirrored": ("Mirrored", "The same image, mirrored left to right."),
    "flipped": ("Flipped", "The same image, flipped top to bottom."),
    "cropped": ("Cropped", "One image is a part of the other one."),
    "near": ("Near", "Similar, but not twins: often neighbouring slices of one volume, or frames of one series."),
}
EMPTY = "No pair was found."


@dataclass(frozen=True)
class Side:
    """The images of one side of the pairs and the name of their folder."""

    name: str
    images: Sequence[ImageFile]


def write_pairs_page(path: Path, pairs: Sequence[Twin], first: Side, second: Side | None) -> None:
    """Write the page. Without `second`, both images of a pair are of `first`. Raises OutputError."""
    shown = {kind: [pair for pair in pairs if pair.kind == kind] for kind in KINDS}
    shown = {kind: sorted(of_kind, key=lambda pair: pair.distance) for kind, of_kind in shown.items() if of_kind}
    other = second or first
    needed = dict.fromkeys(
        image
        for of_kind in shown.values()
        for pair in of_kind[:SHOWN]
        for image in (first.images[pair.first], other.images[pair.second])
    )
    with ThreadPoolExecutor(available_cores()) as threads:
        pictures = dict(zip(needed, threads.map(_picture, needed), strict=True))
    numbers = groups(pairs, against=second is not None)
    style = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "pairs.css"))
    policy = f"default-src 'none'; img-src data:; style-src {hashes([style])}; base-uri 'none'; form-action 'none'"
    title = f"Twins in {first.name}" if second is None else f"Twins of {first.name} in {second.name}"
    count = sum(len(of_kind) for kind, of_kind in shown.items() if kind != NEAR)
    near = len(shown.get(NEAR, []))
    parts = [
        '<!doctype html>\n<html lang="en" data-ready>\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">',
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
        f'<header class="top"><div class="title"><h1>{html.escape(title)}</h1>',
        f"<p>{count} pairs of twins, {near} near pairs · engine {__version__}</p></div></header>\n<main>",
    ]
    if shown:
        links = " ".join(
            f'<a href="#{kind}">{TITLES[kind][0]} <span>{len(of_kind)}</span></a>' for kind, of_kind in shown.items()
        )
        parts.append(f'<nav class="kinds" aria-label="Kinds of pairs">{links}</nav>')
    else:
        parts.append(f'<p class="nothing">{EMPTY}</p>')
    for kind, of_kind in shown.items():
        name, text = TITLES[kind]
        more = "" if len(of_kind) <= SHOWN else f" The nearest {SHOWN} of {len(of_kind)} pairs are shown."
        parts.append(f'<section class="pairs" aria-labelledby="{kind}"><h2 id="{kind}">{name}</h2>')
        parts.append(f'<p class="hint">{text}{more}</p><ul>')
        for pair in of_kind[:SHOWN]:
            sides = (first.images[pair.first], other.images[pair.second])
            facts = [] if kind == NEAR else [f"group {numbers[0, pair.first]}"]
            facts += [] if kind == FILE else [f"distance {pair.distance:.5f}"]
            parts.append(f'<li class="card"><div class="both">{"".join(_figure(i, pictures[i]) for i in sides)}</div>')
            parts.append(f"<p>{' · '.join(facts)}</p></li>")
        parts.append("</ul></section>")
    write_atomically(path, "\n".join([*parts, "</main>\n</body>\n</html>\n"]))


def _figure(image: ImageFile, picture: str | None) -> str:
    name, file = html.escape(image.id), html.escape(str(image.source))
    shown = '<span class="no-picture">cannot be read</span>'
    if picture is not None:
        shown = f'<img alt="{name}" src="data:image/jpeg;base64,{picture}">'
    return f'<figure>{shown}<figcaption class="id" title="{file}">{name}</figcaption></figure>'


def _picture(image: ImageFile) -> str | None:
    """Return a small JPEG in base64, or None for an image that cannot be read."""
    try:
        with image_errors(image.source):
            decoded = decode_image(image.source, frame=image.frame, depth=image.depth)
            decoded.thumbnail((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS, reducing_gap=2.0)
    except ImageError:
        return None
    stream = io.BytesIO()
    decoded.save(stream, "JPEG", quality=QUALITY)
    return base64.b64encode(stream.getvalue()).decode()

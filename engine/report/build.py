"""Build a report: check the output folder, render the page and write it atomically.

A report is only written to a folder that is new, empty or an earlier report.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.attention import heat, read_attention, seen_box, word_maps
from engine.errors import ImageError, OutputError, UsageError, counted
from engine.files.atomic import write_atomically
from engine.files.lock import OutputLock
from engine.host import available_cores
from engine.inputs.ids import join_some
from engine.inputs.images import ImageFile
from engine.inputs.pixels import decode_image, image_errors
from engine.report.gather import Content, ReportRequest, ScoreColumn, gather
from engine.version import __version__

PAGE, MARK, THUMBNAILS, ATTENTION = "index.html", "report.json", "thumbnails", "attention"
"""Names in the folder. MARK identifies a report. It is written first, so that an interrupted report can be repeated."""
OWN_FILES = {MARK, f".{MARK}.tmp", f"{PAGE}.lock"}
"""Files that a concurrent report, or one that was killed before it wrote MARK, may have left in the folder."""
KIND = "engine report"


def open_folder(out: Path) -> None:
    """Create the folder of a report, or reuse an earlier one. Raises UsageError if `out` holds anything else."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder for the report")
    if not out.exists() and not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} does not exist, create it first")
    foreign = set(os.listdir(out)) - OWN_FILES if out.is_dir() else set()
    if foreign and not is_report(out):
        raise UsageError(f"--out {out} contains other files: name a new folder, or one of an earlier report")
    try:
        out.mkdir(exist_ok=True)
        write_atomically(out / MARK, json.dumps({"kind": KIND, "engine": __version__}) + "\n")
        (out / THUMBNAILS).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be created: {error.strerror}: choose another --out") from error


def is_report(folder: Path) -> bool:
    """Return whether a folder was created by this command."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(mark, dict) and mark.get("kind") == KIND


ASSETS = Path(__file__).with_name("assets")
STYLES = ("vendor/uplot.min.css", "page.css", "list.css", "detail.css")
SCRIPTS = (
    *("vendor/uplot.min.js", "data.js", "words.js", "view.js", "rows.js", "charts.js", "attention.js"),
    *("detail.js", "summary.js", "page.js"),
)
FORMAT = 1
"""Version of the JSON block. Page and data are written together, so no page reads the data of another version."""
DIGITS = 6
"""Significant digits of the scores in the page."""


def page_signature(content: Content) -> str:
    """Return `name:value` pairs joined by `|`: engine version, page format, input file hashes and number of images."""
    parts = {"engine": __version__, "report": str(FORMAT)}
    parts |= {source.role.replace(" ", "_"): (source.sha256 or "folder")[:12] for source in content.sources}
    parts |= {"images": str(len(content.ids))}
    return "|".join(f"{name}:{value}" for name, value in parts.items())


def render(
    content: Content,
    thumbnails: Thumbnails,
    maps: Sequence[WordMaps | None] | None = None,
    *,
    notes: list[str],
    signatures: Iterable[str] = (),
) -> str:
    """Return the HTML page.

    Its Content-Security-Policy allows only the scripts and styles of assets/, by their hashes, and local images. Text
    from captions or tables cannot run as a script.
    """
    styles, scripts = ([(ASSETS / name).read_text(encoding="utf-8") for name in names] for names in (STYLES, SCRIPTS))
    policy = (
        f"default-src 'none'; img-src 'self' file:; style-src {hashes(styles)}; script-src {hashes(scripts)}; "
        "base-uri 'none'; form-action 'none'"
    )
    data = as_json(content, thumbnails, maps, notes=notes, signatures=signatures)
    parts = {
        "<!--policy-->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "<!--styles-->": "\n".join(f"<style>{style}</style>" for style in styles),
        "<!--data-->": f'<script type="application/json" id="data">{data}</script>',
        "<!--scripts-->": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    rest, page = (ASSETS / "page.html").read_text(encoding="utf-8"), []
    for mark, part in parts.items():  # in page order: inserted data is never searched for further marks
        before, _, rest = rest.partition(mark)
        page += [before, part]
    return "".join([*page, rest])


def as_json(
    content: Content,
    thumbnails: Thumbnails,
    maps: Sequence[WordMaps | None] | None,
    *,
    notes: list[str],
    signatures: Iterable[str],
) -> str:
    """Return the data of the page as JSON, with `<`, `>` and `&` escaped so that no text can end the script."""
    data: dict[str, Any] = {
        "format": FORMAT,
        "signature": page_signature(content),
        "signatures": list(signatures),
        "sources": [asdict(source) for source in content.sources],
        "notes": notes,
        "thumbnails": THUMBNAILS,
        "labels": content.labels,
        "ids": content.ids,
        "files": [None if image is None else image.path.name for image in content.images],
        "pictures": thumbnails.names,
        "unreadable": thumbnails.unreadable,
        "captions": content.captions,
        "references": content.references,
        "candidates": content.candidates
        and [[[item.text, _rounded(item.share)] for item in items] for items in content.candidates],
        "columns": [asdict(column) for column in content.columns],
        "scores": [_score(column, len(content.ids)) for column in content.scores],
        "curves": [
            {"name": column.name, "how": column.how}
            | {name: [_rounded(number) for number in values.tolist()] for name, values in vars(curve).items()}
            for column, curve in content.curves
        ],
        "comparisons": [asdict(comparison) for comparison in content.comparisons],
    }
    if maps is not None:
        data["attention"] = {"folder": ATTENTION, "images": [one and asdict(one) for one in maps]}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _score(column: ScoreColumn, images: int) -> dict[str, Any]:
    values: list[float | None] = [None] * images
    for index, value in zip(column.indices.tolist(), column.measured.per_image.tolist(), strict=True):
        values[index] = _rounded(value)
    total = {"value": column.measured.value, "low": column.low, "high": column.high}
    return {"name": column.name, "how": column.how, "run": column.run, "values": values} | {
        name: _rounded(number) for name, number in total.items()
    }


def _rounded(number: float) -> float | None:
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def hashes(texts: Iterable[str]) -> str:
    """Return the sources of a Content-Security-Policy that allow scripts or styles of exactly these texts."""
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


Progress = Callable[[int], AbstractContextManager[Callable[[], None]]]
"""Called with the number of images; yields a function to call after each image."""


@dataclass(frozen=True)
class ReportSummary:
    """What was written, for the last lines of the command."""

    page: Path
    images: int
    thumbnails_made: int
    signature: str


def build_report(request: ReportRequest, *, log: Callable[[str], None], progress: Progress) -> ReportSummary:
    """Write a report; `log` gets one line for each input that is missing or cannot be read.

    The page replaces an earlier one atomically, and only then are old thumbnails removed. Raises EngineError if an
    input cannot be read, if inputs do not match, or if the folder cannot be written.
    """
    if request.against_scores is not None and request.against is None:
        raise UsageError("--against-scores needs --against, the run that they belong to")
    content = gather(request)
    open_folder(request.out)
    page, folder = request.out / PAGE, request.out / THUMBNAILS
    with OutputLock(page):
        with progress(len(content.ids)) as advance:
            thumbnails = make_thumbnails(content.images, folder, size_px=request.thumbnail_px, advance=advance)
        maps, remarks = (None, []) if content.attention is None else write_maps(content, thumbnails, request.out)
        notes = content.notes + _unreadable(content, thumbnails) + remarks
        for line in notes:
            log(line)
        write_atomically(page, render(content, thumbnails, maps, notes=notes, signatures=request.signatures))
        remove_stale(folder, set(thumbnails.names))
        if (request.out / ATTENTION).is_dir():
            remove_stale(request.out / ATTENTION, {one.file for one in maps or () if one is not None})
    return ReportSummary(page, len(content.ids), thumbnails.made, page_signature(content))


def _unreadable(content: Content, thumbnails: Thumbnails) -> list[str]:
    if not thumbnails.unreadable:
        return []
    images = []
    for index, reason in thumbnails.unreadable.items():
        image = content.images[index]
        images.append(f"{image.path.name if image else content.ids[index]} ({reason})")
    return [f"{counted(len(images), 'image')} cannot be read, shown as a placeholder: {join_some(images)}"]


QUALITY = 82
THUMBNAIL_VERSION = 1
"""Part of the name. Increase it when thumbnails are created in another way, so that old ones are not reused."""
NAME = re.compile(r"\.?[0-9a-f]{24}\.(jpg|png)(\.[0-9]+)?(\.tmp)?")
"""Names of thumbnails and maps and of their temporary files. Nothing else in the folder is ever removed."""


@dataclass(frozen=True)
class Thumbnails:
    """Names of N thumbnails (None if an image has none), {index: reason} of unreadable images, and how many are new."""

    names: list[str | None]
    unreadable: dict[int, str]
    made: int


def make_thumbnails(
    images: Sequence[ImageFile | None], folder: Path, *, size_px: int, advance: Callable[[], None]
) -> Thumbnails:
    """Write a JPEG of at most `size_px` by `size_px` pixels to `folder` for every image that has none yet.

    Images that cannot be read are listed in the result. Raises OutputError if a file cannot be written, and EngineError
    for other errors of the system.
    """
    unreadable: dict[int, str] = {}
    made = 0

    def make(index: int) -> tuple[str | None, bool]:
        image = images[index]
        if image is None:
            return None, False
        try:
            name = thumbnail_name(image, size_px)
            target = folder / name
            if target.exists() and target.stat().st_size:  # a power cut may leave an empty file
                return name, False
            _write(target, image, size_px)
        except ImageError as error:
            unreadable[index] = error.reason or str(error)
            return None, False
        return name, True

    names: list[str | None] = []
    with ThreadPoolExecutor(available_cores()) as threads:
        try:
            for name, is_new in threads.map(make, range(len(images))):
                names.append(name)
                made += is_new
                advance()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return Thumbnails(names, dict(sorted(unreadable.items())), made)


def thumbnail_name(image: ImageFile, size_px: int) -> str:
    """Return the file name of an image's thumbnail, a hash: image names are untrusted and do not appear in it.

    Raises ImageError if the image does not exist.
    """
    try:
        status = image.path.stat()
    except OSError as error:
        raise ImageError(str(image.path), error.strerror or str(error)) from error
    parts = (
        os.fsencode(os.path.abspath(image.path)),  # noqa: PTH100 (two folders may have equal names, sizes and times)
        image.frame,
        image.depth,
        size_px,
        status.st_size,
        status.st_mtime_ns,
        QUALITY,
        THUMBNAIL_VERSION,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24] + ".jpg"


def remove_stale(folder: Path, kept: Collection[str | None]) -> None:
    """Remove all thumbnails or maps of a folder except `kept`, and temporary files of interrupted runs."""
    for entry in os.listdir(folder):
        if entry not in kept and NAME.fullmatch(entry):
            (folder / entry).unlink(missing_ok=True)


def _write(target: Path, image: ImageFile, size_px: int) -> None:
    """Write one thumbnail atomically."""
    with image_errors(image.path):
        decoded = decode_image(image.path, frame=image.frame, depth=image.depth)
        decoded.thumbnail((size_px, size_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    _save(decoded, target, "JPEG", quality=QUALITY)


def _save(picture: Image.Image, target: Path, kind: str, **settings: int) -> None:
    """Save a picture atomically. Raises OutputError."""
    # equal pictures may be written by several threads
    temporary = target.with_name(f".{target.name}.{threading.get_ident()}.tmp")
    try:
        picture.save(temporary, kind, **settings)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{target} cannot be written: {error.strerror}: free space for --out or choose another folder"
        ) from error


@dataclass(frozen=True)
class WordMaps:
    """The words of a caption and the file with their maps, a strip in which one map follows the other downwards.

    box     the part of the image that the maps cover: left, top, right, bottom, 0 to 1
    places  for each word the ninth of the image with its highest weight, 0 (top left) to 8 (bottom right)
    """

    file: str
    words: list[str]
    box: tuple[float, float, float, float]
    places: list[int]


def write_maps(content: Content, thumbnails: Thumbnails, out: Path) -> tuple[list[WordMaps | None], list[str]]:
    """Write the maps of all images that have a file of --attention and a thumbnail; also return notes on them.

    Raises DataError for a damaged file, and OutputError if a map cannot be written.
    """
    folder = out / ATTENTION
    folder.mkdir(exist_ok=True)
    others: list[int] = []

    def make(index: int) -> WordMaps | None:
        path, picture = paths[index], thumbnails.names[index]
        if path is None or picture is None:
            return None
        attention = read_attention(path)
        if not (found := word_maps(attention)):
            return None
        if not _is_of(attention.words, content.captions[0][index] or ""):
            others.append(index)
        with Image.open(out / THUMBNAILS / picture) as thumbnail:
            box = seen_box(attention, *thumbnail.size)
        strip = Image.fromarray(np.concatenate([heat(weights) for _, weights in found]))
        name = hashlib.sha256(repr(strip.size).encode() + strip.tobytes()).hexdigest()[:24] + ".png"
        if not (folder / name).exists():
            _save(strip, folder / name, "PNG")
        return WordMaps(name, [word for word, _ in found], box, [_ninth(weights) for _, weights in found])

    paths = content.attention or []
    with ThreadPoolExecutor(available_cores()) as threads:
        maps = list(threads.map(make, range(len(paths))))
    notes = [f"{len(others)} maps of --attention belong to other captions than the run's"] if others else []
    return maps, notes


def _is_of(words: Sequence[str], caption: str) -> bool:
    """Return whether a caption has these words, whatever its spaces, prefix, suffix, or prompt that was removed."""
    ours, theirs = "".join(words), "".join(caption.split())
    return ours in theirs or theirs in ours


def _ninth(weights: NDArray[np.float32]) -> int:
    row, column = np.unravel_index(int(weights.argmax()), weights.shape)
    return int(3 * row // weights.shape[0] * 3 + 3 * column // weights.shape[1])

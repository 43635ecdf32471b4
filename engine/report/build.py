"""The folder of a report: taken only when it is new, empty or a report already, and never half a page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import OutputError, UsageError
from engine.files.atomic import write_atomically
from engine.files.lock import OutputLock
from engine.inputs.ids import join_some
from engine.report.gather import Content, ReportRequest, ScoreColumn, gather
from engine.report.thumbnails import Thumbnails, make_thumbnails, remove_stale
from engine.version import __version__

PAGE, MARK, THUMBNAILS = "index.html", "report.json", "thumbnails"
"""Names in the folder. The mark is written first: a folder that was cut off before its page is a report, too."""
OWN_FILES = {MARK, f".{MARK}.tmp", f"{PAGE}.lock"}
"""What a report that begins at the same time, or one that was killed before its mark, may have put there."""
KIND = "engine report"


def open_folder(out: Path) -> None:
    """Make the folder of a report with its mark, or find one. Raises UsageError when `out` is anything else."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder for the report")
    if not out.exists() and not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} does not exist, create it first")
    others = set(os.listdir(out)) - OWN_FILES if out.is_dir() else set()
    if others and not is_report(out):
        raise UsageError(f"--out {out} is a folder with other things in it: name a new one, or one of a report")
    try:
        out.mkdir(exist_ok=True)
        write_atomically(out / MARK, json.dumps({"kind": KIND, "engine": __version__}) + "\n")
        (out / THUMBNAILS).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror}: choose another --out") from error


def is_report(folder: Path) -> bool:
    """Return whether a folder was made by this command."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(mark, dict) and mark.get("kind") == KIND


ASSETS = Path(__file__).with_name("assets")
STYLES = ("vendor/uplot.min.css", "page.css", "list.css", "detail.css")
SCRIPTS = (
    *("vendor/uplot.min.js", "data.js", "words.js", "view.js", "rows.js", "charts.js", "detail.js", "summary.js"),
    "page.js",
)
FORMAT = 1
"""Of the JSON block; page and data are written together, so nothing reads another one's."""
DIGITS = 6
"""Significant digits of a score in the page."""


def page_signature(content: Content) -> str:
    """Return `name:value` pairs joined by `|`: engine, page, and the digest of every file that is shown."""
    parts = {"engine": __version__, "report": str(FORMAT)}
    parts |= {source.role.replace(" ", "_"): (source.sha256 or "folder")[:12] for source in content.sources}
    parts |= {"images": str(len(content.ids))}
    return "|".join(f"{name}:{value}" for name, value in parts.items())


def render(content: Content, thumbnails: Thumbnails, *, notes: list[str], signatures: Iterable[str] = ()) -> str:
    """Return the page. Nothing in it is executed but the scripts of assets/, nothing is fetched but thumbnails."""
    styles, scripts = ([(ASSETS / name).read_text(encoding="utf-8") for name in names] for names in (STYLES, SCRIPTS))
    policy = (
        f"default-src 'none'; img-src 'self' file:; style-src {_hashes(styles)}; script-src {_hashes(scripts)}; "
        "base-uri 'none'; form-action 'none'"
    )
    data = as_json(content, thumbnails, notes=notes, signatures=signatures)
    parts = {
        "<!--policy-->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "<!--styles-->": "\n".join(f"<style>{style}</style>" for style in styles),
        "<!--data-->": f'<script type="application/json" id="data">{data}</script>',
        "<!--scripts-->": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    rest, page = (ASSETS / "page.html").read_text(encoding="utf-8"), []
    for mark, part in parts.items():  # in the order of the page, so that no part is searched for marks
        before, _, rest = rest.partition(mark)
        page += [before, part]
    return "".join([*page, rest])


def as_json(content: Content, thumbnails: Thumbnails, *, notes: list[str], signatures: Iterable[str]) -> str:
    """Return what the page shows as JSON without `<`, `>` and `&`: nothing in it can end its block."""
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
        and [[[one.text, _rounded(one.share)] for one in several] for several in content.candidates],
        "columns": [asdict(column) for column in content.columns],
        "scores": [_score(one, len(content.ids)) for one in content.scores],
        "comparisons": [asdict(one) for one in content.comparisons],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _score(one: ScoreColumn, images: int) -> dict[str, Any]:
    values: list[float | None] = [None] * images
    for place, value in zip(one.places.tolist(), one.measured.per_image.tolist(), strict=True):
        values[place] = _rounded(value)
    total = {"value": one.measured.value, "low": one.low, "high": one.high}
    return {"name": one.name, "how": one.how, "run": one.run, "values": values} | {
        name: _rounded(number) for name, number in total.items()
    }


def _rounded(number: float) -> float | None:
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def _hashes(texts: Iterable[str]) -> str:
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


Progress = Callable[[int], AbstractContextManager[Callable[[], None]]]
"""Called with the number of images, gives what to call after each."""


@dataclass(frozen=True)
class ReportSummary:
    """What was written, for the command's last lines."""

    page: Path
    images: int
    thumbnails_made: int
    signature: str


def build_report(request: ReportRequest, *, log: Callable[[str], None], progress: Progress) -> ReportSummary:
    """Write a report; `log` gets one line for each thing that is missing or cannot be read.

    The page replaces an earlier one when it is whole, and only then are the earlier one's thumbnails removed. Raises
    EngineError for inputs that cannot be read or do not belong together, and for a folder that cannot be written.
    """
    if request.against_scores is not None and request.against is None:
        raise UsageError("--against-scores needs --against, the run that they are of")
    content = gather(request)
    open_folder(request.out)
    page, folder = request.out / PAGE, request.out / THUMBNAILS
    with OutputLock(page):
        with progress(len(content.ids)) as advance:
            thumbnails = make_thumbnails(content.images, folder, size_px=request.thumbnail_px, advance=advance)
        notes = content.notes + _unreadable(content, thumbnails)
        for line in notes:
            log(line)
        write_atomically(page, render(content, thumbnails, notes=notes, signatures=request.signatures))
        remove_stale(folder, set(thumbnails.names))
    return ReportSummary(page, len(content.ids), thumbnails.made, page_signature(content))


def _unreadable(content: Content, thumbnails: Thumbnails) -> list[str]:
    if not thumbnails.unreadable:
        return []
    told = []
    for place, reason in thumbnails.unreadable.items():
        image = content.images[place]
        told.append(f"{image.path.name if image else content.ids[place]} ({reason})")
    return [f"{len(told)} images cannot be read and have a placeholder: {join_some(told)}"]

"""From content to one HTML file; knows nothing of how the content was read.

What strangers wrote (captions, ids, names of files) goes into a block of JSON that no browser takes for markup, and the
scripts, which are allowed by their hashes and by nothing else, show it as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.report.folder import THUMBNAILS
from engine.report.gather import Content
from engine.report.scores import ScoreColumn
from engine.report.thumbnails import Thumbnails
from engine.version import __version__

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

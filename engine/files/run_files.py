"""Write a run: run.csv (one caption an image), the n-best JSON lines and the timings; knows nothing of how they were
made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.captions import Caption
from engine.files.atomic import write_atomically

CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]+")
"""Control characters and everything some reader takes for a line break."""


CSV_HEADER = "ID,Caption\n"


@dataclass(frozen=True)
class Row:
    """What a run says of an image: its id, its file, the text, and why there is none.

    Without a text, not even an empty one, it has no line in a run.csv.
    """

    id: str
    file: str
    text: str | None
    error: str = ""


def one_line(text: str) -> str:
    """Return a text on one line, without white space around it."""
    return CONTROL.sub(" ", text).strip()


def format_json(row: Row) -> str:
    """Return one line of JSON: id, file, caption, and the error of an image that cannot be read; bytes of file names
    that are not UTF-8 as lone surrogates, escaped.
    """
    entry = {"id": row.id, "file": row.file}
    entry |= {} if row.text is None else {"caption": row.text}
    entry |= {"error": row.error} if row.error else {}
    return _json_line(entry)


def _json_line(entry: Mapping[str, Any]) -> str:
    """Return an object as one line of valid JSON: half characters (bytes of file names) are escaped, not written."""
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def format_row(image_id: str, caption: str) -> str:
    """Return one line of run.csv: the id bare where it may be, the caption always quoted, on one line."""
    text = one_line(caption).replace('"', '""')
    return f'{_format_id(image_id)},"{text}"\n'


def _format_id(image_id: str) -> str:
    if any(character in image_id for character in ',"\r\n'):
        return '"' + image_id.replace('"', '""') + '"'
    return image_id


def write_run(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write (id, caption) rows as run.csv: UTF-8, header `ID,Caption`, in the order given."""
    write_atomically(path, CSV_HEADER + "".join(format_row(image_id, caption) for image_id, caption in rows))


def write_json_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON, one a line, in the order given."""
    write_atomically(path, "".join(map(format_json, rows)))


def write_timings(path: Path, rows: Iterable[tuple[str, float | None]]) -> None:
    """Write (id, latency in seconds) rows as CSV: UTF-8, header `ID,latency_s`; an empty cell where it is unknown."""
    lines = (f"{_format_id(name)},{'' if seconds is None else f'{seconds:.6f}'}\n" for name, seconds in rows)
    write_atomically(path, "ID,latency_s\n" + "".join(lines))


def write_n_best(path: Path, captions: Iterable[Caption], *, drawn: bool = False) -> None:
    """Write one JSON object a line: id, whether its hypotheses were drawn and not searched for, and these with text,
    raw_text, ids, sum_log_prob and score.
    """
    lines = []
    for caption in captions:
        hypotheses = [
            {
                "text": alternative.text,
                "raw_text": alternative.raw_text,
                "ids": list(alternative.ids),
                "sum_log_prob": alternative.sum_log_prob,
                "score": alternative.score,
            }
            for alternative in caption.alternatives
        ]
        lines.append(_json_line({"id": caption.id, "drawn": drawn, "hypotheses": hypotheses}))
    write_atomically(path, "".join(lines))

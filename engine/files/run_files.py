"""Write a run: run.csv (one caption an image), the n-best JSON lines and the timings; knows nothing of how they were
made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import OutputError, UsageError

if TYPE_CHECKING:
    from engine.captioner import Caption

CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]+")
"""Control characters and everything some reader takes for a line break."""


def check_outputs(outputs: Mapping[str, Path], kept: Iterable[Path]) -> None:
    """Refuse, before any work is spent, output files {option: path} that cannot be written or would destroy something.

    That is a directory, a device or a pipe, a missing or read-only folder, one of the `kept` files, or a file named
    twice. Raises UsageError naming the option.
    """
    taken = {os.path.realpath(path): f"the input {path}" for path in kept}
    for option, path in outputs.items():
        target = os.path.realpath(path)  # unlike Path.resolve, it takes a loop of links for a name like any other
        parent = Path(target).parent
        if path.exists() and not path.is_file():
            raise UsageError(f"{option} {path} is a directory, a device or a pipe: name a file")
        if not parent.is_dir():
            raise UsageError(f"{option} {path}: {parent} does not exist, create it first")
        if not os.access(parent, os.W_OK):
            raise UsageError(f"{option} {path}: {parent} is not writable")
        if target in taken:
            raise UsageError(f"{option} {path} would overwrite {taken[target]}")
        taken[target] = option


def format_row(image_id: str, caption: str) -> str:
    """Return one line of run.csv: the id bare where it may be, the caption always quoted, on one line."""
    text = CONTROL.sub(" ", caption).strip().replace('"', '""')
    return f'{_format_id(image_id)},"{text}"\n'


def _format_id(image_id: str) -> str:
    if any(character in image_id for character in ',"\r\n'):
        return '"' + image_id.replace('"', '""') + '"'
    return image_id


def write_run(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write (id, caption) rows as run.csv: UTF-8, header `ID,Caption`, in the order given."""
    write_atomically(path, "ID,Caption\n" + "".join(format_row(image_id, caption) for image_id, caption in rows))


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
        lines.append(
            json.dumps({"id": caption.id, "drawn": drawn, "hypotheses": hypotheses}, ensure_ascii=False) + "\n"
        )
    write_atomically(path, "".join(lines))


def write_atomically(path: Path, text: str) -> None:
    """Write text as UTF-8 with replace_file; file names that are not UTF-8 keep their bytes."""
    replace_file(path, text.encode("utf-8", "surrogateescape"))


def replace_file(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write under a temporary name, then replace `path` (a link's target, keeping its permissions unless `mode` is
    given).

    Raises OutputError and leaves nothing behind.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")  # a killed run's is overwritten by the next
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if mode is not None or target.exists():
            temporary.chmod(target.stat().st_mode & 0o777 if mode is None else mode)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}: make room, or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)

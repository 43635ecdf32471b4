"""The folder of a report: taken only when it is new, empty or a report already, and never half a page."""

from __future__ import annotations

import json
import os
from pathlib import Path

from engine.errors import OutputError, UsageError
from engine.files.atomic import write_atomically
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

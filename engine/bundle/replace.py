"""Write a bundle to a folder: locked, as a draft next to it, and in place of an earlier bundle only."""

from __future__ import annotations

import errno
import glob
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.bundle.manifest import FORMAT, GOLDEN, MANIFEST, OLDER_FORMATS, REQUIRED_FILES
from engine.errors import OutputError
from engine.files.lock import OutputLock
from engine.options import PRECISIONS

REPLACED = "replaced"
"""Name, in the draft folder, of the previous bundle while the new one is moved into place."""


def is_replaceable(out: Path) -> bool:
    """Return whether `out` does not exist, is an empty folder, or holds a bundle and no other files."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        return False
    present = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if not present:
        return True
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        files = set(manifest["files"])
        is_bundle = manifest["format"] in (*OLDER_FORMATS, FORMAT) and files >= set(REQUIRED_FILES) - {GOLDEN}
        return is_bundle and present <= {MANIFEST, *files}
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def bundle_drafts(out: Path, log: Callable[[str], None]) -> Iterator[Path]:
    """Lock `out` and yield a temporary folder next to it for drafts.

    Drafts of killed processes for `out` are removed first. That is safe because the lock excludes running ones.
    Raises OutputError, which names the folder, if files cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with OutputLock(out) as lock:
            if lock.note:
                log(lock.note)
            _remove_dead_drafts(out, log)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
                yield Path(temporary)
    except OSError as error:
        if error.errno == errno.EPIPE:  # a closed pipe, not an output file: the reader of our log has exited
            raise
        raise OutputError(
            f"{out.parent} cannot be written ({error.strerror or error}): check its free space and permissions, or "
            "choose another --out"
        ) from error


def _remove_dead_drafts(out: Path, log: Callable[[str], None]) -> None:
    """Remove the drafts of killed processes, and restore the previous bundle if one of them had moved it."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*"):
        contents = {entry.name for entry in folder.iterdir()} if _is_draft_folder(folder, out) else {""}
        if not contents <= {"bundle", REPLACED, *PRECISIONS}:
            continue
        if REPLACED in contents and not out.exists():
            (folder / REPLACED).replace(out)
            log(f"note: restored {out}, which a killed export had moved to {folder}")
        shutil.rmtree(folder)
        log(f"note: removed {folder}, the draft of a killed export")


def _is_draft_folder(folder: Path, out: Path) -> bool:
    """Return whether a folder is named as tempfile names the drafts of `out`: with a suffix of 8 random characters."""
    is_ours = re.fullmatch(r"[a-z0-9_]{8}", folder.name.removeprefix(f".{out.name}."))
    return bool(is_ours) and folder.is_dir() and not folder.is_symlink()


def move_bundle(draft: Path, out: Path) -> None:
    """Move a draft to `out`. If that fails, the previous bundle is moved back."""
    replaced = draft.parent / REPLACED
    if out.exists():
        out.replace(replaced)
    try:
        draft.replace(out)
    except BaseException:
        if replaced.exists():
            replaced.replace(out)
        raise

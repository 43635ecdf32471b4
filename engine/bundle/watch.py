"""Notice when the files of a bundle are overwritten while it is in use.

ONNX Runtime and OpenVINO map the weights: what `cp new/* bundle/` writes into the files is what a running model
computes with from that moment on. A file that is replaced by rename, as `python -m export` does it, stays what it was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from engine.bundle.manifest import MANIFEST, Bundle, Stamp, stamp_of
from engine.errors import BundleError

SIZE_AND_TIME = 2
"""The first numbers of a stamp; the last one also changes with chmod, a hard link or the removal of a name."""


class BundleWatch:
    """The open files of a bundle, or of all members of an ensemble, and what they were when it was loaded."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BundleError where a file is not the one that was checked when the bundle was loaded."""
        self._held = ExitStack()
        self._files: list[tuple[Path, IO[bytes], str]] = []
        self._stamps: list[Stamp] = []
        with ExitStack() as opened:
            for member in bundle.members or (bundle,):
                for name, digest in {**member.files, MANIFEST: member.digest}.items():
                    path = member.path / name
                    try:
                        stream = opened.enter_context(path.open("rb"))
                    except OSError as error:
                        raise _overwritten(path) from error
                    self._files.append((path, stream, digest))
                    stamp = stamp_of(os.fstat(stream.fileno()))
                    if stamp != member.stamps.get(name) and _sha256(stream) != digest:
                        raise _overwritten(path)
                    self._stamps.append(stamp)
            self._held = opened.pop_all()

    def check(self) -> None:
        """Raise BundleError where a file was overwritten since it was loaded: some microseconds, so call it often."""
        for place, (path, stream, digest) in enumerate(self._files):
            stamp, before = stamp_of(os.fstat(stream.fileno())), self._stamps[place]
            if stamp == before:
                continue
            if stamp[:SIZE_AND_TIME] != before[:SIZE_AND_TIME] or _sha256(stream) != digest:
                raise _overwritten(path)
            self._stamps[place] = stamp

    def close(self) -> None:
        """Close the files."""
        self._held.close()


@contextmanager
def watched(bundle: Bundle) -> Iterator[BundleWatch]:
    """Watch a bundle's files for a time."""
    watch = BundleWatch(bundle)
    try:
        yield watch
    finally:
        watch.close()


def _sha256(stream: IO[bytes]) -> str:
    stream.seek(0)
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto


def _overwritten(path: Path) -> BundleError:
    return BundleError(
        f"{path} was overwritten during the run, so captions may be of other weights: put a new bundle into another "
        "folder, and run the same command again"
    )

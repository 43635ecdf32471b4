"""Atomic writes, checks of output paths, and the private cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.errors import BackendError, OutputError, UsageError

LONGEST_NAME = 255
"""Limit of a file name in bytes on the common file systems."""


def check_outputs(outputs: Mapping[str, Path], kept: Iterable[Path]) -> None:
    """Check output files {option: path} before any work is done. Raises UsageError that names the option.

    Refuses directories, devices and pipes, files in a missing or read-only folder, files that would overwrite one of
    the `kept` files, and two options with the same file.
    """
    taken = {os.path.realpath(path): f"the input {path}" for path in kept}
    for option, path in outputs.items():
        target = os.path.realpath(path)  # unlike Path.resolve, this does not raise for a loop of links
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


def write_atomically(path: Path, text: str) -> None:
    """Write text as UTF-8 with replace_file; surrogates (file names that are not UTF-8) become their original bytes."""
    replace_file(path, text.encode("utf-8", "surrogateescape"))


def replace_file(path: Path, content: bytes, *, mode: int | None = None, follow: bool = True) -> None:
    """Write a file under a temporary name, then rename it to `path`.

    If `path` is a link, its target is replaced; with `follow=False` the link itself. The permissions of an existing
    file are kept unless `mode` is given. Raises OutputError and removes the temporary file if writing fails.
    """
    target = Path(os.path.realpath(path)) if follow else path
    temporary = _temporary(target)
    try:
        temporary.unlink(missing_ok=True)  # left by a killed run, or a planted link, which must not be followed
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if mode is not None or (target.exists() and not target.is_symlink()):
            temporary.chmod(target.stat().st_mode & 0o777 if mode is None else mode)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}: make room, or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    """Return a hidden name in the same folder, always the same one. A name that would get too long is hashed."""
    name = os.fsencode(target.name)
    # a name that is over the limit itself is not shortened, so that writing reports the error
    is_used = len(name) <= LONGEST_NAME - len("..tmp") or len(name) > LONGEST_NAME
    return target.with_name(f".{target.name if is_used else hashlib.sha256(name).hexdigest()[:32]}.tmp")


def require_space(needs: Mapping[Path, int], what: str) -> None:
    """Raise OutputError, which begins with `what`, if the disks lack the bytes to write {folder: bytes}.

    The folders need not exist yet. Folders on one file system share its free space.
    """
    disks: dict[int, tuple[Path, dict[Path, int]]] = {}
    for folder, size in needs.items():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        disks.setdefault(existing.stat().st_dev, (existing, {}))[1][folder] = size
    for existing, sizes in disks.values():
        free = shutil.disk_usage(existing).free
        if sum(sizes.values()) > free:
            parts = " and ".join(f"{megabytes(size)} in {folder}" for folder, size in sizes.items() if size)
            raise OutputError(
                f"{what} needs {parts}, but only {megabytes(free)} are free: free space there, or use another disk "
                "(variables HF_HOME and XDG_CACHE_HOME)"
            )


def megabytes(size: int) -> str:
    """Format a number of bytes: `1.2 MB`."""
    return f"{size / 1e6:,.1f} MB"


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as lower-case hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


NAME = "blip-caption-engine"
UNFINISHED = ".unfinished"
"""Prefix of folders that are being filled. Those left by killed processes are deleted later, see draft_folder."""


def cache_root() -> Path:
    """Return this project's cache folder according to the XDG base directory rules; it may not exist yet.

    Without a home directory, as in containers with an unknown user id, the folder is below the temporary directory. It
    is then created here, private to this user. Raises BackendError if that fails.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / NAME
    try:
        home = Path.home() if os.environ.get("HOME") != "" else None
    except RuntimeError:  # no HOME, and the user id has no account
        home = None
    return _temporary_root() if home is None else home / ".cache" / NAME


def _temporary_root() -> Path:
    """Create and return the cache folder of a user without a home. Its name can be guessed, so its owner is checked."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    root = Path(tempfile.gettempdir()) / f"{NAME}-{user}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        if root.is_symlink():
            raise BackendError(f"{root} is a link: set HOME or XDG_CACHE_HOME to a folder of your own")
        require_private(root, "the files there decide captions")
    except OSError as error:
        raise BackendError(
            f"there is no home directory, and {root} cannot be used ({error.strerror}): set HOME or XDG_CACHE_HOME"
        ) from error
    return root


def cache_folder(digest: str, name: str, reason: str) -> Path:
    """Create and return the private cache folder `name` of the bundle with this digest.

    Raises BackendError, with `reason` as in require_private, if the folder belongs to another user or others may write
    into it.
    """
    folder = cache_root() / digest[:16] / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(folder, reason)
    return folder


def require_private(path: Path, reason: str) -> None:
    """Raise BackendError if a folder or file belongs to another user or others may write into it.

    `reason` is part of the message and says why that matters, such as `plans are executable code`.
    """
    status = path.stat()
    if not hasattr(os, "getuid"):
        return
    if status.st_uid != os.getuid():
        raise BackendError(
            f"{path} belongs to another user, and {reason}: choose another folder (the cache is below XDG_CACHE_HOME)"
        )
    if status.st_mode & 0o022:
        raise BackendError(f"others may write into {path}, and {reason}: chmod go-w {path}, or choose another folder")


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to `target`, to be filled and renamed to `target`.

    The folder is deleted at the end if it was not renamed. The caller must hold a lock on `target`, because unfinished
    folders of killed processes for the same target are deleted first.
    """
    prefix = f"{UNFINISHED}-{target.name}-"
    for entry in target.parent.iterdir():
        if entry.name.startswith(prefix):
            shutil.rmtree(entry, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as temporary:
        draft = Path(temporary) / "draft"
        draft.mkdir(mode=0o700)
        yield draft

"""Bundles from a URI, copied once a node into a cache keyed by their manifest's sha256."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engine.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES, Bundle
from engine.errors import BundleError, EngineError
from engine.files.cache import cache_root
from engine.files.lock import waiting_lock
from engine.inputs.remote import Location, RemoteFile, RemoteFolder, one_line_of

CHUNK_BYTES = 1 << 22


def open_bundle(location: Location | None = None) -> Bundle:
    """Read and check the bundle in a directory, at a URI (copied into a cache first), or the embedded demo.

    Raises BundleError, see Bundle.load and fetch_bundle.
    """
    if not isinstance(location, RemoteFolder):
        return Bundle.load(location)
    path = fetch_bundle(location)
    try:
        return Bundle.load(path)
    except BundleError:  # a damaged copy is made again, once
        return Bundle.load(fetch_bundle(location, anew=True))


def fetch_bundle(folder: RemoteFolder, *, anew: bool = False) -> Path:
    """Return a local copy of the bundle at a URI, made once however many processes of a node ask for it.

    Bundle.load checks its files. A copy that is not complete, or any with `anew`, is made again. Raises BundleError
    when there is no bundle or a file is not the manifest's, EngineError when the storage does not answer.
    """
    try:
        manifest = folder.read(MANIFEST, most_bytes=MAX_MANIFEST_BYTES)
        files = json.loads(manifest)["files"]
        plain = {str(name): str(digest) for name, digest in files.items() if Path(name).name == name}
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with `python -m export`") from None
    except OSError as error:
        raise BundleError(f"{folder}/{MANIFEST} cannot be read: {one_line_of(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{folder}/{MANIFEST} is not a manifest ({str(error)[:200]}): export it again") from error
    target = cache_root() / "bundles" / hashlib.sha256(manifest).hexdigest()
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with waiting_lock(target.with_suffix(".lock")):
            if anew or not _is_complete(target, manifest, plain):
                _copy(folder, manifest, plain, target)
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(f"{folder} cannot be kept in {target}: {reason}: set XDG_CACHE_HOME") from error
    return target


def _is_complete(target: Path, manifest: bytes, files: dict[str, str]) -> bool:
    if not target.is_dir() or {entry.name for entry in target.iterdir()} != {MANIFEST, *files}:
        return False
    return (target / MANIFEST).read_bytes() == manifest


def _copy(folder: RemoteFolder, manifest: bytes, files: dict[str, str], target: Path) -> None:
    """Copy into a folder beside the target, which then takes its place: a half-made copy is never met."""
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unfinished") as unfinished:
        draft = Path(unfinished) / "bundle"
        draft.mkdir()
        for name, expected in files.items():
            digest = hashlib.sha256()
            with (draft / name).open("wb") as out:
                for chunk in _chunks(folder, name):
                    digest.update(chunk)
                    out.write(chunk)
            if digest.hexdigest() != expected:
                raise BundleError(f"{RemoteFile(folder, name)} is not the file of the manifest: export it again")
        (draft / MANIFEST).write_bytes(manifest)
        draft.rename(target)


def _chunks(folder: RemoteFolder, name: str) -> Iterator[bytes]:
    """Yield a remote file; raise BundleError for whatever goes wrong there, not in the cache."""
    file = RemoteFile(folder, name)
    try:
        with folder.open(name) as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not whole: it has no {name}: export it again") from error
    except EngineError:
        raise
    except Exception as error:  # a storage's library raises its own errors, too
        raise BundleError(f"{file} cannot be read: {one_line_of(error)}: run the same command again") from error

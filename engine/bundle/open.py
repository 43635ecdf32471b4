"""Bundles from a URI or made of links, copied once a node into a cache keyed by their manifest's sha256."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from engine.bundle.manifest import HALVES, MANIFEST, MAX_MANIFEST_BYTES, Bundle, change_of
from engine.errors import BundleError, EngineError, UsageError
from engine.files.atomic import cache_root, draft_folder, file_sha256
from engine.files.lock import waiting_lock
from engine.inputs.kinds import wrong_content
from engine.inputs.remote import Location, RemoteFolder, one_line_of

CHUNK_BYTES = 1 << 22
Folder = RemoteFolder | Path
"""Where files are copied from: a URI, or a folder of this machine whose entries are links."""


def open_bundle(location: Location | None = None) -> Bundle:
    """Read and check the bundle in a directory, at a URI, or the embedded demo.

    A bundle at a URI is copied into a cache first, and so is one that is made of links, as in the caches of Hugging
    Face, DVC and git-annex: runtimes refuse weights outside the graph's folder, onnx those with hard links, too. Only
    files with the manifest's sha256 are taken. Raises BundleError, see Bundle.load and fetch_bundle.
    """
    if location is None or (isinstance(location, Path) and not _has_links(location)):
        return Bundle.load(location)
    path = fetch_bundle(location)
    try:
        return Bundle.load(path)
    except BundleError:  # a damaged copy is made again, once
        return Bundle.load(fetch_bundle(location, anew=True))


def _has_links(path: Path) -> bool:
    with suppress(OSError):  # Bundle.load says what is wrong
        return any(entry.is_symlink() for entry in path.iterdir())
    return False


def fetch_bundle(folder: Folder, *, anew: bool = False) -> Path:
    """Return a local copy of the bundle at a URI or behind links, made once however many processes ask for it.

    Bundle.load checks its files. A copy that is not complete, or any with `anew`, is made again. Raises BundleError
    when there is no bundle or a file is not the manifest's, EngineError when the storage does not answer.
    """
    manifest = b""
    try:
        manifest = _read(folder)
        files = json.loads(manifest)["files"]
        plain = {
            str(name): str(digest) for name, digest in files.items() if Path(name).name == name and "\0" not in name
        }
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with `python -m export`") from None
    except OSError as error:
        raise BundleError(f"{folder}/{MANIFEST} cannot be read: {one_line_of(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        known = wrong_content(manifest)
        raise BundleError(
            f"{folder}/{MANIFEST}: {known or f'not a manifest ({str(error)[:200]}): export it again'}"
        ) from error
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


def _read(folder: Folder) -> bytes:
    """Return the content of the manifest."""
    if not isinstance(folder, Path):
        return folder.read(MANIFEST, most_bytes=MAX_MANIFEST_BYTES)
    path = _regular(folder, MANIFEST)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"larger than {MAX_MANIFEST_BYTES} bytes")
    return path.read_bytes()


def _regular(folder: Path, name: str) -> Path:
    """Return the file that a link leads to. Raises FileNotFoundError if it is missing, a pipe, a device or a folder."""
    path = Path(os.path.realpath(folder / name))
    if not path.is_file():
        raise FileNotFoundError(path)
    return path


def _is_complete(target: Path, manifest: bytes, files: dict[str, str]) -> bool:
    if not target.is_dir() or {entry.name for entry in target.iterdir()} != {MANIFEST, *files}:
        return False
    return (target / MANIFEST).read_bytes() == manifest


def _copy(folder: Folder, manifest: bytes, files: dict[str, str], target: Path) -> None:
    """Copy into a temporary folder that then replaces the target: an incomplete copy is never opened."""
    shutil.rmtree(target, ignore_errors=True)
    with draft_folder(target) as draft:
        for name, expected in files.items():
            with (draft / name).open("wb") as out:
                for chunk in _chunks(folder, name):
                    out.write(chunk)
            if file_sha256(draft / name) != expected:
                raise BundleError(f"{folder}/{name} {change_of(draft / name)}: copy it again, or export it again")
        (draft / MANIFEST).write_bytes(manifest)
        draft.rename(target)


def _chunks(folder: Folder, name: str) -> Iterator[bytes]:
    """Yield a file; raise BundleError for whatever goes wrong there, not in the cache."""
    left = math.inf
    try:
        if isinstance(folder, Path):
            path = _regular(folder, name)
            left = path.stat().st_size  # a hostile link may lead to a file without a size that never ends (/proc/kmsg)
        with path.open("rb") if isinstance(folder, Path) else folder.open(name) as source:
            while left and (chunk := source.read(int(min(left, CHUNK_BYTES)))):
                left -= len(chunk)
                yield chunk
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not whole: it has no {name}: export it again") from error
    except EngineError:
        raise
    except Exception as error:  # a storage's library raises its own errors, too
        raise BundleError(
            f"{folder}/{name} cannot be read: {one_line_of(error)}: run the same command again"
        ) from error


@dataclass(frozen=True)
class Ensemble:
    """Where the bundles are, and the weight of each in the mean: equal ones where none are given.

    Raises UsageError for fewer than two bundles, for one twice, or for weights that are none.
    """

    bundles: tuple[Location, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.bundles) < 2:
            raise UsageError("bundles caption together from two on: leave the weight out, or give another --bundle")
        if len(set(self.bundles)) < len(self.bundles):
            raise UsageError("a bundle is given twice: give it once, with a larger --bundle-weight")
        if len(self.weights or self.bundles) != len(self.bundles):
            raise UsageError(
                f"{len(self.bundles)} bundles and {len(self.weights)} weights: give one --bundle-weight for each"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise UsageError(f"a --bundle-weight must be a number above 0: {', '.join(map(str, self.weights))}")
        object.__setattr__(self, "weights", self.weights or (1.0,) * len(self.bundles))

    def __str__(self) -> str:
        return " + ".join(map(str, self.bundles))


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights divided by their sum: what each bundle counts in the mean."""
    return [weight / math.fsum(weights) for weight in weights]


BundlePlace = Location | Ensemble
"""Where a bundle is, or where several are that caption together."""


def place_of(bundles: Sequence[Location], weights: Sequence[float]) -> BundlePlace | None:
    """Return where to look for one bundle, or for several with their weights; None for none. Raises UsageError."""
    if len(bundles) < 2 and not weights:
        return bundles[0] if bundles else None
    return Ensemble(tuple(bundles), tuple(weights))


def absolute(place: BundlePlace | None) -> BundlePlace | None:
    """Return the same place for processes that run in another folder."""
    if isinstance(place, Ensemble):
        return replace(place, bundles=tuple(one.absolute() if isinstance(one, Path) else one for one in place.bundles))
    return place.absolute() if isinstance(place, Path) else place


def where_read(place: BundlePlace | None, bundle: Bundle) -> BundlePlace:
    """Return where a bundle that was opened at `place` lies on this machine: that of a URI is not asked for again."""
    if isinstance(place, Ensemble):
        return replace(place, bundles=tuple(member.path.absolute() for member in bundle.members))
    return bundle.path.absolute()


def folders_of(place: BundlePlace | None) -> list[Path]:
    """Return the local folders of a place."""
    places = place.bundles if isinstance(place, Ensemble) else (place,)
    return [one for one in places if isinstance(one, Path)]


def open_place(place: BundlePlace | None = None) -> Bundle:
    """Read and check a bundle, or all of an ensemble; the embedded demo when None. Raises BundleError."""
    if not isinstance(place, Ensemble):
        return open_bundle(place)
    return combine([open_bundle(one) for one in place.bundles], place.weights)


def on_halves(bundle: Bundle) -> Bundle | None:
    """Return a bundle as the only one of an ensemble: what it says beside others, to the same numbers. None where it
    cannot caption together with others.
    """
    return combine([bundle], [1.0]) if all(f"{graph}.onnx" in bundle.files for graph in HALVES) else None


def combine(bundles: Sequence[Bundle], weights: Sequence[float]) -> Bundle:
    """Return what bundles are together: the first one, with the others as its `members`, and a digest of its own.

    Settings for decoding are those of the first. Raises BundleError where bundles do not fit one another.
    """
    first = bundles[0]
    for bundle in bundles:
        for what, mine, other in (
            ("a tokenizer", bundle.files["tokenizer.json"], first.files["tokenizer.json"]),
            ("special tokens", bundle.tokens, first.tokens),
            ("a vocabulary", bundle.model.vocab_size, first.model.vocab_size),
            ("an image size", (bundle.image.height, bundle.image.width), (first.image.height, first.image.width)),
            ("a way of resizing", bundle.image.resample, first.image.resample),
            ("a way of writing", bundle.clean_up_tokenization_spaces, first.clean_up_tokenization_spaces),
        ):
            if mine != other:
                raise BundleError(f"{bundle.path} has {what} of its own: it cannot caption together with {first.path}")
        if missing := [f"{graph}.onnx" for graph in HALVES if f"{graph}.onnx" not in bundle.files]:
            raise BundleError(
                f"{bundle.path} was exported before bundles could caption together (no {', '.join(missing)}): export "
                "its checkpoint again"
            )
    named = "|".join(f"{bundle.digest}:{weight!r}" for bundle, weight in zip(bundles, weights, strict=True))
    positions = min(bundle.model.max_positions for bundle in bundles)
    precisions = [bundle.precision for bundle in bundles]
    return replace(
        first,
        precision="+".join(precisions if len(set(precisions)) > 1 else precisions[:1]),
        digest=hashlib.sha256(named.encode()).hexdigest(),
        model=replace(first.model, max_positions=positions),
        members=tuple(bundles),
        weights=tuple(weights),
    )

"""Open bundles: local folders, cached copies of remote or linked ones, and ensembles of several bundles."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from engine.bundle.manifest import HALVES, MANIFEST, MAX_MANIFEST_BYTES, Bundle, change_of
from engine.errors import BundleError, EngineError, UsageError, counted
from engine.files.atomic import cache_root, draft_folder, file_sha256
from engine.files.lock import waiting_lock
from engine.inputs.kinds import wrong_content
from engine.inputs.remote import Location, one_line_of

CHUNK_BYTES = 1 << 22


def open_bundle(location: Location | None = None) -> Bundle:
    """Read and check the bundle in a directory, at a URI, or the embedded demo (None).

    A bundle at a URI is copied into the cache first. So is one that consists of links, as in the caches of Hugging
    Face, DVC and git-annex: runtimes refuse weights outside the graph's folder, and onnx also refuses hard links. Only
    files with the manifest's sha256 are accepted. Raises BundleError, see Bundle.load and fetch_bundle.
    """
    if location is None or (isinstance(location, Path) and not _has_links(location)):
        return Bundle.load(location)
    path = fetch_bundle(location)
    try:
        return Bundle.load(path)
    except BundleError:  # the cached copy is damaged: copy again, once
        return Bundle.load(fetch_bundle(location, force=True))


def _has_links(path: Path) -> bool:
    with suppress(OSError):  # Bundle.load reports it
        return any(entry.is_symlink() for entry in path.iterdir())
    return False


def fetch_bundle(folder: Location, *, force: bool = False) -> Path:
    """Return a local copy of a bundle at a URI or made of links, cached by the sha256 of its manifest.

    Concurrent processes of a node make only one copy. An incomplete copy is made again; with `force`, any copy.
    Bundle.load checks the files. Raises BundleError if there is no bundle or a file does not match the manifest,
    EngineError if the storage does not respond.
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
            if force or not _is_complete(target, manifest, plain):
                _copy(folder, manifest, plain, target)
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(f"{folder} cannot be copied to {target}: {reason}: set XDG_CACHE_HOME") from error
    return target


def _read(folder: Location) -> bytes:
    """Return the content of the manifest. Raises ValueError if it is too large."""
    if not isinstance(folder, Path):
        return folder.read(MANIFEST, most_bytes=MAX_MANIFEST_BYTES)
    path = _regular(folder, MANIFEST)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"larger than {MAX_MANIFEST_BYTES} bytes")
    return path.read_bytes()


def _regular(folder: Path, name: str) -> Path:
    """Resolve a link to a regular file. Raises FileNotFoundError if it is missing, a pipe, a device or a folder."""
    path = Path(os.path.realpath(folder / name))
    if not path.is_file():
        raise FileNotFoundError(path)
    return path


def _is_complete(target: Path, manifest: bytes, files: dict[str, str]) -> bool:
    if not target.is_dir() or {entry.name for entry in target.iterdir()} != {MANIFEST, *files}:
        return False
    return (target / MANIFEST).read_bytes() == manifest


def _copy(folder: Location, manifest: bytes, files: dict[str, str], target: Path) -> None:
    """Copy into a temporary folder, then rename it to the target, so that no one opens an incomplete copy."""
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


def _chunks(folder: Location, name: str) -> Iterator[bytes]:
    """Yield the content of a file in chunks. Errors of the source become BundleError; those of the cache do not."""
    left = math.inf
    try:
        if isinstance(folder, Path):
            path = _regular(folder, name)
            left = path.stat().st_size  # a hostile link may lead to an endless file of size 0 (/proc/kmsg)
        with path.open("rb") if isinstance(folder, Path) else folder.open(name) as source:
            while left and (chunk := source.read(int(min(left, CHUNK_BYTES)))):
                left -= len(chunk)
                yield chunk
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is incomplete: it has no {name}: export it again") from error
    except EngineError:
        raise
    except Exception as error:  # storage libraries also raise their own errors
        raise BundleError(
            f"{folder}/{name} cannot be read: {one_line_of(error)}: run the same command again"
        ) from error


@dataclass(frozen=True)
class BundleRef:
    """Names the bundle of a run: one location, several whose bundles are averaged, or none for the embedded demo.

    `weights` holds the weight of each of several bundles in the mean (default: equal weights). `task` is the task of a
    model with tasks (default: its first). Raises UsageError for weights without several bundles, a bundle that is given
    twice, or invalid weights.
    """

    locations: tuple[Location, ...] = ()
    weights: tuple[float, ...] = ()
    task: str | None = None

    def __post_init__(self) -> None:
        count = len(self.locations)
        if count < 2 and self.weights:
            raise UsageError(
                "--bundle-weight needs at least two --bundle options (or --model options): remove it, or add another"
            )
        if len(set(self.locations)) < count:
            raise UsageError("a bundle is given twice: give it once, with a larger --bundle-weight")
        if len(self.weights or self.locations) != count:
            raise UsageError(
                f"{counted(count, 'bundle')} and {counted(len(self.weights), 'weight')}: give one --bundle-weight "
                "for each"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise UsageError(f"a --bundle-weight must be a number above 0: {', '.join(map(str, self.weights))}")

    def __str__(self) -> str:
        return " + ".join(map(str, self.locations)) or "the embedded demo"

    def located(self, log: Callable[[str], None]) -> BundleRef:  # noqa: ARG002
        """Return itself: bundles need no conversion. See ModelRef in engine/checkpoints/cache.py."""
        return self

    @property
    def names(self) -> tuple[Location, ...]:
        """What the user named; empty for the embedded demo."""
        return self.locations

    def open(self) -> Bundle:
        """Read and check the bundle, or all bundles of an ensemble. Raises BundleError, see open_bundle.

        Raises UsageError if the bundle does not have the task.
        """
        if len(self.locations) < 2:
            return open_bundle(*self.locations).for_task(self.task)
        weights = self.weights or (1.0,) * len(self.locations)
        return combine(list(map(open_bundle, self.locations)), weights).for_task(self.task)

    def folders(self) -> list[Path]:
        """Return the local folders; URIs are omitted."""
        return [location for location in self.locations if isinstance(location, Path)]

    def absolute(self) -> BundleRef:
        """Make local paths absolute, for processes with another working directory."""
        paths = (location.absolute() if isinstance(location, Path) else location for location in self.locations)
        return replace(self, locations=tuple(paths))

    def local(self, bundle: Bundle) -> BundleRef:
        """Return the local folders from which `bundle`, the result of `open`, was read (for a URI: its cached copy)."""
        return replace(self, locations=tuple(member.path.absolute() for member in bundle.members or (bundle,)))


def shares(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum."""
    return [weight / math.fsum(weights) for weight in weights]


def on_halves(bundle: Bundle) -> Bundle | None:
    """Wrap one bundle as an ensemble of one, so that it runs the same graphs as in an ensemble.

    Returns None if the bundle does not have the graphs of the split decoder.
    """
    return combine([bundle], [1.0]) if all(f"{graph}.onnx" in bundle.files for graph in HALVES) else None


def combine(bundles: Sequence[Bundle], weights: Sequence[float]) -> Bundle:
    """Combine bundles into an ensemble: a copy of the first bundle with all of them as `members` and a new digest.

    Generation settings are those of the first bundle. Raises BundleError if the bundles do not match, for example in
    their tokenizers.
    """
    first = bundles[0]
    for bundle in bundles:
        for what, value, expected in (
            ("tokenizer", bundle.files["tokenizer.json"], first.files["tokenizer.json"]),
            ("special tokens", bundle.tokens, first.tokens),
            ("vocabulary size", bundle.model.vocab_size, first.model.vocab_size),
            ("image size", (bundle.image.height, bundle.image.width), (first.image.height, first.image.width)),
            ("resize filter", bundle.image.resample, first.image.resample),
            ("size before the center crop", bundle.image.resize, first.image.resize),
            ("clean-up of spaces", bundle.clean_up_tokenization_spaces, first.clean_up_tokenization_spaces),
            ("tasks", bundle.tasks, first.tasks),
        ):
            if value != expected:
                raise BundleError(f"{bundle.path} and {first.path} differ in the {what}: they cannot caption together")
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

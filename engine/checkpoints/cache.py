"""Convert checkpoints to bundles once, and keep the bundles in the cache folder, named by the hash of what made them.

Bundles are in `models/KEY`, where KEY is the sha256 of the checkpoint's files, precision, image size and graph-set
version. Each file in `models/names` is an Entry, which says what bundle a name stands for. Its modification time is the
last use of the bundle by that name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from engine.bundle.manifest import MANIFEST, Bundle, FileDigests, Stamp, stamp_of
from engine.bundle.open import BundleRef, open_bundle
from engine.bundle.replace import bundle_drafts, is_replaceable, move_bundle
from engine.checkpoints.hub import COMMIT_DIGITS, fetch, is_hub_id
from engine.errors import BundleError, CheckpointError, OutputError, UsageError
from engine.files.atomic import (
    UNFINISHED,
    cache_root,
    draft_folder,
    megabytes,
    replace_file,
    require_private,
    require_space,
)
from engine.files.lock import tried_lock, waiting_lock
from engine.inputs.remote import Location, location
from engine.options import PRECISIONS

Log = Callable[[str], None]

REASON = "the bundles cached there decide captions"
SETTINGS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json"),
)
"""Files that decide a bundle in addition to the weights. A training writes others next to them, such as its log."""
RELATIVE_SIZE = {"fp32": 1.0, "fp16": 0.5, "int8": 0.25}
"""Usual size of a bundle relative to float32 weights, to see before a conversion whether it fits on the disk."""
CONVERTER = 2
"""Version of what turns a checkpoint's files into a bundle, apart from the graphs. Increase it whenever the same files
give another bundle, for example another tokenizer.json: then cached bundles are made again."""
COARSE_NS = 3 * 10**9
"""Some file systems count time in steps of 2 s. A file that changed within that time may change again unnoticed."""
KEY = re.compile(r"[0-9a-f]{64}")
FEWEST_DIGITS = 6
"""Fewest digits of a key that `engine models --remove` accepts."""


def kept(folder: Path, write: Callable[[Path], None], is_whole: Callable[[Path], bool], reason: str) -> Path:
    """Return a cache folder. If it is not whole yet, `write` fills it.

    One process writes it while others wait. An incomplete folder is never kept, and a whole one never replaced.
    Raises BackendError, with `reason` as in require_private, if other users can write to the cache, CheckpointError if
    this user cannot, and OutputError if writing fails.
    """
    _make(folder.parent)
    _check_private(folder, reason)
    if is_whole(folder):  # before the lock, which a read-only cache cannot hold
        return folder
    with _writing(folder), waiting_lock(folder.with_name(f"{folder.name}.lock")):
        if not is_whole(folder):  # another process may have written it while we waited
            with draft_folder(folder) as draft:
                write(draft)
                shutil.rmtree(folder, ignore_errors=True)
                draft.rename(folder)
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be created: {error.strerror or error}: set XDG_CACHE_HOME to a folder that can be written"
        ) from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our log has exited
            raise
        raise OutputError(
            f"{folder} cannot be written ({error.strerror or error}): free space there, or set XDG_CACHE_HOME to "
            "another disk"
        ) from error


def _check_private(folder: Path, reason: str) -> None:
    """Raise BackendError if another user could have written the contents of a cache folder."""
    require_private(folder.parent, reason)
    if folder.parent.stat().st_mode & 0o011 and folder.is_dir():  # other users can enter it: check each file too
        for path in (folder, *folder.iterdir()):
            require_private(path, reason)


@dataclass(frozen=True)
class Entry:
    """Which bundle a name stands for in a precision and an image size (None: the checkpoint's own).

    name    a hub id with its revision, or the absolute path of a local checkpoint
    graphs  version of the graph set that the bundle was made with; `converter` is CONVERTER then
    key     name of the bundle's folder
    commit  full hash of the hub's commit, or "" for a local checkpoint
    stamps  stamp of each file of a local checkpoint, to see without reading it that it has not changed. None are kept
            of files that had just changed, see COARSE_NS
    """

    name: str
    precision: str
    image_size: int | None
    graphs: str = ""
    converter: int = CONVERTER
    key: str = ""
    commit: str = ""
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file of this entry."""
        identity = json.dumps([self.name, self.precision, self.image_size])
        return _names() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"

    @property
    def folder(self) -> Path:
        """The bundle."""
        return models_folder() / self.key

    @classmethod
    def read(cls, path: Path) -> Entry | None:
        """Read an entry; return None if it is missing or cannot be read."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            entry = cls(**{one.name: raw[one.name] for one in fields(cls)})
            stamps = {str(name): (int(a), int(b), int(c)) for name, (a, b, c) in entry.stamps.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return replace(entry, stamps=stamps) if KEY.fullmatch(str(entry.key)) else None

    def write(self) -> None:
        """Write or replace the entry."""
        _make(_names())
        with waiting_lock(self.path.with_suffix(".lock")):  # replace_file has one temporary name per file
            replace_file(self.path, json.dumps(asdict(self), indent=1).encode())

    def __str__(self) -> str:
        commit = f", commit {self.commit[:COMMIT_DIGITS]}" if self.commit else ""
        return f"{self.name}{commit}, {self.precision}"


def models_folder() -> Path:
    """Return the folder of the cached bundles; it may not exist yet."""
    return cache_root() / "models"


def _names() -> Path:
    return models_folder() / "names"


def bundle_of(
    name: str, *, precision: str | None = None, image_size: int | None = None, log: Log, newest: bool = False
) -> Path:
    """Return the bundle that a name stands for: a folder, in the cache unless it is a bundle already.

    `name` is a bundle, a checkpoint folder, a .pth file, or `owner/name` or `owner/name@revision` on the Hugging Face
    Hub; an existing path has precedence. A checkpoint is converted once. A hub id that was converted before is not
    looked up again, unless `newest`: then the hub is asked for a newer commit. `precision` is fp32 by default, and
    `image_size` (px) the checkpoint's own. `log` gets one line for each step that takes time, and the commit.

    Raises CheckpointError if the checkpoint cannot be found or converted, UsageError if precision or image size differ
    from those of a bundle, OutputError if there is no space, and BackendError if others can write to the cache.
    """
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    path = Path(name)
    if (path / MANIFEST).is_file():
        _require_same(path, precision, image_size)
        return path
    is_local = path.exists()
    if not is_local and not is_hub_id(name):
        raise CheckpointError(
            f"{name} does not exist, and it is not an id on the Hugging Face Hub such as owner/name: pass a bundle, a "
            "checkpoint folder, a .pth file or an id"
        )
    label = os.path.realpath(path) if is_local else name
    wanted = Entry(label, precision or "fp32", image_size)
    known = _known(wanted)
    if is_local:
        found = replace(wanted, stamps=_stamps(checkpoint_files(path)))
    elif known is not None and not newest:
        found = known
    else:
        snapshot = fetch(name, log, lambda size: {models_folder(): _bundle_size(size, wanted.precision)})
        path, found = snapshot.folder, replace(wanted, commit=snapshot.commit)
        if newest and not snapshot.is_newest:
            log(f"note: the hub cannot be reached: newer commits of {name} were not looked for")
        elif known is not None and known.commit == found.commit:
            log(f"{name} is up to date")
    is_known = known is not None and (known.commit, known.stamps) == (found.commit, found.stamps)
    if known is None or not is_known or not (found.commit or found.stamps):
        known = _converted(path, found, log)
    with suppress(OSError):  # a read-only cache
        os.utime(known.path)
    log(f"model: {known} -> {known.folder}")
    return known.folder


def _require_same(bundle: Path, precision: str | None, image_size: int | None) -> None:
    """Raise UsageError if a bundle has another precision or image size than the options."""
    try:
        manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
        own_precision, own_size = manifest["precision"], manifest["image"]["height"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # Bundle.load reports it
    for flag, given, own in (("--precision", precision, own_precision), ("--image-size", image_size, own_size)):
        if given not in (None, own):
            raise UsageError(
                f"{flag} {given} is for checkpoints, but {bundle} is a bundle with {own}: remove {flag}, or pass the "
                "bundle's checkpoint"
            )


def _known(wanted: Entry) -> Entry | None:
    """Return the entry of a name if its bundle is there and was made with a graph set of this release."""
    if not _names().is_dir():
        return None
    from engine.checkpoints.graphs import known_versions  # only here, as in _converted

    require_private(models_folder(), REASON)
    require_private(_names(), REASON)
    known = Entry.read(wanted.path)
    if known is None or known.converter != CONVERTER or known.graphs not in known_versions(wanted.precision):
        return None
    if not _is_whole(known.folder):
        return None
    _check_private(known.folder, REASON)
    return known


def _is_whole(bundle: Path) -> bool:
    """Return whether a bundle has all files of its manifest; Bundle.load checks their content."""
    try:
        files = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {*files, MANIFEST} == {entry.name for entry in bundle.iterdir()}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checkpoint_files(checkpoint: Path) -> dict[str, Path]:
    """Return {name: path} of the files that decide the bundle of a checkpoint, which is a folder or one file."""
    if checkpoint.is_file():
        return {checkpoint.name: checkpoint}
    from engine.checkpoints.files import PICKLE_INDEX, SAFE_INDEX, weight_files  # only here, as in _converted

    try:
        weights = [path.name for path in weight_files(checkpoint)]
    except CheckpointError:  # the readers explain what is missing
        weights = []
    names = [*SETTINGS, SAFE_INDEX, PICKLE_INDEX, *weights]
    return {name: checkpoint / name for name in names if (checkpoint / name).is_file()}


def _stamps(files: Mapping[str, Path]) -> dict[str, Stamp]:
    """Return the stamps of files, or nothing if one has changed so recently that stamps could miss a second change."""
    stamps = {name: stamp_of(path.stat()) for name, path in files.items()}
    newest = max((max(times) for _, *times in stamps.values()), default=0)
    return stamps if time.time_ns() - newest > COARSE_NS else {}


def _converted(checkpoint: Path, entry: Entry, log: Log) -> Entry:
    """Convert a checkpoint, unless its bundle is in the cache under another name; write and return the entry."""
    # only here: captioning with a bundle, or with a checkpoint that is converted already, need not load the readers
    from engine.checkpoints.convert import convert
    from engine.checkpoints.graphs import find_graphs
    from engine.checkpoints.read import read_checkpoint

    files = checkpoint_files(checkpoint)
    before = [stamp_of(path.stat()) for path in files.values()]
    digests = FileDigests()  # the manifest has the digests of the weights as well
    opened = read_checkpoint(checkpoint, image_size=entry.image_size, sha256=digests)
    # before the weights are hashed: there may be no graphs for the checkpoint
    graphs = find_graphs(opened.family, opened.shape, entry.precision)
    entry = replace(entry, graphs=graphs.version)
    entry = replace(entry, key=_key(files, entry, opened.image.height, digests))
    hub = {"hub": entry.name, "commit": entry.commit} if entry.commit else {}

    def write(draft: Path) -> None:
        weights = sum(path.stat().st_size for path in opened.files)
        _remove_dead_drafts()
        require_space({models_folder(): _bundle_size(weights, entry.precision)}, entry.name)
        for note in opened.notes:
            log(f"note: {note}")
        log(f"converting {entry} ({megabytes(weights)} of weights)")
        convert(opened, graphs, draft, source=hub, log=log)
        if [stamp_of(path.stat()) for path in files.values()] != before:
            raise CheckpointError(f"{checkpoint} changed while it was converted: run the same command again")
        for path in (*draft.iterdir(), draft):
            _sync(path)

    kept(entry.folder, write, _is_whole, REASON)
    try:
        entry.write()
    except (OSError, OutputError) as error:  # a read-only cache; without the entry the next run only starts slower
        log(f"note: {error}")
    return entry


def _key(files: Mapping[str, Path], entry: Entry, image_size: int, sha256: Callable[[Path], str]) -> str:
    """Return the sha256 of all that decides a bundle."""
    try:
        parts = [f"{name}:{sha256(path)}" for name, path in sorted(files.items())]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    decisive = [*parts, f"{entry.precision} {image_size} {entry.graphs} {CONVERTER}"]
    return hashlib.sha256("\n".join(decisive).encode("utf-8", "surrogateescape")).hexdigest()


def _bundle_size(weights: int, precision: str) -> int:
    return int(weights * RELATIVE_SIZE[precision])


def _remove_dead_drafts() -> None:
    """Remove what killed conversions of other checkpoints have left: draft_folder only removes those of the same."""
    for draft in models_folder().glob(f"{UNFINISHED}-*"):
        key = draft.name.removeprefix(f"{UNFINISHED}-")[:64]
        with tried_lock(models_folder() / f"{key}.lock") as is_dead:
            if is_dead:  # else another process, or this one, is writing it
                shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    """Write a file or folder to the disk, so that after a power cut the renamed folder has its content."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # file systems that cannot, and folders on Windows
            raise
    finally:
        os.close(file)


def get_bundle(
    name: str, out: Path | None, *, precision: str | None = None, image_size: int | None = None, log: Log
) -> Bundle:
    """Fetch and convert the newest version of what `name` stands for, and check the bundle; see bundle_of.

    A damaged bundle in the cache is converted again. With `out` the bundle is copied there; it replaces a bundle and
    nothing else. Raises UsageError if something else is at `out`.
    """
    if out is not None and not is_replaceable(out):
        raise UsageError(f"{out} exists and is not a bundle, or holds other files as well: choose another --out")
    model = ModelRef((name,), precision=precision, image_size=image_size)
    (place,) = model.located(log, newest=True).locations
    try:
        bundle = open_bundle(place)
    except BundleError as error:
        if not isinstance(place, Path) or place.parent != models_folder():
            raise
        log(f"note: {error}: it is converted again")
        _discard(place)
        bundle = model.located(log).open()
    if out is None or (out.exists() and out.samefile(bundle.path)):
        return bundle
    require_space({out.parent: sum(path.stat().st_size for path in bundle.path.iterdir())}, str(out))
    with bundle_drafts(out, log) as drafts:
        move_bundle(Path(shutil.copytree(bundle.path, drafts / "bundle")), out)
    return Bundle.load(out)


class CachedBundle(NamedTuple):
    """A bundle in the cache, by one of its names.

    `entry` is None if no name stands for it, because its checkpoint has changed since. `last_use` is in s since 1970.
    """

    key: str
    entry: Entry | None
    bytes: int
    last_use: float


def cached_bundles() -> list[CachedBundle]:
    """Return the bundles in the cache, by name, and then those that no name stands for."""
    folder = models_folder()
    if not folder.is_dir():
        return []
    require_private(folder, REASON)
    sizes = {
        path.name: sum(file.stat().st_size for file in path.iterdir())
        for path in sorted(folder.iterdir())
        if KEY.fullmatch(path.name) and path.is_dir()
    }
    entries = sorted((entry for entry in _entries() if entry.key in sizes), key=str)
    named = [CachedBundle(entry.key, entry, sizes[entry.key], entry.path.stat().st_mtime) for entry in entries]
    unnamed = sizes.keys() - {entry.key for entry in entries}
    return named + [CachedBundle(key, None, sizes[key], (folder / key).stat().st_mtime) for key in sorted(unnamed)]


def _entries() -> list[Entry]:
    paths = sorted(_names().glob("*.json")) if _names().is_dir() else []
    return [entry for path in paths if (entry := Entry.read(path)) is not None and entry.path == path]


def remove_cached(name: str) -> list[CachedBundle]:
    """Remove the bundles of a name in all precisions, or the one whose key starts with `name`; return them.

    A bundle that another name also stands for stays, and only the name is removed. A process that has opened a bundle
    keeps working on Linux. Raises UsageError if nothing in the cache has this name.
    """
    is_key = len(name) >= FEWEST_DIGITS and re.fullmatch(r"[0-9a-f]+", name) is not None
    names = {name, os.path.realpath(name)}
    cached = cached_bundles()
    removed = [
        one
        for one in cached
        if (one.entry is not None and one.entry.name in names) or (is_key and one.key.startswith(name))
    ]
    if not removed:
        raise UsageError(f"the cache has no model {name}: `engine models` lists what it has")
    with _writing(models_folder()):
        for one in removed:
            if one.entry is not None:
                one.entry.path.unlink(missing_ok=True)
        still_named = {entry.key for entry in _entries()}
        for key in {one.key for one in removed} - still_named:
            _discard(models_folder() / key)
    return removed


def _discard(folder: Path) -> None:
    """Remove a cached bundle at once: under its name it is there as a whole or not at all."""
    with waiting_lock(folder.with_name(f"{folder.name}.lock")):  # not while another process writes it
        dead = folder.with_name(f"{UNFINISHED}-{folder.name}-removed{os.getpid()}")
        if folder.exists():
            folder.rename(dead)
            shutil.rmtree(dead, ignore_errors=True)


@dataclass(frozen=True)
class ModelRef:
    """Names what becomes the bundles of a run: checkpoints that are converted first, see bundle_of; or bundles.

    Several are averaged with `weights`, as in BundleRef. A URI, and a Path that does not exist, names a bundle.
    `task` as in BundleRef.
    """

    names: tuple[str | Location, ...]
    weights: tuple[float, ...] = ()
    precision: str | None = None
    image_size: int | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        BundleRef(tuple(Path(str(name)) for name in self.names), self.weights)  # raises UsageError
        if not self.names and (self.precision, self.image_size) != (None, None):
            raise UsageError("precision and image size convert a checkpoint: name one, or leave them out")

    def __str__(self) -> str:
        return " + ".join(map(str, self.names))

    def folders(self) -> list[Path]:
        """Return the local folders that are bundles already."""
        return [Path(name) for name in self.names if isinstance(name, str | Path) and (Path(name) / MANIFEST).is_file()]

    def located(self, log: Log, *, newest: bool = False) -> BundleRef:
        """Convert what is not converted yet, and return the bundles; `newest` as in bundle_of."""
        return BundleRef(tuple(self._located(name, log, newest) for name in self.names), self.weights, self.task)

    def _located(self, name: str | Location, log: Log, newest: bool) -> Location:
        is_uri = isinstance(name, str) and "://" in name
        if not is_uri and (isinstance(name, str) or (isinstance(name, Path) and name.exists())):
            return bundle_of(str(name), precision=self.precision, image_size=self.image_size, log=log, newest=newest)
        if (self.precision, self.image_size) != (None, None):
            raise UsageError(f"precision and image size convert a checkpoint, but {name} is a bundle: leave them out")
        return location(name) if isinstance(name, str) else name

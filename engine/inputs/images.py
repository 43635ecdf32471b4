"""Find the images of a directory, or at a URI; knows nothing of pixels and models."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from engine.errors import DataError, UsageError
from engine.inputs import dicom
from engine.inputs.columns import USUAL, Columns
from engine.inputs.ids import Ids, join_some
from engine.inputs.kinds import (
    DECODED,
    DICOM,
    HEAD_BYTES,
    HEIC,
    LITTER,
    NEVER,
    SUFFIXES,
    count_kinds,
    cut_suffix,
    kind_of,
)
from engine.inputs.pixels import CLIP, open_file
from engine.inputs.readers import read_ids
from engine.inputs.remote import Location, RemoteFile, RemoteFolder


@dataclass(frozen=True)
class ImageFile:
    """One input: its id (the file name without a picture's suffix), its path, and which frame of a DICOM file is meant.

    With `folder`, a URI, `path` is the path inside it. `depth` is how more than 8 bits a channel are read (depth.py).
    `root` is the folder that ids by path are relative to; its own folder when None.
    """

    id: str
    path: Path
    frame: int = 0
    folder: RemoteFolder | None = None
    depth: str = CLIP
    root: Path | None = None

    @property
    def source(self) -> Path | RemoteFile:
        """Where its bytes are."""
        return self.path if self.folder is None else RemoteFile(self.folder, self.path.as_posix())

    @property
    def inside(self) -> Path:
        """Its path relative to its root; where it lies elsewhere, its whole path without the `/` it begins with."""
        return self.path if self.folder is not None else path_inside(self.path, self.root)


@dataclass(frozen=True)
class FoundImages:
    """The images of a directory in the order of their names, the names of what was skipped, those among them that are
    DICOM files without an image, and whether any image is DICOM.
    """

    images: list[ImageFile]
    ignored: list[str]
    has_dicom: bool = False
    imageless: frozenset[str] = frozenset()


IMAGELESS = "DICOM without an image"
HAS_PYDICOM = find_spec("pydicom") is not None
"""Whether the extra `dicom` is installed; without it every DICOM file counts as an image, and the run stops at once."""


class RepeatedIdError(UsageError):
    """Two images share an id: their names alone do not tell them apart."""


def find_images(
    directory: Location, *, recursive: bool = False, dicom_frame: int = 0, ids: str = "stem", depth: str = CLIP
) -> FoundImages:
    """List the images directly inside `directory`, sorted by file name: by suffix, here also by their first bytes.

    With `recursive`, those of its folders too, sorted by their path inside `directory`; links to folders are not
    followed. An id is the file's name without suffix, with `ids="path"` its path inside `directory` without suffix, and
    with `ids="file"` that path with suffix.
    Raises UsageError when there is no such directory or no image in it, RepeatedIdError when two images share an id,
    and EngineError when there are DICOM files and nothing to read them.
    """
    found = images_in(directory, recursive=recursive, dicom_frame=dicom_frame, ids=ids, depth=depth)
    refuse_repeated(found.images, f"{directory} holds", ids)
    if found.has_dicom:
        dicom.require_pydicom()
    return found


def images_in(
    directory: Location,
    *,
    recursive: bool = False,
    dicom_frame: int = 0,
    ids: str = "stem",
    depth: str = CLIP,
    root: Path | None = None,
) -> FoundImages:
    """Return the images of one directory, see find_images, before anything is said of their ids.

    With `root`, ids by path are relative to that folder.
    """
    imageless: frozenset[str] = frozenset()
    if isinstance(directory, RemoteFolder):
        names, taken = _names_at(directory, recursive)
        images = [ImageFile(id_of(Path(n), ids), Path(n), dicom_frame, directory, depth) for n in taken]
        kinds = {_kind_by_suffix(Path(n).suffix.lower()) for n in taken}
    else:
        if not directory.is_dir():
            raise UsageError(f"{directory} is not a directory: give the folder that holds the images")
        names = sorted(_names_below(directory) if recursive else os.listdir(directory))
        kind_of_taken = {n: kind for n in names if (kind := kind_taken(directory / n)) is not None}
        imageless = frozenset(n for n, kind in kind_of_taken.items() if kind == IMAGELESS)
        taken = [n for n in kind_of_taken if n not in imageless]
        kinds = set(kind_of_taken.values())
        root = directory if root is None else root
        images = [local_image(directory / n, root, dicom_frame=dicom_frame, ids=ids, depth=depth) for n in taken]
    ignored = sorted(set(names) - set(taken))
    if not images:
        hint = "" if recursive else "; --recursive looks into its folders"
        there = f", but {describe_ignored(ignored, imageless)}" if ignored else ""
        raise UsageError(f"{directory} holds no images{there}{hint}")
    return FoundImages(images, ignored, "DICOM" in kinds, imageless)


def local_image(path: Path, root: Path, *, dicom_frame: int = 0, ids: str = "stem", depth: str = CLIP) -> ImageFile:
    """Return the image at a path, with the id that it has by `ids`."""
    return ImageFile(id_of(Path(utf8(str(path_inside(path, root)))), ids), path, dicom_frame, depth=depth, root=root)


def utf8(name: str) -> str:
    """Return a name of the file system read as UTF-8, which all our files are, whatever encoding the locale gives.

    Under a Latin-1 locale Python reads the bytes of `café.png` as `cafÃ©.png`. Bytes that are not UTF-8 stay what they
    are.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return name
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def path_inside(path: Path, root: Path | None) -> Path:
    """Return ImageFile.inside of a path."""
    if root is None:
        return Path(path.name)
    if path.is_relative_to(root) and ".." not in path.parts:
        return path.relative_to(root)
    whole, above = Path(os.path.abspath(path)), Path(os.path.abspath(root))  # noqa: PTH100 (resolve follows links)
    return whole.relative_to(above) if whole.is_relative_to(above) else whole.relative_to(whole.anchor)


def id_of(inside: Path, ids: str) -> str:
    """Return the id of an image by its path inside its root."""
    return inside.as_posix() if ids == "file" else cut_suffix(inside.as_posix() if ids == "path" else inside.name)


REMEDIES = {"path": "; --ids path makes ids of paths", "file": "; --ids file makes ids of paths with suffix"}


def refuse_repeated(images: Sequence[ImageFile], holds: str, ids: str, *, whole_paths: bool = False) -> None:
    """Raise RepeatedIdError where two images share an id; `holds` says who has them, `ids` how ids were made.

    The two are shown by their paths inside their root, or with `whole_paths` as they were found. The message names
    other `ids` that distinguish all images.
    """
    by_id: dict[str, ImageFile] = {}
    for image in images:
        if (other := by_id.setdefault(image.id, image)) is not image:
            first, second = ((i.source if whole_paths else i.inside) for i in (other, image))
            finer = [
                how for how in REMEDIES if how != ids and len({id_of(i.inside, how) for i in images}) == len(images)
            ]
            hint = REMEDIES[finer[0]] if finer else "; ids are paths relative to each --input: name their folder once"
            raise RepeatedIdError(f"{holds} two images with the id {image.id!r}: {first} and {second}{hint}")


def find_images_of(
    ids: Iterable[str], directory: Location, *, recursive: bool = False, dicom_frame: int = 0, depth: str = CLIP
) -> dict[str, ImageFile]:
    """Return the images of these ids, by id: the reverse of find_images. Ids with a `/` were made of paths."""
    wanted = list(ids)
    find = partial(find_images, directory, recursive=recursive, dicom_frame=dicom_frame, depth=depth)
    try:
        found = find(ids="path" if any("/" in name for name in wanted) else "stem")
    except RepeatedIdError:
        if not any(cut_suffix(name) != name for name in wanted):
            raise
        found = find(ids="file")
    by_id = {image.id: image for image in found.images}
    return {name: by_id[one] for name, one in Ids(by_id).find_all(dict.fromkeys(wanted), "the run").items()}


def describe_ignored(names: list[str], imageless: Collection[str] = ()) -> str:
    """Return what was skipped, by kind and count, with a remedy where there is one.

    Those of the names that are `imageless` are DICOM files without an image.
    """
    others = [name for name in names if name not in imageless]
    count = len(names) - len(others)
    files = "1 DICOM file without an image" if count == 1 else f"{count} DICOM files without an image"
    return ", ".join(filter(None, [count_kinds(others), files if count else ""])) + remedy_for(others)


def remedy_for(names: Iterable[str]) -> str:
    """Return in words what makes files readable that are not, where that is known."""
    heic = any(Path(name).suffix.lower() in HEIC - SUFFIXES for name in names)
    return " (HEIC needs the extra [heic], or convert it to JPEG)" if heic else ""


def _names_at(folder: RemoteFolder, recursive: bool) -> tuple[list[str], list[str]]:
    """Return the names of everything in a remote folder, and of those taken for images, both sorted."""
    found = folder.list(recursive=recursive)
    if recursive:  # hidden folders are not entered, and the others are no entries of their own
        found = {name: stamp for name, stamp in found.items() if stamp and not is_hidden(Path(name).parent)}
    taken = [n for n, stamp in found.items() if stamp and Path(n).suffix.lower() in SUFFIXES]
    return sorted(found), sorted(n for n in taken if not Path(n).name.startswith("."))


def is_hidden(path: Path) -> bool:
    """Return whether a part of a path is hidden, or a folder that file servers and archives leave behind."""
    return any(part.startswith(".") or part.lower() in LITTER for part in path.parts)


def _names_below(directory: Path) -> list[str]:
    """Return everything below a directory by its path inside: files, and folders that are not entered."""
    names: list[str] = []
    for folder, folders, files in os.walk(directory, onerror=_raise):
        entered = [name for name in folders if not is_hidden(Path(name)) and not Path(folder, name).is_symlink()]
        left = set(folders) - set(entered)
        names += [os.path.relpath(os.path.join(folder, name), directory) for name in (*files, *left)]  # noqa: PTH118
        folders[:] = entered
    return names


def _raise(error: OSError) -> NoReturn:
    raise error


def kind_taken(path: Path) -> str | None:
    """Return the kind of an entry that is taken for an image: a file or link, not hidden, by suffix or first bytes.

    IMAGELESS for a DICOM file that holds no image, which is skipped.
    """
    suffix = path.suffix.lower()
    if path.name.startswith(".") or suffix in NEVER | HEIC - SUFFIXES:
        return None
    mode = os.lstat(path).st_mode
    if suffix in SUFFIXES:  # a link is taken whatever it leads to: reading it will tell
        kind = _kind_by_suffix(suffix) if stat.S_ISREG(mode) or stat.S_ISLNK(mode) else None
    else:
        kind = _kind(path) if stat.S_ISREG(mode) else None
    if kind == "DICOM" and HAS_PYDICOM and _is_imageless(path):
        return IMAGELESS
    return kind if kind == "picture" or kind in DECODED else None


def _is_imageless(path: Path) -> bool:
    try:
        with open_file(path) as stream:
            return kind_of(stream.read(HEAD_BYTES)) == "DICOM" and not (stream.seek(0) or dicom.holds_image(stream))
    except (OSError, ValueError):  # reading it will tell
        return False


def kind_named(path: Path) -> str | None:
    """Return the kind of a file that is named as a picture: by suffix or first bytes, None for anything else.

    Hidden files and links count, too; what is or leads to a folder, a pipe or a device is never opened.
    """
    suffix = path.suffix.lower()
    mode = os.lstat(path).st_mode
    if suffix in SUFFIXES:  # a link is taken whatever it leads to: reading it will tell
        return _kind_by_suffix(suffix) if stat.S_ISREG(mode) or stat.S_ISLNK(mode) else None
    kind = _kind(path) if path.is_file() else None
    return kind if kind in DECODED else None


def _kind_by_suffix(suffix: str) -> str:
    return "DICOM" if suffix in DICOM else "picture"


def _kind(path: Path) -> str | None:
    try:
        with open_file(path) as stream:
            return kind_of(stream.read(HEAD_BYTES))
    except (OSError, ValueError):
        return None


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by suffix, else by its first bytes."""
    suffix = path.suffix.lower()
    return suffix in DICOM or (suffix not in SUFFIXES and _kind(path) == "DICOM")


def order_by_manifest(images: Iterable[ImageFile], manifest: Path, columns: Columns = USUAL) -> list[ImageFile]:
    """Return the images named in a manifest, in its order; raise DataError listing the ids without an image.

    A manifest is a text file with one id a line, or a table with a column of ids, separated by commas, TABs or `|`.
    """
    ids = read_ids(manifest, columns, whole=True)
    by_id = {image.id: image for image in images}
    known = Ids(by_id)
    found = known.find_all(ids, manifest)
    missing = [name for name in ids if name not in found]
    if missing:
        hint = known.hint(missing[0])
        raise DataError(f"{manifest} lists {len(missing)} ids without an image: {join_some(missing)}{hint}")
    return [by_id[found[name]] for name in ids]

"""Find the images of a local directory or at a URI. This module does not read pixels."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.errors import DataError, UsageError, counted
from engine.inputs import dicom, kinds
from engine.inputs.columns import USUAL, Columns
from engine.inputs.ids import Ids, join_some
from engine.inputs.readers import read_ids
from engine.inputs.remote import Location, RemoteFile, RemoteFolder
from engine.options import CLIP


@dataclass(frozen=True)
class ImageFile:
    """One input image: its id (by default the file name without suffix), its path, and the frame of a DICOM file.

    If `folder` is given, a folder at a URI, `path` is relative to it. `depth` says how images with more than 8 bits per
    channel are read (see pixels.to_bytes). `root` is the folder to which ids by path are relative; None stands for the
    image's own folder.
    """

    id: str
    path: Path
    frame: int = 0
    folder: RemoteFolder | None = None
    depth: str = CLIP
    root: Path | None = None

    @property
    def source(self) -> Path | RemoteFile:
        """The file to read: a local path, or a file at a URI."""
        return self.path if self.folder is None else RemoteFile(self.folder, self.path.as_posix())

    @property
    def inside(self) -> Path:
        """The path relative to `root`, or the whole path without its leading `/` if the image is not below `root`."""
        return self.path if self.folder is not None else path_inside(self.path, self.root)


@dataclass(frozen=True)
class FoundImages:
    """The images of a directory in the order of their names, and the names of skipped entries.

    `imageless` are the skipped DICOM files without an image. `has_dicom` is true if at least one image is DICOM.
    """

    images: list[ImageFile]
    ignored: list[str]
    has_dicom: bool = False
    imageless: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FindOptions:
    """How to look for images, and how to read them.

    recursive    whether to look into subfolders; links to folders are not followed
    dicom_frame  frame of a DICOM file to read, counted from 0
    ids          "stem": the file name without suffix, "path": the path inside the directory without suffix, "file":
                 that path with suffix. For `ct/s1/0001.png` these are `0001`, `ct/s1/0001` and `ct/s1/0001.png`.
    depth        how images with more than 8 bits per channel are read, see pixels.to_bytes
    """

    recursive: bool = False
    dicom_frame: int = 0
    ids: str = "stem"
    depth: str = CLIP


DEFAULTS = FindOptions()
IMAGELESS = "DICOM without an image"
HAS_PYDICOM = find_spec("pydicom") is not None
"""Whether the extra `dicom` is installed. Without it every DICOM file counts as an image, and the run stops at once."""


class NoImagesError(UsageError):
    """A folder holds no images."""


class RepeatedIdError(UsageError):
    """Two images have the same id."""


def find_images(directory: Location, options: FindOptions = DEFAULTS, **changes: Any) -> FoundImages:
    """List the images of `directory`, sorted by their path inside it. `changes` override fields of `options`.

    Images are recognised by their suffix, and in local directories also by their first bytes.

    Raises UsageError if the directory does not exist or holds no image, RepeatedIdError if two images have the same id,
    and EngineError if there are DICOM files and pydicom is missing.
    """
    options = replace(options, **changes)
    found = images_in(directory, options)
    refuse_repeated(found.images, f"{directory} holds", options.ids)
    if found.has_dicom:
        dicom.require_pydicom()
    return found


def images_in(directory: Location, options: FindOptions, root: Path | None = None) -> FoundImages:
    """Return the images of one directory like find_images, but do not check their ids or require pydicom.

    If `root` is given, ids by path are relative to that folder.
    """
    imageless: frozenset[str] = frozenset()
    if isinstance(directory, RemoteFolder):
        names, taken = _names_at(directory, options.recursive)
        images = [
            ImageFile(
                id_of(Path(directory.shown(n)), options.ids), Path(n), options.dicom_frame, directory, options.depth
            )
            for n in taken
        ]
        found = {kinds.kind_by_suffix(Path(n).suffix.lower()) for n in taken}
    else:
        if not directory.is_dir():
            raise UsageError(f"{directory} is not a directory: give the folder that holds the images")
        names = sorted(_names_below(directory) if options.recursive else os.listdir(directory))
        kind_of_taken = {n: kind for n in names if (kind := kind_taken(directory / n)) is not None}
        imageless = frozenset(n for n, kind in kind_of_taken.items() if kind == IMAGELESS)
        taken = [n for n in kind_of_taken if n not in imageless]
        found = set(kind_of_taken.values())
        images = [local_image(directory / n, directory if root is None else root, options) for n in taken]
    ignored = sorted(_with_slash(n, directory) for n in set(names) - set(taken))
    if not images:
        has_folders = any(name.endswith("/") for name in ignored)
        hint = "; --recursive looks into its folders" if has_folders and not options.recursive else ""
        skipped = f", but {describe_ignored(ignored, imageless)}" if ignored else ""
        raise NoImagesError(f"{directory} holds no images{skipped}{hint}")
    return FoundImages(images, ignored, "DICOM" in found, imageless)


def _with_slash(name: str, directory: Location) -> str:
    """Return the name of a skipped entry; that of a folder ends with a slash, so that messages count it as one."""
    return f"{name}/" if not isinstance(directory, RemoteFolder) and (directory / name).is_dir() else name


def local_image(path: Path, root: Path, options: FindOptions) -> ImageFile:
    """Return the ImageFile of a path; ids by path are relative to `root`."""
    inside = Path(utf8(str(path_inside(path, root))))
    return ImageFile(id_of(inside, options.ids), path, options.dicom_frame, depth=options.depth, root=root)


def utf8(name: str) -> str:
    """Decode a file name as UTF-8, independent of the locale's encoding. All output files are UTF-8.

    Under a Latin-1 locale Python reads the bytes of `café.png` as `cafÃ©.png`. Bytes that are not UTF-8 are kept
    (surrogateescape).
    """
    if sys.getfilesystemencoding() == "utf-8":
        return name
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def path_inside(path: Path, root: Path | None) -> Path:
    """Return a path relative to `root`; see ImageFile.inside."""
    if root is None:
        return Path(path.name)
    if path.is_relative_to(root) and ".." not in path.parts:
        return path.relative_to(root)
    whole, above = Path(os.path.abspath(path)), Path(os.path.abspath(root))  # noqa: PTH100 (resolve follows links)
    return whole.relative_to(above) if whole.is_relative_to(above) else whole.relative_to(whole.anchor)


def id_of(inside: Path, ids: str) -> str:
    """Return the id of an image by its path inside its root."""
    return inside.as_posix() if ids == "file" else kinds.cut_suffix(inside.as_posix() if ids == "path" else inside.name)


REMEDIES = {"path": "; --ids path makes ids of paths", "file": "; --ids file makes ids of paths with suffix"}


def refuse_repeated(images: Sequence[ImageFile], holds: str, ids: str, *, whole_paths: bool = False) -> None:
    """Raise RepeatedIdError if two images have the same id.

    `holds` begins the message, as in "/data/images holds", and `ids` is the kind of ids that was used. The message
    shows the two paths, relative to their root or with `whole_paths` in full, and suggests a kind of ids that
    distinguishes all images.
    """
    by_id: dict[str, ImageFile] = {}
    for image in images:
        if (earlier := by_id.setdefault(image.id, image)) is not image:
            first, second = ((i.source if whole_paths else i.inside) for i in (earlier, image))
            finer = [
                how for how in REMEDIES if how != ids and len({id_of(i.inside, how) for i in images}) == len(images)
            ]
            hint = (
                REMEDIES[finer[0]]
                if finer
                else "; ids are paths relative to each --input: give their common folder as one --input"
            )
            raise RepeatedIdError(f"{holds} two images with the id {image.id!r}: {first} and {second}{hint}")


def find_images_of(
    ids: Iterable[str], directory: Location, options: FindOptions = DEFAULTS, **changes: Any
) -> dict[str, ImageFile]:
    """Return {id: image} for the given ids, the reverse of find_images. Ids with a `/` were made from paths."""
    wanted = list(ids)
    options = replace(options, **changes)
    try:
        images = find_images(directory, options, ids="path" if any("/" in name for name in wanted) else "stem").images
    except RepeatedIdError:
        if not any(kinds.cut_suffix(name) != name for name in wanted):
            raise
        images = find_images(directory, options, ids="file").images
    by_id = {image.id: image for image in images}
    return {name: by_id[match] for name, match in Ids(by_id).find_all(dict.fromkeys(wanted), "the run").items()}


def describe_ignored(names: list[str], imageless: Collection[str] = ()) -> str:
    """Return a phrase for skipped files: the number of each kind, and a remedy if there is one.

    `imageless` are those of the names that are DICOM files without an image. Example: `3 .heic, 1 .txt`.
    """
    others = [name for name in names if name not in imageless]
    count = len(names) - len(others)
    files = "1 DICOM file without an image" if count == 1 else f"{count} DICOM files without an image"
    return ", ".join(filter(None, [kinds.count_kinds(others), files if count else ""])) + remedy_for(others)


def remedy_for(names: Iterable[str]) -> str:
    """Return a hint on how to make unreadable files readable, or an empty string."""
    heic = any(Path(name).suffix.lower() in kinds.HEIC - kinds.SUFFIXES for name in names)
    return " (HEIC needs the extra [heic], or convert it to JPEG)" if heic else ""


def _names_at(folder: RemoteFolder, recursive: bool) -> tuple[list[str], list[str]]:
    """Return the names of all entries of a remote folder and the names of its images, both sorted."""
    entries = folder.list(recursive=recursive)
    if recursive:  # files in hidden folders are ignored, and folders do not count as entries
        entries = {name: stamp for name, stamp in entries.items() if stamp and not is_hidden(Path(name).parent)}
    taken = [n for n, stamp in entries.items() if stamp and Path(n).suffix.lower() in kinds.SUFFIXES]
    return sorted(entries), sorted(n for n in taken if not Path(n).name.startswith("."))


def is_hidden(path: Path) -> bool:
    """Return whether a part of a path is hidden or in LITTER."""
    return any(part.startswith(".") or part.lower() in kinds.LITTER for part in path.parts)


def _names_below(directory: Path) -> list[str]:
    """Return the paths of all files below a directory, relative to it, and of the folders that are not entered."""
    names: list[str] = []
    for folder, folders, files in os.walk(directory, onerror=_raise):
        entered = [name for name in folders if not is_hidden(Path(name)) and not Path(folder, name).is_symlink()]
        not_entered = set(folders) - set(entered)
        names += [os.path.relpath(os.path.join(folder, name), directory) for name in (*files, *not_entered)]  # noqa: PTH118
        folders[:] = entered
    return names


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder that was deleted since its parent was listed
        raise error


def kind_taken(path: Path) -> str | None:
    """Return the kind of a directory entry that counts as an image, or None if it is skipped.

    Hidden files, and links without an image suffix, are skipped. The kind is that of kinds.file_kind, or IMAGELESS for
    a DICOM file that holds no image, which callers skip.
    """
    if path.name.startswith(".") or path.suffix.lower() in kinds.NEVER | kinds.HEIC - kinds.SUFFIXES:
        return None
    try:
        kind = kinds.file_kind(path, follow=False)
    except FileNotFoundError:  # renamed or deleted since the folder was listed, as files of downloads are
        return None
    return IMAGELESS if kind == "DICOM" and HAS_PYDICOM and _is_imageless(path) else kind


def _is_imageless(path: Path) -> bool:
    try:
        with kinds.open_regular(path, kinds.MAX_FILE_BYTES) as stream:
            return kinds.kind_of(stream.read(kinds.HEAD_BYTES)) == "DICOM" and not (
                stream.seek(0) or dicom.holds_image(stream)
            )
    except (OSError, ValueError):  # reading the image later reports the error
        return False


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM, by its suffix or else by its first bytes."""
    suffix = path.suffix.lower()
    return suffix in kinds.DICOM or (suffix not in kinds.SUFFIXES and kinds.kind_of_content(path) == "DICOM")


def order_by_manifest(images: Iterable[ImageFile], manifest: Path, columns: Columns = USUAL) -> list[ImageFile]:
    """Return the images that a manifest lists, in its order.

    A manifest is a text file with one id per line, or a table with a column of ids, separated by commas, TABs or `|`.
    Raises DataError if an id has no image.
    """
    ids = read_ids(manifest, columns, whole=True)
    by_id = {image.id: image for image in images}
    known = Ids(by_id)
    matches = known.find_all(ids, manifest)
    missing = [name for name in ids if name not in matches]
    if missing:
        hint = known.hint(missing[0])
        raise DataError(f"{manifest} lists {counted(len(missing), 'id')} without an image: {join_some(missing)}{hint}")
    return [by_id[matches[name]] for name in ids]

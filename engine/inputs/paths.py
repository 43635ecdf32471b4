"""Find the images that `--input` names: folders, images, patterns, lists of paths, standard input.

This module does not read pixels.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from engine.errors import DataError, UsageError
from engine.inputs import dicom, kinds
from engine.inputs.ids import shown
from engine.inputs.images import (
    DEFAULTS,
    IMAGELESS,
    FindOptions,
    ImageFile,
    describe_ignored,
    find_images,
    images_in,
    is_hidden,
    kind_taken,
    local_image,
    refuse_repeated,
    remedy_for,
)
from engine.inputs.remote import Location, RemoteFolder

STDIN = Path("-")
"""The input that stands for a list of paths on standard input."""
LIST = ".txt"
"""Suffix, in lower case, of files that list paths."""
MOST_SHOWN = 300
"""Characters of a path that a message shows. A file that is not a list may have lines of any length."""


@dataclass
class FoundInputs:
    """The images of all inputs, in the order of the inputs, and what was skipped.

    `left_aside` holds the skipped names by input: paths inside the folder if a folder is the only input, else whole
    paths. `lists` are the lists of paths that were read. `imageless` are the skipped DICOM files without an image, and
    `has_dicom` is true if at least one image is DICOM.
    """

    options: FindOptions
    images: list[ImageFile] = field(default_factory=list)
    left_aside: dict[str, list[str]] = field(default_factory=dict)
    lists: list[Path] = field(default_factory=list)
    imageless: set[str] = field(default_factory=set)
    has_dicom: bool = False

    def add(self, location: Location) -> None:
        """Add the images of one --input."""
        if isinstance(location, RemoteFolder) or (location != STDIN and location.is_dir()):
            self._skip(str(location), self._add_folder(location, None))
        elif location == STDIN:
            self._add_list(_read_stdin(), Path(), "standard input", "the working directory")
        elif os.path.lexists(location):
            if location.suffix.lower() == LIST and location.is_file():
                self.lists.append(location)
                self._add_list(_read_list(location), location.parent, str(location), f"its folder {location.parent}")
            else:
                self._add_image(location, Path(), "")
        elif glob.has_magic(str(location)):
            self._add_pattern(location)
        else:
            raise UsageError(f"{location} does not exist: give a folder, an image, a pattern or a list of paths")

    def _add_image(self, path: Path, root: Path, where: str) -> None:
        kind = kinds.file_kind(path)
        if kind is None:
            error = DataError if where else UsageError
            raise error(f"{where}{path} is not a readable image{remedy_for([path.name])}{_instead(path)}")
        self._take(path, root, kind)

    def _take(self, path: Path, root: Path, kind: str) -> None:
        self.has_dicom |= kind == "DICOM"
        self.images.append(local_image(path, root, self.options))

    def _add_folder(self, location: Location, root: Path | None) -> list[str]:
        """Add the images of a folder and return what was skipped."""
        found = images_in(location, self.options, root)
        self.has_dicom |= found.has_dicom
        self.images.extend(found.images)
        self.imageless.update(f"{location}/{name}" for name in found.imageless)
        return [f"{location}/{name}" for name in found.ignored]

    def _skip(self, location: str, names: list[str]) -> None:
        if names:
            self.left_aside.setdefault(location, []).extend(names)

    def _add_pattern(self, pattern: Path) -> None:
        parts = pattern.parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        matches = sorted(set(_matches(root, parts[fixed:])))
        if not matches:
            raise UsageError(f"nothing matches {pattern}: check the folder and the quotes around the pattern")
        before, skipped = len(self.images), []
        for path in matches:
            if self.options.recursive and _is_own_folder(path):
                try:
                    skipped += self._add_folder(path, root)
                except UsageError:  # no image in it
                    skipped.append(str(path))
            elif (kind := kind_taken(path)) not in (None, IMAGELESS):
                self._take(path, root, kind)
            else:
                skipped.append(str(path))
                self.imageless.update([str(path)] if kind == IMAGELESS else [])
        if len(self.images) == before:
            hint = "" if self.options.recursive else "; --recursive looks into folders"
            raise UsageError(f"{pattern} matches no images, but {describe_ignored(skipped, self.imageless)}{hint}")
        self._skip(str(pattern), skipped)

    def _add_list(self, content: bytes, root: Path, where: str, relative_to: str) -> None:
        lines = list(_lines(content, where))
        if not lines:
            raise DataError(f"{where} lists no paths")
        missing = [(number, line) for number, line in lines if not os.path.lexists(root / line)]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            number, line = missing[0]
            raise DataError(
                f"{where}, line {number}: {shown(line[:MOST_SHOWN])} does not exist{more}: paths are relative to "
                f"{relative_to}"
            )
        for number, line in lines:
            path = root / line
            if path.is_dir():
                self._skip(str(path), self._add_folder(path, root))
            else:
                self._add_image(path, root, f"{where}, line {number}: ")


def find_inputs(locations: Sequence[Location], options: FindOptions = DEFAULTS, **changes: Any) -> FoundInputs:
    """Return the images of all inputs. `changes` override fields of `options`.

    An input may be:
    - a folder or a URI, which find_images lists
    - a `.txt` file with paths of images and folders, one per line or separated by NULs, relative to the file's folder
    - STDIN, which is such a list on standard input, relative to the working directory
    - a pattern with wildcards that does not exist as a path. It stands for the images that it matches and, with
      `recursive`, for the images in folders that it matches. Links to folders are not followed. Hidden names are
      matched only if that part of the pattern begins with a dot.
    - any other file, which must be an image

    Ids by path are relative to the folder of --input, to the part of a pattern before its wildcards, to the folder of a
    list, or else to the working directory.

    Raises UsageError if an input has no images, DataError if a list is not valid or has entries that cannot be read,
    RepeatedIdError if two images have the same id, and EngineError if there are DICOM files and pydicom is missing.
    """
    if not locations:
        raise UsageError("no input: give a folder, an image, a pattern or a list of paths")
    options = replace(options, **changes)
    if len(locations) == 1 and (isinstance(locations[0], RemoteFolder) or locations[0].is_dir()):
        found = find_images(locations[0], options)
        left_aside = {str(locations[0]): found.ignored} if found.ignored else {}
        return FoundInputs(options, found.images, left_aside, imageless=set(found.imageless))
    inputs = FoundInputs(options)
    for location in locations:
        inputs.add(location)
    _refuse_named_twice(inputs.images)
    refuse_repeated(inputs.images, "the inputs hold", options.ids, whole_paths=True)
    if inputs.has_dicom:
        dicom.require_pydicom()
    return inputs


def _instead(path: Path) -> str:
    """Return the end of a message about a file that is not an image: what its first bytes show it to be, if known."""
    try:
        with kinds.open_regular(path, kinds.MAX_FILE_BYTES) as stream:
            head = stream.read(kinds.HEAD_BYTES)
    except (OSError, ValueError):
        return ""
    what = (head and kinds.wrong_content(head)) or kinds.packed_content(head, path.suffix)
    return f": it is {what}" if what else ""


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the paths below a folder that a pattern matches, possibly repeated.

    A part of the pattern that exists literally, such as a folder `a[1]`, matches only that name.
    """
    first, *rest = parts
    if first == "**":
        yield from _matches(folder, rest or ["*"])
        for name in _names(folder):
            if not is_hidden(Path(name)) and _is_own_folder(folder / name):
                yield from _matches(folder / name, parts)
    elif not glob.has_magic(first) or os.path.lexists(folder / first):
        if rest and (folder / first).is_dir():
            yield from _matches(folder / first, rest)
        elif not rest and os.path.lexists(folder / first):
            yield folder / first
    else:
        for name in _names(folder):
            if fnmatchcase(name, first) and (first.startswith(".") or not name.startswith(".")):
                if not rest:
                    yield folder / name
                elif _is_own_folder(folder / name):
                    yield from _matches(folder / name, rest)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise UsageError("--input - reads paths from standard input, which is closed")
    content: bytes = sys.stdin.buffer.read()
    return content


def _read_list(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _lines(content: bytes, where: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, path) of a list, without empty lines. File names that are not UTF-8 keep their bytes.

    If the list contains NULs, they separate the paths, as in the output of `find -print0`. A list with a byte order
    mark is decoded.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError as error:
            raise DataError(
                f"{where} has a UTF-16 byte order mark but is not valid UTF-16: save it as UTF-8"
            ) from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    separator = b"\0" if b"\0" in content else b"\n"
    for number, line in enumerate(content.split(separator), 1):
        path = line if separator == b"\0" else line.removesuffix(b"\r")
        if path:
            yield number, os.fsdecode(path)


def _refuse_named_twice(images: Sequence[ImageFile]) -> None:
    """Raise UsageError if two inputs name the same file."""
    seen: set[str] = set()
    for image in images:
        location = os.path.abspath(image.path) if image.folder is None else str(image.source)  # noqa: PTH100
        if location in seen:
            raise UsageError(f"{image.source} is named twice by the inputs: remove one of them")
        seen.add(location)

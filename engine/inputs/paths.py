"""What `--input` names: folders, pictures, patterns, lists of paths, standard input; knows nothing of pixels."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from engine.errors import DataError, UsageError
from engine.inputs import dicom
from engine.inputs.ids import shown
from engine.inputs.images import (
    IMAGELESS,
    FoundImages,
    ImageFile,
    describe_ignored,
    find_images,
    images_in,
    is_hidden,
    kind_named,
    kind_taken,
    local_image,
    refuse_repeated,
    remedy_for,
)
from engine.inputs.kinds import HEAD_BYTES, open_regular, packed_content, wrong_content
from engine.inputs.pixels import CLIP, MAX_FILE_BYTES
from engine.inputs.remote import Location, RemoteFolder

STDIN = Path("-")
"""Among the inputs it stands for paths on standard input."""
LIST = ".txt"
"""Suffix, in lower case, of a file that lists paths."""
MOST_SHOWN = 300
"""Characters of a path that a message shows: a file that is no list has lines of any length."""


@dataclass(frozen=True)
class FoundInputs:
    """The images of all inputs in the order these are given; what was skipped, by input; the lists that were read;
    which of the skipped names are DICOM files without an image.

    What is skipped is named by its path inside a folder that is the only input, else by its path.
    """

    images: list[ImageFile] = field(default_factory=list)
    left_aside: dict[str, list[str]] = field(default_factory=dict)
    lists: list[Path] = field(default_factory=list)
    imageless: set[str] = field(default_factory=set)


def find_inputs(
    places: Sequence[Location], *, recursive: bool = False, dicom_frame: int = 0, ids: str = "stem", depth: str = CLIP
) -> FoundInputs:
    """Return the images of all that is named; a folder or URI is read as by find_images.

    A `.txt` file lists paths of pictures and folders, one a line or with NULs between them, relative to its own folder;
    STDIN gives such a list, relative to the working directory. What does not exist is a pattern: it stands for the
    pictures that it matches, with `recursive` for those in folders that it matches, too; links to folders are not
    followed and hidden names only matched by a part that begins with a dot. Any other file must be a picture.

    Ids by path are relative to the folder of --input, to a pattern's part without wildcards, to a list's folder, and
    else to the working directory. Raises UsageError for an input without images, DataError for a list that does not
    hold what it should, RepeatedIdError when two images share an id, EngineError without a reader for DICOM.
    """
    if not places:
        raise UsageError("there is no input: name a folder, a picture, a pattern or a list of paths")
    finder = _Finder(recursive, dicom_frame, ids, depth)
    if len(places) == 1 and (isinstance(places[0], RemoteFolder) or places[0].is_dir()):
        found = find_images(places[0], recursive=recursive, dicom_frame=dicom_frame, ids=ids, depth=depth)
        left_aside = {str(places[0]): found.ignored} if found.ignored else {}
        return FoundInputs(found.images, left_aside, imageless=set(found.imageless))
    for place in places:
        finder.add(place)
    _refuse_named_twice(finder.found.images)
    refuse_repeated(finder.found.images, "the inputs hold", ids, whole_paths=True)
    if finder.has_dicom:
        dicom.require_pydicom()
    return finder.found


def _instead(path: Path) -> str:
    """Return what a file is that is not an image, where its first bytes tell."""
    try:
        with open_regular(path, MAX_FILE_BYTES) as stream:
            head = stream.read(HEAD_BYTES)
    except (OSError, ValueError):
        return ""
    what = (head and wrong_content(head)) or packed_content(head, path.suffix)
    return f": it is {what}" if what else ""


class _Finder:
    """Collects the images of one input after the other."""

    def __init__(self, recursive: bool, dicom_frame: int, ids: str, depth: str) -> None:
        self.found = FoundInputs()
        self.has_dicom = False
        self._recursive, self._dicom_frame, self._ids, self._depth = recursive, dicom_frame, ids, depth

    def add(self, place: Location) -> None:
        """Add what one --input names."""
        if isinstance(place, RemoteFolder) or (place != STDIN and place.is_dir()):
            self._add_folder(place, None)
        elif place == STDIN:
            self._add_list(_read_stdin(), Path(), "standard input", "the working directory")
        elif os.path.lexists(place):
            if place.suffix.lower() == LIST and place.is_file():
                self.found.lists.append(place)
                self._add_list(_read_list(place), place.parent, str(place), f"its folder {place.parent}")
            else:
                self._add_picture(place, Path(), "")
        elif glob.has_magic(str(place)):
            self._add_pattern(place)
        else:
            raise UsageError(f"{place} is not a directory, a picture or a list of paths: nothing is there")

    def _add_picture(self, path: Path, root: Path, where: str) -> None:
        kind = kind_named(path)
        if kind is None:
            error = DataError if where else UsageError
            raise error(f"{where}{path} is no picture that can be read{remedy_for([path.name])}{_instead(path)}")
        self._take(path, root, kind)

    def _take(self, path: Path, root: Path, kind: str) -> None:
        self.has_dicom |= kind == "DICOM"
        image = local_image(path, root, dicom_frame=self._dicom_frame, ids=self._ids, depth=self._depth)
        self.found.images.append(image)

    def _add_folder(self, place: Location, root: Path | None) -> None:
        found = self._images_in(place, root)
        self.found.images.extend(found.images)
        self._leave_aside(str(place), [f"{place}/{name}" for name in found.ignored])

    def _images_in(self, place: Location, root: Path | None) -> FoundImages:
        found = images_in(
            place,
            recursive=self._recursive,
            dicom_frame=self._dicom_frame,
            ids=self._ids,
            depth=self._depth,
            root=root,
        )
        self.has_dicom |= found.has_dicom
        self.found.imageless.update(f"{place}/{name}" for name in found.imageless)
        return found

    def _leave_aside(self, place: str, names: list[str]) -> None:
        if names:
            self.found.left_aside.setdefault(place, []).extend(names)

    def _add_pattern(self, pattern: Path) -> None:
        parts = pattern.parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        matches = sorted(set(_matches(root, parts[fixed:])))
        if not matches:
            raise UsageError(f"nothing matches {pattern}: is the folder right, and the pattern quoted as it should be?")
        before, left = len(self.found.images), []
        for path in matches:
            if self._recursive and path.is_dir() and not path.is_symlink():
                left += self._add_below(path, root)
            elif (kind := kind_taken(path)) not in (None, IMAGELESS):
                self._take(path, root, kind)
            else:
                left.append(str(path))
                self.found.imageless.update([str(path)] if kind == IMAGELESS else [])
        if len(self.found.images) == before:
            hint = "" if self._recursive else "; --recursive looks into folders"
            raise UsageError(f"{pattern} matches no images, but {describe_ignored(left, self.found.imageless)}{hint}")
        self._leave_aside(str(pattern), left)

    def _add_below(self, folder: Path, root: Path) -> list[str]:
        """Add the images of a folder that a pattern matches, none perhaps; return what was left aside."""
        try:
            found = self._images_in(folder, root)
        except UsageError:
            return [str(folder)]
        self.found.images.extend(found.images)
        return [f"{folder}/{name}" for name in found.ignored]

    def _add_list(self, content: bytes, root: Path, where: str, relative_to: str) -> None:
        lines = list(_lines(content, where))
        if not lines:
            raise DataError(f"{where} lists no paths")
        missing = [(number, line) for number, line in lines if not os.path.lexists(root / line)]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            number, line = missing[0]
            raise DataError(
                f"{where}, line {number}: {shown(line[:MOST_SHOWN])} is not there{more}: paths are relative to "
                f"{relative_to}"
            )
        for number, line in lines:
            path = root / line
            if path.is_dir():
                self._add_folder(path, root)
            else:
                self._add_picture(path, root, f"{where}, line {number}: ")


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield what a pattern matches below a folder, some of it twice; a part that exists as it is written is itself."""
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
    """Yield the numbers and the paths of a list, without empty lines; file names that are not UTF-8 keep their bytes.

    A list with NULs has them between its paths, as `find -print0` writes it; one with a byte order mark is decoded.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError as error:
            raise DataError(f"{where} begins as UTF-16 and is not: save it as UTF-8") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    between = b"\0" if b"\0" in content else b"\n"
    for number, line in enumerate(content.split(between), 1):
        path = line if between == b"\0" else line.removesuffix(b"\r")
        if path:
            yield number, os.fsdecode(path)


def _refuse_named_twice(images: Sequence[ImageFile]) -> None:
    """Raise UsageError where two inputs name the same file."""
    seen: set[str] = set()
    for image in images:
        place = os.path.abspath(image.path) if image.folder is None else str(image.source)  # noqa: PTH100
        if place in seen:
            raise UsageError(f"{image.source} is named twice by the inputs: name it once")
        seen.add(place)

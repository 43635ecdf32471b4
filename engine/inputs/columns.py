"""Find the columns of a table that hold ids, captions and prompts, by their usual names or by names the user gives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import DataError, UsageError
from engine.inputs.kinds import cut_suffix

FILE_COLUMNS = (
    *("file_name", "filename", "image", "image_name", "image_path", "img_path", "image_file", "file_path", "filepath"),
    "image_index",
)
ID_COLUMNS = ("id", "image_id", *FILE_COLUMNS)
CAPTION_COLUMNS = ("caption", "captions", "text", "description", "comment", "prompt", "raw", "txt")
PROMPT = "prompt"
HEADER_WORDS = frozenset(
    re.findall(
        r"\w+",
        "id ids uid uuid imgid imageid image images img file files filename path filepath imagepath imgpath name "
        "key index study series subject patient dicom accession caption captions text texts report reports finding "
        "findings impression impressions sentence sentences description desc comment label labels title legend cui "
        "cuis concept concepts predicted prediction pred generated generation hypothesis candidate reference "
        "references target answer output split",
    )
)
"""Words of the headers of published tables. A first line that has only such words is a header, not a row of data."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that the user chose; None stands for the usual names.

    A chosen column is used in every table that has it. A run and its references often have different headers, so a
    table without the chosen column is read by the usual names. `require_found` reports a name that no table had.
    """

    id: str | None = None
    caption: str | None = None
    prompt: str | None = None
    _found: set[str] = field(default_factory=set, repr=False, compare=False)
    _headers: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)

    def place_of_id(self, names: Sequence[str], usual: Sequence[str] = ID_COLUMNS) -> int | None:
        """Return the index of the column that holds ids, or None if there is no such column."""
        return self._index("id", names, usual)

    def place_of_caption(self, names: Sequence[str], usual: Sequence[str] = CAPTION_COLUMNS) -> int | None:
        """Return the index of the column that holds captions, or None if there is no such column."""
        return self._index("caption", names, usual)

    def place_of_prompt(self, names: Sequence[str]) -> int | None:
        """Return the index of the column that holds prompts, or None if there is no such column."""
        return self._index("prompt", names, (PROMPT,))

    def _index(self, role: str, names: Sequence[str], usual: Iterable[str]) -> int | None:
        chosen: str | None = getattr(self, role)
        if chosen is not None:
            index = names.index(chosen) if chosen in names else find_column(names, (chosen,))
            if index is not None:
                self._found.add(role)
                return index
        return find_column(names, usual)

    def note(self, path: Path, names: Iterable[str]) -> None:
        """Store the columns of a table for the message of `require_found`."""
        if self is not USUAL and path not in self._headers:
            self._headers[path] = f"{path} has {', '.join(name for name in names if name)}"

    def require_found(self) -> None:
        """Raise UsageError for a chosen column that no table had."""
        for role in ("id", "caption", "prompt"):
            chosen: str | None = getattr(self, role)
            if chosen is not None and role not in self._found:
                headers = "; ".join(self._headers.values()) or "no table with a header was read"
                raise UsageError(f"--{role}-column {chosen}: no table has this column: {headers}")


USUAL = Columns()


def _bare(name: str) -> str:
    """Normalise a column's name, so that `Image ID`, `image_id` and `imageId` are the same."""
    return re.sub(r"[\s_-]+", "", name.strip().strip('"').lower())


def find_column(names: Iterable[str], wanted: Iterable[str]) -> int | None:
    """Return the index of the first of the `wanted` names that is among `names` in any spelling, or None."""
    bare = [_bare(name) for name in names]
    return next((bare.index(name) for name in map(_bare, wanted) if name in bare), None)


def holds_files(name: str) -> bool:
    """Return whether a column of this name holds file names."""
    return find_column((name,), FILE_COLUMNS) is not None


def is_header(cells: Sequence[str], others: Sequence[tuple[str, str]], columns: Columns = USUAL) -> bool:
    """Return whether the first line of a table looks like a header, even if its names are unknown.

    `others` holds (first cell, rest of the line) of further lines. A line is a header if it has only HEADER_WORDS, or
    has a known name, or has only words while all further lines begin with an image, or, if there are several, with a
    numbered id. The name of a captions' column is not enough if only one line follows and the first cell has a digit.
    """
    names = [cell.strip() for cell in cells if cell.strip()]
    if not names or not others or any(cut_suffix(name) != name for name in names):
        return False
    words = [re.findall(r"[a-z]+", name.lower()) for name in names]
    if not any(re.search(r"\d", name) for name in names) and all(cell and set(cell) <= HEADER_WORDS for cell in words):
        return True
    if len(names) < 2:
        return False
    if columns.place_of_id(names) is not None:
        return True
    # of two rows the first may be data, such as `r1,text`
    if columns.place_of_caption(names) is not None and (len(others) > 1 or not re.search(r"\d", names[0])):
        return True
    is_named = all(cut_suffix(first.strip()) != first.strip() for first, _ in others)
    is_numbered = len(others) > 1 and all(re.search(r"\d", first) and " " in rest.strip() for first, rest in others)
    return (is_named or is_numbered) and all(re.fullmatch(r"[A-Za-z_-]{2,}", name) for name in names)


def unknown_header(path: Path, names: Sequence[str], columns: Columns = USUAL, *, captions: bool = True) -> DataError:
    """Return the error for a table whose header lacks a required column."""
    lacks = ["ids"] if columns.place_of_id(names) is None else []
    lacks += ["captions"] if captions and columns.place_of_caption(names) is None else []
    only = f"only {', '.join(name for name in names if name)}"
    for role, chosen in (("id", columns.id), ("caption", columns.caption)):
        if chosen is not None and f"{role}s" in lacks:
            return DataError(f"--{role}-column {chosen}: {path} has no such column, {only}")
    options = " and ".join(f"--{role.removesuffix('s')}-column" for role in lacks)
    known = {"ids": ID_COLUMNS, "captions": CAPTION_COLUMNS}
    usual = "; ".join(f"known names for {role}: {', '.join(known[role])}" for role in lacks)
    return DataError(
        f"{path} has no known column of {' and '.join(lacks)}, {only}: give "
        f"{options} ({usual}); if the first line is a row of data, add the header ID,Caption"
    )

"""Which columns of a table hold ids, captions and prompts: by their usual names, or by names that the user gives."""

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
"""Words that headers are made of in published tables; a first line of such words alone is not a row of data."""


@dataclass(frozen=True)
class Columns:
    """Columns chosen by name, each used in every table that has it; None means the usual names.

    A run and its references often have different headers, so a table without a chosen column is read by the usual
    names. `require_found` then reports a name that no table had.
    """

    id: str | None = None
    caption: str | None = None
    prompt: str | None = None
    _found: set[str] = field(default_factory=set, repr=False, compare=False)
    _headers: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)

    def place_of_id(self, names: Sequence[str], usual: Sequence[str] = ID_COLUMNS) -> int | None:
        """Return which of the columns holds ids."""
        return self._place("id", names, usual)

    def place_of_caption(self, names: Sequence[str], usual: Sequence[str] = CAPTION_COLUMNS) -> int | None:
        """Return which of the columns holds captions."""
        return self._place("caption", names, usual)

    def place_of_prompt(self, names: Sequence[str]) -> int | None:
        """Return which of the columns holds prompts."""
        return self._place("prompt", names, (PROMPT,))

    def _place(self, role: str, names: Sequence[str], usual: Iterable[str]) -> int | None:
        chosen: str | None = getattr(self, role)
        if chosen is not None:
            place = find_column(names, (chosen,))
            place = names.index(chosen) if chosen in names else place
            if place is not None:
                self._found.add(role)
                return place
        return find_column(names, usual)

    def note(self, path: Path, names: Iterable[str]) -> None:
        """Remember the columns of a table for the message of `require_found`."""
        if self is not USUAL and path not in self._headers:
            self._headers[path] = f"{path} has {', '.join(name for name in names if name)}"

    def require_found(self) -> None:
        """Raise UsageError for a chosen column that no table had."""
        for role in ("id", "caption", "prompt"):
            chosen: str | None = getattr(self, role)
            if chosen is not None and role not in self._found:
                there = "; ".join(self._headers.values()) or "no table with a header was read"
                raise UsageError(f"--{role}-column {chosen}: there is no such column: {there}")


USUAL = Columns()
ID_HELP = "Column of ids or file names in the tables that are read; by its usual names when absent."
CAPTION_HELP = "Column of captions in the tables that are read; by its usual names when absent."
PROMPT_HELP = "Column of prompts in the tables that are read; `prompt` when absent."


def _bare(name: str) -> str:
    """Return a column's name without what people write differently: `Image ID`, `image_id` and `imageId` are one."""
    return re.sub(r"[\s_-]+", "", name.strip().strip('"').lower())


def find_column(names: Iterable[str], wanted: Iterable[str]) -> int | None:
    """Return the place of the first of the `wanted` names that there is, by any spelling."""
    bare = [_bare(name) for name in names]
    return next((bare.index(one) for one in map(_bare, wanted) if one in bare), None)


def holds_files(name: str) -> bool:
    """Return whether a column of this name holds file names."""
    return find_column((name,), FILE_COLUMNS) is not None


def is_header(cells: Sequence[str], others: Sequence[tuple[str, str]], columns: Columns = USUAL) -> bool:
    """Return whether the first line of a table is a header of unknown names rather than a row of data.

    `others` are the first cell and the rest of further lines. A header is made of HEADER_WORDS, or has a known name, or
    is a line of bare words before lines that all begin with an image or a numbered id.
    """
    names = [cell.strip() for cell in cells if cell.strip()]
    if not names or not others or any(cut_suffix(name) != name for name in names):
        return False
    words = [re.findall(r"[a-z]+", name.lower()) for name in names]
    if not any(re.search(r"\d", name) for name in names) and all(one and set(one) <= HEADER_WORDS for one in words):
        return True
    if len(names) < 2 or len(others) < 2:
        return len(names) > 1 and columns.place_of_id(names) is not None
    if columns.place_of_id(names) is not None or columns.place_of_caption(names) is not None:
        return True
    is_named = all(cut_suffix(first.strip()) != first.strip() for first, _ in others)
    is_numbered = all(re.search(r"\d", first) and " " in rest.strip() for first, rest in others)
    return (is_named or is_numbered) and all(re.fullmatch(r"[A-Za-z_-]{2,}", name) for name in names)


def unknown_header(path: Path, names: Sequence[str], columns: Columns = USUAL, *, captions: bool = True) -> DataError:
    """Return the error of a table whose header does not name the columns that are needed."""
    lacks = ["ids"] if columns.place_of_id(names) is None else []
    lacks += ["captions"] if captions and columns.place_of_caption(names) is None else []
    only = f"only {', '.join(name for name in names if name)}"
    for role, chosen in (("id", columns.id), ("caption", columns.caption)):
        if chosen is not None and f"{role}s" in lacks:
            return DataError(f"--{role}-column {chosen}: {path} has no such column, {only}")
    options = " and ".join(f"--{one.removesuffix('s')}-column" for one in lacks)
    known = {"ids": ID_COLUMNS, "captions": CAPTION_COLUMNS}
    usual = "; ".join(f"{one} are known as {', '.join(known[one])}" for one in lacks)
    return DataError(
        f"{path} has no known column of {' and '.join(lacks)}, {only}: give "
        f"{options} ({usual}), or if this line is a row, add the header ID,Caption"
    )

"""Read captions by id in every layout that runs, references and data sets come in; knows nothing of scores.

Ids and captions are taken as they are: never sorted or padded, and "NA", "null" and "None" are captions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from engine.errors import DataError
from engine.inputs.columns import PROMPT, USUAL, Columns
from engine.inputs.ids import Ids, join_some, one_spelling, spelled
from engine.inputs.kinds import cut_suffix, image_id, open_regular
from engine.inputs.readers import (
    FILE,
    CaptionRow,
    decode_text,
    delimited_rows,
    json_rows,
    jsonl_rows,
    parquet_rows,
    read_columns,
    read_text,
    refuse_bytes,
)

T = TypeVar("T")

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files of captions in a Hugging Face imagefolder."""
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_SIDECAR_BYTES = 1 << 24
"""Size limit of a text file next to an image."""
SIDECARS = (".txt", ".caption")
"""Suffixes of text files beside pictures; the second is kohya's."""


@dataclass
class Table:
    """Captions by id in the order of the file, one or several an id, and further columns by id (text as it is).

    A column that is not the same in all rows of an id has the last row's value, and `varying` names such an id.
    `aliases` leads from other names of the images to their ids: COCO numbers images and names their files.
    `files` are the paths, as written, of ids that were file names: an id alone may have lost its folder.
    """

    path: Path
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    varying: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @cached_property
    def ids(self) -> Ids:
        """The ids, to be found however they are written; asked for once the table is read."""
        return Ids(self.captions, self.aliases, self.files)

    def single(self) -> dict[str, str]:
        """Return the captions of a run, one an id; raise DataError naming an id that has several."""
        several = [name for name, captions in self.captions.items() if len(captions) != 1]
        if several:
            raise DataError(f"{self.path} has more than one caption for {join_some(several)}: a run has one an image")
        return {name: captions[0] for name, captions in self.captions.items()}


def by_reference_id(
    references: Table, found: Mapping[str, T], source: Path, files: Mapping[str, str] | None = None
) -> dict[str, T]:
    """Return what `source` has by id under the ids of `references`, however these write them (Ids)."""
    ids = references.ids.find_all(found, source, files)
    return {ids.get(name, name): value for name, value in found.items()}


def read_table(path: Path, columns: Columns = USUAL) -> Table:
    """Read captions from a file or a folder.

    A folder is a Hugging Face imagefolder (METADATA) or images with a text file of the same name next to each, in
    folders at any depth. The extension of a file decides: .json (COCO captions, or {id: caption}), .jsonl, .parquet,
    anything else is a table with commas, semicolons, TABs or bars. Raises DataError naming the file and the line.
    """
    if path.is_dir():
        return _read_folder(path, columns)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _collect(path, parquet_rows(path, columns))
    if suffix not in (".json", ".jsonl"):
        return _collect(path, delimited_rows(path, columns))
    text = read_text(path, names=True)
    try:
        if suffix == ".json":
            rows, aliases = json_rows(path, json.loads(text), columns)
            return _collect(path, rows, aliases)
        return _collect(path, jsonl_rows(path, text, columns))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is JSON of no known layout of captions ({error!r})") from error


def _collect(path: Path, rows: Iterable[CaptionRow], aliases: dict[str, str] | None = None) -> Table:
    captions: dict[str, list[str]] = {}
    table = Table(path, aliases=aliases or {})
    first: dict[str, Mapping[str, str]] = {}
    listed = list(rows)
    ids, files = _ids_of_files(name for _, name, _, _ in listed)
    for number, written, caption, columns in listed:
        name = ids.get(written, written)
        if not name:
            raise DataError(f"{path}, line {number}: an empty id")
        refuse_bytes(path, (caption, *columns.values()))
        if SURROGATE.search(caption):
            raise DataError(f"{path}, line {number}: a caption with half a character (a lone surrogate)")
        captions.setdefault(name, []).append(caption)
        if written in files:
            table.files[name] = files[written]
        for column, value in columns.items():
            table.columns.setdefault(column, {})[name] = value
        if (earlier := first.setdefault(name, columns)) != columns:
            differing = [one for one in {**earlier, **columns} if earlier.get(one) != columns.get(one)]
            table.varying |= {column: name for column in differing if column not in table.varying}
    if not captions:
        raise DataError(f"{path} holds no captions")
    table.captions = {name: tuple(several) for name, several in captions.items()}
    return table


def _ids_of_files(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the ids of names that are files, and their paths: those of a column of files, and all where each has an
    image's suffix, or the `#0` of Flickr's tables, one of whose files has the suffix `.jpg.1`.

    The id is the last part of the path without suffix; where two files would have one id, the whole path without
    suffix; where that is not enough (a.jpg, a.png), with it.
    """
    known = dict.fromkeys(names)
    bare = [name.removeprefix(FILE) for name in known]
    if not all(re.search(r"#\d+$", name) or cut_suffix(name) != name for name in bare):
        known = {name: None for name in known if name.startswith(FILE)}
    files = {name: re.sub(r"#\d+$", "", name.removeprefix(FILE)) for name in known if name != FILE}
    count = len({one_spelling(file) for file in files.values()})
    ids: dict[str, str] = {}
    for rule in (image_id, spelled, one_spelling):
        ids = {name: rule(file) for name, file in files.items()}
        if len(set(ids.values())) == count:
            break
    return ids | dict.fromkeys([FILE] if FILE in known else [], ""), files


def _read_folder(path: Path, columns: Columns) -> Table:
    for name in METADATA:
        if (path / name).exists():
            if not (path / name).is_file():
                raise DataError(f"{path / name} is not a file but a folder, a pipe or a device")
            return read_table(path / name, columns)
    texts = [(name, text) for name, several in find_sidecars(path).items() for text in several]
    return _collect(path, ((1, FILE + name, _read_sidecar(text, path), {}) for name, text in texts))


def _read_sidecar(path: Path, folder: Path) -> str:
    """Return the text of a sidecar; raise DataError for what is not a text file inside the folder.

    Folders come from strangers: a link to a file elsewhere would put that into captions and reports.
    """
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise DataError(f"{path} is a link to a file outside {folder}: copy the folder with `cp -rL`")
    try:
        with open_regular(path, MAX_SIDECAR_BYTES) as stream:
            content = stream.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read as the text of an image: {reason}") from error
    return decode_text(path, content).strip()


def find_sidecars(folder: Path) -> dict[str, list[Path]]:
    """Return the text files that lie beside pictures and have their names, by the picture's path without suffix.

    Those of the folder itself; where it has none, those of its folders, at any depth (img2dataset, kohya).
    """
    found: dict[str, list[Path]] = {}
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = {cut_suffix(name) for name in files if not name.endswith(SIDECARS)}
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122
            if suffix in SIDECARS and stem in pictures:
                found.setdefault(os.path.relpath(os.path.join(here, stem), folder), []).append(Path(here, name))  # noqa: PTH118
        if found and here == os.fspath(folder):
            break
    return found


def read_prompts(path: Path, ids: Sequence[str], columns: Columns = USUAL) -> dict[str, str]:
    """Return {id: prompt} of all `ids` from a table with a column `prompt`; rows of other images are skipped.

    Names mean ids as elsewhere (inputs/ids.py). An empty prompt is not a prompt. Raises DataError naming what is
    missing.
    """
    table = read_columns(path, columns, whole=True)
    found = [column for column in table if column.lower() == PROMPT]
    if not found:
        raise DataError(
            f"{path} has no column {PROMPT!r}, only {join_some(table, 3)}: it needs ID and {PROMPT}, or give "
            "--prompt-column"
        )
    prompts = table[found[0]]
    of_id = {one: prompts[name] for name, one in Ids(ids).find_all(prompts, path).items()}
    if missing := [one for one in ids if one not in of_id]:
        raise DataError(
            f"{path} has no prompt for {len(missing)} of {len(ids)} images ({join_some(missing, 3)}): add their rows, "
            "the prompt may be empty"
        )
    return of_id

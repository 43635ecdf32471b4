"""Read captions by id from all supported layouts of runs, references and data sets.

Ids and captions are not changed: they are never sorted or padded, and "NA", "null" and "None" are captions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import DataError, counted
from engine.inputs.columns import PROMPT, USUAL, Columns
from engine.inputs.ids import Ids, join_some, one_spelling, shown, spelled
from engine.inputs.kinds import cut_suffix, image_id, open_regular
from engine.inputs.readers import (
    DELIMITERS,
    FILE,
    CaptionRow,
    decode_text,
    delimited_rows,
    json_rows,
    jsonl_rows,
    parquet_rows,
    read_rows,
    read_text,
    refuse_bytes,
    table_text,
)

T = TypeVar("T")

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Caption files of a Hugging Face imagefolder."""
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_SIDECAR_BYTES = 1 << 24
"""Size limit of a text file next to an image."""
SIDECARS = (".txt", ".caption")
"""Suffixes of text files next to images; `.caption` is kohya's."""


@dataclass
class Table:
    """Captions by id in the order of the file, one or several per id, and further columns by id.

    columns    {column: {id: value}}, with unchanged text; if the rows of an id differ, the value of its last row
    varying    {column: id} of the columns whose rows differ for an id, with one such id
    aliases    {other name of an image: id}; COCO both numbers its images and names their files
    files      {id: path as written} of the ids that come from file names, since the id may have lost its folder
    numbered   whether the ids are the numbers of images in COCO's results
    """

    path: Path
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    varying: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    numbered: bool = False

    @cached_property
    def ids(self) -> Ids:
        """The ids for lookups in any spelling. Use it only after the table is read, because the result is cached."""
        return Ids(self.captions, self.aliases, self.files)

    def single(self) -> dict[str, str]:
        """Return {id: caption} of a run. Raises DataError if an id has several captions."""
        repeated = [name for name, captions in self.captions.items() if len(captions) != 1]
        if repeated:
            raise DataError(f"{self.path} has more than one caption for {join_some(repeated)}: a run has one per image")
        return {name: captions[0] for name, captions in self.captions.items()}


def by_reference_id(
    references: Table, values: Mapping[str, T], source: Path, files: Mapping[str, str] | None = None
) -> dict[str, T]:
    """Return the values of `source` under the ids of `references`, which may be spelled differently (see Ids)."""
    ids = references.ids.find_all(values, source, files)
    return {ids.get(name, name): value for name, value in values.items()}


def own_by_reference_id(references: Table, run: Table) -> dict[str, str]:
    """Return the captions of a run, one per image, under the ids of `references`. Raises DataError as `single` does."""
    captions = run.single()
    ids = references.ids.find_all(captions, run.path, run.files, are_numbers=run.numbered)
    # a number that the references lack is not the file of that name
    unknown = {name: f"image_id {name}" for name in captions if run.numbered and name in references.captions}
    return {ids.get(name, unknown.get(name, name)): caption for name, caption in captions.items()}


def read_table(path: Path, columns: Columns = USUAL) -> Table:
    """Read captions from a file or a folder.

    A folder is a Hugging Face imagefolder (METADATA), or has a text file of the same name next to each image, at any
    depth. The suffix of a file selects its layout: .json (see json_rows), .jsonl or .parquet. Files with other suffixes
    are tables with commas, semicolons, TABs or bars. Raises DataError naming the file and the line.
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
            content = json.loads(text, object_pairs_hook=_without_repeats)
            rows, aliases = json_rows(path, content, columns)
            table = _collect(path, rows, aliases)
            table.numbered = isinstance(content, list) and all(type(entry.get("image_id")) is int for entry in content)
            return table
        return _collect(path, jsonl_rows(path, text, columns))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    except _RepeatedKeyError as error:
        raise DataError(f"{path} has the key {shown(str(error))} twice in one object: keep one of them") from error
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is JSON, but not in a known layout of captions ({error!r})") from error


class _RepeatedKeyError(Exception):
    """An object in JSON has a key twice; its message is the key."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


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
            differing = [key for key in {**earlier, **columns} if earlier.get(key) != columns.get(key)]
            table.varying |= {column: name for column in differing if column not in table.varying}
    if not captions:
        raise DataError(f"{path} holds no captions")
    table.captions = {name: tuple(texts) for name, texts in captions.items()}
    return table


def _ids_of_files(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return {name: id} and {name: path} of the names that are file names.

    These are the names from a column of files (marked by FILE), and all names if each has an image's suffix or the `#0`
    of Flickr's tables, one of whose files has the suffix `.jpg.1`.

    The id is the last part of the path without suffix. If two files would have the same id, all ids are whole paths
    without suffix, and if these are not unique either (a.jpg, a.png), whole paths with suffix.
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


def read_columns(path: Path, columns: Columns = USUAL) -> dict[str, dict[str, str]]:
    """Read a table of values per image. Returns {column: {id: value}}.

    The table has a header and is separated by commas, TABs, bars or semicolons. The ids or file names are in the column
    with a known name, or else in the first, and stay as they are written (see Ids and by_reference_id). A column
    without a name is an index that pandas wrote, and is ignored. Raises DataError naming the file and the line.
    """
    text, separator = table_text(path)
    header_line = text.lstrip("\r\n").partition("\n")[0]
    present = [delimiter for delimiter in DELIMITERS if delimiter in header_line]
    by_id = (d for d in present if columns.place_of_id(header_line.split(d)) is not None)
    delimiter = separator or next(by_id, (present or ",")[0])
    (_, header), *rows = read_rows(path, text, delimiter) or [(1, [""])]
    header = [name.strip() for name in header]
    columns.note(path, header)
    if len(header) < 2:
        raise DataError(f"{path} has only an id column: expected at least one more, after a comma, TAB or bar")
    if len(set(header)) < len(header):
        raise DataError(f"{path} has two columns with the same name: {', '.join(header)}")
    at_id = columns.place_of_id(header) or 0
    prompt = columns.place_of_prompt(header)
    others = [i for i, name in enumerate(header) if i != at_id and name and not name.startswith("Unnamed: ")]
    if not others:
        raise DataError(f"{path} has only an id column: expected at least one more")
    names = [PROMPT if i == prompt else name for i, name in enumerate(header)]
    found_columns: dict[str, dict[str, str]] = {names[i]: {} for i in others}
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: {counted(len(row), 'column')}, but the header has {len(header)}")
        name = row[at_id]
        if name in found_columns[names[others[0]]]:
            raise DataError(f"{path}, line {number}: id {name} is repeated")
        refuse_bytes(path, (row[i] for i in others))
        for i in others:
            found_columns[names[i]][name] = row[i]
    return found_columns


def _read_folder(path: Path, columns: Columns) -> Table:
    for name in METADATA:
        if (path / name).exists():
            if not (path / name).is_file():
                raise DataError(f"{path / name} is not a file but a folder, a pipe or a device")
            return read_table(path / name, columns)
    texts = [(name, text) for name, paths in find_sidecars(path).items() for text in paths]
    return _collect(path, ((1, FILE + name, _read_sidecar(text, path), {}) for name, text in texts))


def _read_sidecar(path: Path, folder: Path) -> str:
    """Return the text of a sidecar file. Raises DataError if it is not a text file inside the folder.

    A folder may come from someone else. A link in it to a private file elsewhere would copy that file's content into
    captions and reports.
    """
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise DataError(f"{path} is a link to a file outside {folder}: copy the folder with `cp -rL`")
    try:
        with open_regular(path, MAX_SIDECAR_BYTES) as stream:
            content = stream.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read as the caption of an image: {reason}") from error
    return decode_text(path, content).strip()


def find_sidecars(folder: Path) -> dict[str, list[Path]]:
    """Return {image's path without suffix: text files of the same name next to it}.

    If the folder itself has such files, only these are returned; otherwise those of its folders at any depth, as
    img2dataset and kohya write them.
    """
    sidecars: dict[str, list[Path]] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = {cut_suffix(name) for name in files if not name.endswith(SIDECARS)}
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122
            if suffix in SIDECARS and stem in images:
                sidecars.setdefault(os.path.relpath(os.path.join(parent, stem), folder), []).append(Path(parent, name))  # noqa: PTH118
        if sidecars and parent == os.fspath(folder):
            break
    return sidecars


def read_prompts(path: Path, ids: Sequence[str], columns: Columns = USUAL) -> dict[str, str]:
    """Return {id: prompt} of all `ids` from a table with a column `prompt`. Rows of other images are skipped.

    Names in the table may be spelled differently than `ids` (see Ids). An empty prompt means that the image has no
    prompt. Raises DataError if the column or the row of an image is missing.
    """
    table = read_columns(path, columns)
    prompt_columns = [column for column in table if column.lower() == PROMPT]
    if not prompt_columns:
        raise DataError(
            f"{path} has no column {PROMPT!r}, only {join_some(table, 3)}: add this column or give --prompt-column"
        )
    prompts = table[prompt_columns[0]]
    prompt_of = {match: prompts[name] for name, match in Ids(ids).find_all(prompts, path).items()}
    if missing := [name for name in ids if name not in prompt_of]:
        raise DataError(
            f"{path} has no prompt for {len(missing)} of {len(ids)} images ({join_some(missing, 3)}): add their rows; "
            "the prompt may be empty"
        )
    return prompt_of

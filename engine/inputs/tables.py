"""Read ids and captions in every layout that runs, references and manifests come in; knows nothing of scores.

Ids and captions are taken as they are: never parsed, sorted or padded, and "NA", "null" and "None" are captions.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import DataError, UsageError
from engine.inputs.ids import Ids, join_some, spelled
from engine.inputs.kinds import cut_suffix, image_id

T = TypeVar("T")

DELIMITERS = ",\t|;"
FILE_COLUMNS = ("file_name", "filename", "image", "image_name")
ID_COLUMNS = ("id", "image_id", "imageid", *FILE_COLUMNS)
CAPTION_COLUMNS = ("caption", "captions", "text", "description", "comment")
MAX_FIELD_CHARS = 1 << 20
"""No caption comes near it; the csv module's own limit is smaller than some report texts."""


@dataclass
class Table:
    """Captions by id in the order of the file, one or several an id, and further columns by id (text as it is).

    `aliases` leads from other names of the images to their ids: COCO numbers pictures beside naming their files.
    """

    path: Path
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @cached_property
    def ids(self) -> Ids:
        """The ids, to be found however they are written; asked for once the table is read."""
        return Ids(self.captions, self.aliases)

    def single(self) -> dict[str, str]:
        """Return the captions of a run, one an id; raise DataError naming an id that has several."""
        several = [name for name, captions in self.captions.items() if len(captions) != 1]
        if several:
            raise DataError(f"{self.path} has more than one caption for {join_some(several)}: a run has one an image")
        return {name: captions[0] for name, captions in self.captions.items()}


def by_reference_id(references: Table, found: Mapping[str, T]) -> dict[str, T]:
    """Return what is known by id under the ids of `references`, however these write them (Ids)."""
    ids = references.ids.find_all(found, references.path)
    return {ids.get(name, name): value for name, value in found.items()}


def read_table(path: Path) -> Table:
    """Read captions from a file or a folder.

    A folder is a Hugging Face imagefolder (metadata.csv or metadata.jsonl) or pictures with a text file of the same
    name beside each. A file is told by its extension: .json (COCO captions, or {id: caption}), .jsonl, .parquet,
    anything else is a table with commas, TABs or bars. Raises DataError naming the file and the line.
    """
    if path.is_dir():
        return _read_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _collect(path, _parquet_rows(path))
    text = read_text(path)
    try:
        if suffix == ".json":
            return _read_json(path, json.loads(text))
        if suffix == ".jsonl":
            return _collect(path, _jsonl_rows(path, text))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is JSON of no known layout of captions ({error!r})") from error
    return _collect(path, _delimited_rows(path, text))


def read_ids(path: Path) -> list[str]:
    """Read a list of ids: one a line, or the first column of a table headed ID; raise DataError naming the file."""
    try:
        ids = _ids(read_text(path))
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a list of ids: {error}") from error
    if not ids:
        raise DataError(f"{path} lists no ids")
    repeated = sorted(name for name, count in Counter(ids).items() if count > 1)
    if repeated:
        raise DataError(f"{path} lists ids more than once: {join_some(repeated)}")
    return ids


def read_columns(path: Path) -> dict[str, dict[str, str]]:
    """Read a table of anything about images: {column: {id: value}}.

    Ids or file names stand in the column that is headed so, else in the first. A column without a name is the index
    that pandas writes, and is left out.

    It has a header, and commas, TABs or bars. Raises DataError naming the file and the line.
    """
    text = read_text(path)
    header_line = text.partition("\n")[0]
    found = [delimiter for delimiter in DELIMITERS if delimiter in header_line]
    delimiter = next((d for d in found if any(map(_heads_ids, header_line.split(d)))), (found or ",")[0])
    reader = read_delimited(text, delimiter)
    columns: dict[str, dict[str, str]] = {}
    try:
        header = [name.strip() for name in next(reader, ())]
        if len(header) < 2:
            raise DataError(f"{path} is no table: its header has no column beside the ids, with a comma, TAB or bar")
        if len(set(header)) < len(header):
            raise DataError(f"{path} has two columns of one name: {', '.join(header)}")
        place = next((i for i, name in enumerate(header) if _heads_ids(name)), 0)
        others = [i for i, name in enumerate(header) if i != place and name and not name.startswith("Unnamed: ")]
        if not others:
            raise DataError(f"{path} is no table: its header has no column beside the ids")
        columns = {header[i]: {} for i in others}
        for row in filter(None, reader):
            if len(row) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(row)} columns where the header has {len(header)}"
                )
            name = _stem(header[place], row[place])
            if name in columns[header[others[0]]]:
                raise DataError(f"{path}, line {reader.line_num}: {name} is there twice")
            for i in others:
                columns[header[i]][name] = row[i]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    return columns


def read_text(path: Path) -> str:
    """Return the text of a file, line ends as they are: UTF-8, or UTF-16 where a byte order mark says so.

    Raises DataError naming it for any other encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        what = "UTF-16" if encoding == "utf-16" else "UTF-8"
        hint = "" if what == "UTF-16" else " (saved by Excel? choose `CSV UTF-8` there)"
        raise DataError(f"{path} cannot be read: byte {error.start} is not {what}{hint}") from error
    if "\0" in text[:4096]:
        raise DataError(f"{path} holds bytes of zero: is it UTF-16 without a byte order mark? save it as UTF-8")
    return text


def _heads_ids(name: str) -> bool:
    return name.strip().strip('"').lower() in ID_COLUMNS


def _ids(text: str) -> list[str]:
    """Return the column of a table whose header has a name of ids, else the lines as they are."""
    lines = [line.rstrip("\r") for line in text.split("\n")]
    header = lines[0].lower().replace('"', "")
    for delimiter in DELIMITERS:
        names = [name.strip() for name in header.split(delimiter)]
        place = next((names.index(name) for name in ID_COLUMNS if name in names), None)
        if len(names) > 1 and place is not None:
            rows = [row for row in read_delimited(text, delimiter) if len(row) > place]
            return [_stem(names[place], row[place]) for row in rows][1:]
    bare = [name.strip('"') if name.startswith('"') and name.endswith('"') else name for name in lines]
    return [name for name in bare[header in ID_COLUMNS :] if name]


def read_delimited(text: str, delimiter: str) -> Any:
    """Return a reader of the rows of a table; it raises csv.Error, and its line_num is the line of the last row.

    Only commas and semicolons come with quotes: a bar or a TAB ends an id, and a quotation mark is part of the caption.
    Where the header itself is quoted, a program wrote the quotes for all columns.
    """
    csv.field_size_limit(MAX_FIELD_CHARS)
    is_quoted = delimiter in ",;" or text.startswith('"')
    return csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
        strict=True,
    )


CaptionRow = tuple[int, str, str, Mapping[str, str]]
"""Line (or record) number, id or file name, caption, further columns. A file name is told by FILE in front."""
FILE = "\0"


def _collect(path: Path, rows: Iterable[CaptionRow]) -> Table:
    captions: dict[str, list[str]] = {}
    table = Table(path)
    listed = list(rows)
    ids = _ids_of_files(name for _, name, _, _ in listed)
    for number, name, caption, columns in listed:
        name = ids.get(name, name)
        if not name:
            raise DataError(f"{path}, line {number}: an empty id")
        if any("\ud800" <= character <= "\udfff" for character in caption):
            raise DataError(f"{path}, line {number}: a caption with half a character (a lone surrogate)")
        captions.setdefault(name, []).append(caption)
        for column, value in columns.items():
            table.columns.setdefault(column, {})[name] = value
    if not captions:
        raise DataError(f"{path} holds no captions")
    table.captions = {name: tuple(several) for name, several in captions.items()}
    return table


def _ids_of_files(names: Iterable[str]) -> dict[str, str]:
    """Return the ids of names that are files: those of a column of files, and all where each has a picture's suffix.

    The id is the last part of the path without suffix; where two files would have one id, the whole path without it.
    """
    known = dict.fromkeys(names)
    bare = [name.removeprefix(FILE) for name in known]
    if not all(spelled(name) != name and cut_suffix(name.partition("#")[0]) != name for name in bare):
        known = {name: None for name in known if name.startswith(FILE)}
    files = {name: re.sub(r"#\d+$", "", name.removeprefix(FILE)) for name in known if name != FILE}
    ids = {name: image_id(file) for name, file in files.items()}
    if len(set(ids.values())) < len(set(files.values())):
        ids = {name: spelled(file) for name, file in files.items()}
    return ids | dict.fromkeys([FILE] if FILE in known else [], "")


def _delimited_rows(path: Path, text: str) -> Iterator[CaptionRow]:
    lines = text.split("\n")
    delimiter, is_headed = _layout(path, [line.rstrip("\r") for line in lines])
    reader = read_delimited(text, delimiter)
    names: list[str] = []
    try:
        for row in reader:
            number = reader.line_num
            if not row:
                continue
            row = [cell.removeprefix(" ") for cell in row] if delimiter == "|" and is_headed else row
            if is_headed and not names:
                names = [name.strip() for name in row]
                place_of_id, place_of_caption = _place(names, ID_COLUMNS), _place(names, CAPTION_COLUMNS)
                continue
            if not is_headed:
                if len(row) != 2:
                    raise DataError(f"{path}, line {number}: {len(row)} columns instead of an id and a caption")
                yield number, row[0], row[1].removeprefix(" "), {}
                continue
            if len(row) != len(names):
                raise DataError(
                    f"{path}, line {number}: {len(row)} columns where the header has {len(names)}; "
                    "a caption that holds the delimiter must be quoted"
                )
            further = {
                names[i]: value
                for i, value in enumerate(row)
                if i not in (place_of_id, place_of_caption) and names[i] and not names[i].startswith("Unnamed: ")
            }
            yield number, _named(names[place_of_id], row[place_of_id]), row[place_of_caption], further
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _layout(path: Path, lines: list[str]) -> tuple[str, bool]:
    """Return the delimiter and whether there is a header: by the header, else by what every line has exactly once."""
    header = lines[0].lower().replace('"', "")
    for delimiter in DELIMITERS:
        names = [name.strip() for name in header.split(delimiter)]
        if len(names) > 1 and set(names) & set(ID_COLUMNS) and set(names) & set(CAPTION_COLUMNS):
            return delimiter, True
    filled = [line for line in lines if line]
    for delimiter in "\t|":
        if filled and all(delimiter in line for line in filled):
            return delimiter, False
    if filled and all("," in line for line in filled):
        return ",", False
    raise DataError(
        f"{path} is no table of captions: it has neither a header with ID and Caption nor one TAB, bar or comma a line"
    )


def _place(names: list[str], wanted: tuple[str, ...]) -> int:
    lowered = [name.lower() for name in names]
    return next(lowered.index(name) for name in wanted if name in lowered)


def _stem(column: str, value: str) -> str:
    """Return the id of a row of a manifest: a file name without folder and suffix where the column holds them."""
    return image_id(value) if column.lower() in FILE_COLUMNS else value


def _named(column: str, value: str) -> str:
    """Return a row's id, or its file name marked as one."""
    return FILE + value if column.lower() in FILE_COLUMNS and value else value


def _read_json(path: Path, content: Any) -> Table:
    """Read COCO captions or results, or an object {id: caption}."""
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        files = {str(image["id"]): str(image["file_name"]) for image in content.get("images") or []}
        rows = [
            {"file_name": files[str(entry["image_id"])], "caption": entry["caption"]}
            if str(entry["image_id"]) in files
            else {"image_id": entry["image_id"], "caption": entry["caption"]}
            for entry in content["annotations"]
        ]
        table = _collect(path, (row for i, entry in enumerate(rows, 1) for row in _object_rows(path, i, entry)))
        table.aliases = {number: image_id(file) for number, file in files.items()}
        return table
    if isinstance(content, dict) and (entries := _entries_by_split(content)) is not None:
        return _collect(path, (row for i, one in enumerate(entries, 1) for row in _object_rows(path, i, one)))
    if isinstance(content, dict):
        content = [{"id": name, "caption": caption} for name, caption in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{path} is neither COCO captions nor a list or an object of captions")
    return _collect(path, (row for i, entry in enumerate(content, 1) for row in _object_rows(path, i, entry)))


def _entries_by_split(content: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the pictures of files that hold all splits, one object each, None for another layout.

    Karpathy's dataset_coco.json has images with sentences; R2Gen's annotation.json has a list a split, whose reports go
    with one picture or several.
    """
    images = content.get("images")
    if isinstance(images, list) and images and all(isinstance(one, dict) and "sentences" in one for one in images):
        return [
            {
                "file_name": "/".join(filter(None, (one.get("filepath"), one["filename"]))),
                "caption": [sentence["raw"] for sentence in one["sentences"]],
                "split": one.get("split", ""),
            }
            for one in images
        ]
    reports = [one for part in content.values() if isinstance(part, list) for one in part]
    if reports and all(isinstance(one, dict) and {"report", "image_path"} <= set(one) for one in reports):
        return [
            {"file_name": picture, "caption": one["report"], "split": str(one.get("split") or split)}
            for split, part in content.items()
            for one in part
            for picture in (one["image_path"] if isinstance(one["image_path"], list) else [one["image_path"]])
        ]
    return None


def _jsonl_rows(path: Path, text: str) -> Iterator[CaptionRow]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield from _object_rows(path, number, json.loads(line))


def _object_rows(path: Path, number: int, entry: Any) -> Iterator[CaptionRow]:
    """Yield the captions of one JSON object: an id, and a caption, several, or the best of our own n-best lists."""
    if not isinstance(entry, dict):
        raise DataError(f"{path}, line {number}: not an object with an id and a caption")
    lowered = {str(key).lower(): key for key in entry}
    key = next((lowered[name] for name in _id_columns(lowered, entry) if name in lowered), None)
    if key is None:
        raise DataError(f"{path}, line {number}: no id")
    name = _named(str(key), str(entry[key]))
    hypotheses = entry.get("hypotheses")
    found = next((lowered[column] for column in CAPTION_COLUMNS if column in lowered), None)
    value: Any = [hypotheses[0]["text"]] if hypotheses else entry[found] if found is not None else None
    captions: list[Any] = value if isinstance(value, list) else [value]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise DataError(f"{path}, line {number}: no caption for {name}")
    further = {
        str(k): ";".join(map(str, v)) if isinstance(v, list) else str(v)
        for k, v in entry.items()
        if k not in (key, found, "hypotheses") and not isinstance(v, dict)
    }
    yield from ((number, name, caption, further) for caption in captions)


def _id_columns(lowered: Mapping[str, str], entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that may hold an id, the best first: a path to a picture tells more than a number beside it.

    BLIP's and LAVIS' annotation files have both, and name the picture by `image`.
    """
    image = entry.get(lowered.get("image", ""))
    if isinstance(image, str) and cut_suffix(image) != image:
        return ("image", "image_id", *ID_COLUMNS)
    return ("image_id", *ID_COLUMNS)


def _parquet_rows(path: Path) -> Iterator[CaptionRow]:
    """Read everything but pictures: of a column that holds them, the file name beside the bytes."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path}: parquet needs pyarrow ({error}): pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        columns = []
        for entry in file.schema_arrow:
            if pyarrow.types.is_struct(entry.type):
                columns += [f"{entry.name}.path"] * (entry.type.get_field_index("path") >= 0)
            elif not pyarrow.types.is_binary(entry.type) and not pyarrow.types.is_large_binary(entry.type):
                columns.append(entry.name)
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                flat = {name: value["path"] if isinstance(value, dict) else value for name, value in row.items()}
                yield from _object_rows(path, number, {k: v for k, v in flat.items() if v is not None})
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _read_folder(path: Path) -> Table:
    for name in ("metadata.csv", "metadata.jsonl"):
        if (path / name).exists():
            return read_table(path / name)
    names = sorted(os.listdir(path))
    pictures = {cut_suffix(name) for name in names if not name.endswith(".txt")}
    texts = [name for name in names if name.endswith(".txt") and name.removesuffix(".txt") in pictures]
    return _collect(path, ((1, name.removesuffix(".txt"), read_text(path / name).strip(), {}) for name in texts))

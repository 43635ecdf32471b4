"""Read ids and captions in every layout that runs, references and manifests come in; knows nothing of scores.

Ids and captions are taken as they are: never parsed, sorted or padded, and "NA", "null" and "None" are captions.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.errors import UsageError

DELIMITERS = ",\t|"
ID_COLUMNS = ("id", "image_id", "imageid", "file_name", "filename", "image")
CAPTION_COLUMNS = ("caption", "captions", "text", "description")
MAX_FIELD_CHARS = 1 << 20
"""No caption comes near it; the csv module's own limit is smaller than some report texts."""


@dataclass
class Table:
    """Captions by id in the order of the file, one or several an id, and further columns by id (text as it is)."""

    path: Path
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)

    def single(self) -> dict[str, str]:
        """Return the captions of a run, one an id; raise UsageError naming an id that has several."""
        several = [name for name, captions in self.captions.items() if len(captions) != 1]
        if several:
            raise UsageError(f"{self.path} has more than one caption for {shorten(several)}: a run has one an image")
        return {name: captions[0] for name, captions in self.captions.items()}


def read_table(path: Path) -> Table:
    """Read captions from a file or a folder.

    A folder is a Hugging Face imagefolder (metadata.csv or metadata.jsonl) or pictures with a text file of the same
    name beside each. A file is told by its extension: .json (COCO captions, or {id: caption}), .jsonl, .parquet,
    anything else is a table with commas, TABs or bars. Raises UsageError naming the file and the line.
    """
    if path.is_dir():
        return _read_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _collect(path, _parquet_rows(path))
    text = read_text(path)
    try:
        if suffix == ".json":
            return _collect(path, _json_rows(path, json.loads(text)))
        if suffix == ".jsonl":
            return _collect(path, _jsonl_rows(path, text))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    return _collect(path, _delimited_rows(path, text))


def read_ids(path: Path) -> list[str]:
    """Read a list of ids: one a line, or the first column of a table headed ID; raise UsageError naming the file."""
    try:
        ids = _ids(read_text(path))
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read as a list of ids: {error}") from error
    if not ids:
        raise UsageError(f"{path} lists no ids")
    repeated = sorted(name for name, count in Counter(ids).items() if count > 1)
    if repeated:
        raise UsageError(f"{path} lists ids more than once: {shorten(repeated)}")
    return ids


def read_text(path: Path) -> str:
    """Return a UTF-8 file, with or without byte order mark, line ends as they are; raise UsageError naming it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read: byte {error.start} is not UTF-8") from error


def shorten(names: list[str], most: int = 10) -> str:
    """Join names for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _ids(text: str) -> list[str]:
    header = text.partition("\n")[0].rstrip("\r").lower()
    for delimiter in DELIMITERS:
        if header.startswith(("id" + delimiter, '"id"' + delimiter)):
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            return [row[0] for row in rows if row][1:]
    ids = [line.rstrip("\r") for line in text.split("\n")]
    return [name for name in ids[header == "id" :] if name]


Row = tuple[int, str, str, Mapping[str, str]]
"""Line (or record) number, id, caption, further columns."""


def _collect(path: Path, rows: Iterator[Row]) -> Table:
    table = Table(path)
    for number, name, caption, columns in rows:
        if not name:
            raise UsageError(f"{path}, line {number}: an empty id")
        table.captions[name] = (*table.captions.get(name, ()), caption)
        for column, value in columns.items():
            table.columns.setdefault(column, {})[name] = value
    if not table.captions:
        raise UsageError(f"{path} holds no captions")
    return table


def _delimited_rows(path: Path, text: str) -> Iterator[Row]:
    lines = text.split("\n")
    delimiter, is_headed = _layout(path, [line.rstrip("\r") for line in lines])
    csv.field_size_limit(MAX_FIELD_CHARS)
    # only commas come with quotes: a bar or a TAB ends an id, and a quotation mark is part of the caption
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," or text.startswith('"') else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    names: list[str] = []
    try:
        for row in reader:
            number = reader.line_num
            if not row:
                continue
            if is_headed and not names:
                names = [name.strip() for name in row]
                place_of_id, place_of_caption = _place(names, ID_COLUMNS), _place(names, CAPTION_COLUMNS)
                continue
            if not is_headed:
                if len(row) != 2:
                    raise UsageError(f"{path}, line {number}: {len(row)} columns instead of an id and a caption")
                yield number, row[0], row[1].removeprefix(" "), {}
                continue
            if len(row) != len(names):
                raise UsageError(
                    f"{path}, line {number}: {len(row)} columns where the header has {len(names)}; "
                    "a caption that holds the delimiter must be quoted"
                )
            further = {names[i]: value for i, value in enumerate(row) if i not in (place_of_id, place_of_caption)}
            yield number, _stem(names[place_of_id], row[place_of_id]), row[place_of_caption], further
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}") from error


def _layout(path: Path, lines: list[str]) -> tuple[str, bool]:
    """Return the delimiter and whether there is a header: by the header, else by what every line has exactly once."""
    header = lines[0].lower().replace('"', "")
    for delimiter in DELIMITERS:
        names = [name.strip() for name in header.split(delimiter)]
        if len(names) > 1 and set(names) & set(ID_COLUMNS) and set(names) & set(CAPTION_COLUMNS):
            return delimiter, True
    filled = [line for line in lines if line]
    for delimiter in "\t|":
        if filled and all(line.count(delimiter) == 1 for line in filled):
            return delimiter, False
    if filled and all("," in line for line in filled):
        return ",", False
    raise UsageError(
        f"{path} is no table of captions: it has neither a header with ID and Caption nor one TAB, bar or comma a line"
    )


def _place(names: list[str], wanted: tuple[str, ...]) -> int:
    lowered = [name.lower() for name in names]
    return next(lowered.index(name) for name in wanted if name in lowered)


def _stem(column: str, value: str) -> str:
    """Return the id of a row: a file name without folder and extension where the column holds file names."""
    return Path(value).stem if column.lower() in ("file_name", "filename", "image") else value


def _json_rows(path: Path, content: Any) -> Iterator[Row]:
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        files = {image["id"]: Path(image["file_name"]).stem for image in content.get("images", [])}
        content = [
            entry | {"image_id": files.get(entry.get("image_id"), entry.get("image_id"))}
            for entry in content["annotations"]
        ]
    elif isinstance(content, dict):
        content = [{"id": name, "caption": caption} for name, caption in content.items()]
    if not isinstance(content, list):
        raise UsageError(f"{path} is neither COCO captions nor a list or an object of captions")
    for number, entry in enumerate(content, 1):
        yield from _object_rows(path, number, entry)


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield from _object_rows(path, number, json.loads(line))


def _object_rows(path: Path, number: int, entry: Any) -> Iterator[Row]:
    """Yield the captions of one JSON object: an id, and a caption, several, or the best of our own n-best lists."""
    if not isinstance(entry, dict):
        raise UsageError(f"{path}, line {number}: not an object with an id and a caption")
    lowered = {str(key).lower(): key for key in entry}
    key = next((lowered[name] for name in ("image_id", *ID_COLUMNS) if name in lowered), None)
    if key is None:
        raise UsageError(f"{path}, line {number}: no id")
    name = _stem(key, str(entry[key]))
    hypotheses = entry.get("hypotheses")
    found = next((lowered[column] for column in CAPTION_COLUMNS if column in lowered), None)
    value: Any = [hypotheses[0]["text"]] if hypotheses else entry[found] if found is not None else None
    captions: list[Any] = value if isinstance(value, list) else [value]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise UsageError(f"{path}, line {number}: no caption for {name}")
    further = {k: str(v) for k, v in entry.items() if k not in (key, found, "hypotheses") and not isinstance(v, dict)}
    yield from ((number, name, caption, further) for caption in captions)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path}: parquet needs pyarrow ({error}): pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name.lower() != "image" or len(file.schema_arrow) == 2]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for entry in batch.to_pylist():
                number += 1
                yield from _object_rows(path, number, entry)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as parquet: {error}") from error


def _read_folder(path: Path) -> Table:
    for name in ("metadata.csv", "metadata.jsonl"):
        if (path / name).exists():
            return read_table(path / name)
    rows: Iterator[Row] = (
        (1, text.stem, read_text(text).strip(), {})
        for text in sorted(path.glob("*.txt"))
        if any(other.suffix != ".txt" for other in path.glob(f"{_escaped(text.stem)}.*"))
    )
    return _collect(path, rows)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)

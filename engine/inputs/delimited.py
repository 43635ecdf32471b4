"""Read delimited tables and lists of ids; knows nothing of JSON, parquet and scores.

Ids and captions are taken as they are: never sorted or padded, and "NA", "null" and "None" are captions.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import DataError, UsageError
from engine.inputs.ids import join_some
from engine.inputs.kinds import image_id

DELIMITERS = ",\t|;"
FILE_COLUMNS = ("file_name", "filename", "image", "image_name")
ID_COLUMNS = ("id", "image_id", "imageid", *FILE_COLUMNS)
CAPTION_COLUMNS = ("caption", "captions", "text", "description", "comment", "prompt", "raw")
MAX_FIELD_CHARS = 1 << 20
"""No caption comes near it; the csv module's own limit is smaller than some report texts."""

CaptionRow = tuple[int, str, str, Mapping[str, str]]
"""Line (or record) number, id or file name, caption, further columns. A file name is told by FILE in front."""
FILE = "\0"


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


def delimited_rows(path: Path, text: str) -> Iterator[CaptionRow]:
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
            name = named(names[place_of_id], row[place_of_id])
            for caption in _captions(names[place_of_caption], row[place_of_caption]):
                yield number, name, caption, further
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _captions(column: str, cell: str) -> list[str]:
    """Return the captions of a cell: itself; but the column `raw` of Flickr30k's table holds lists in JSON."""
    if column.lower() == "raw":
        try:
            several = json.loads(cell)
        except ValueError:
            return [cell]
        if isinstance(several, list) and several and all(isinstance(caption, str) for caption in several):
            return several
    return [cell]


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


def _stem(column: str, value: str) -> str:
    """Return the id of a row of a manifest: a file name without folder and suffix where the column holds them."""
    return image_id(value) if column.lower() in FILE_COLUMNS else value


def named(column: str, value: str) -> str:
    """Return a row's id, or its file name marked as one."""
    return FILE + value if column.lower() in FILE_COLUMNS and value else value

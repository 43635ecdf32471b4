"""Read ids and captions from delimited tables, lists of ids, JSON and parquet.

Ids and captions are not changed: they are never sorted or padded, and "NA", "null" and "None" are captions.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import DataError, UsageError, counted
from engine.inputs.columns import (
    CAPTION_COLUMNS,
    ID_COLUMNS,
    PROMPT,
    USUAL,
    Columns,
    find_column,
    holds_files,
    is_header,
    unknown_header,
)
from engine.inputs.ids import join_some, shown
from engine.inputs.kinds import cut_suffix, image_id, packed_content, wrong_content

DELIMITERS = ",\t|;"
MOST_SHOWN = 100
"""Characters of a line that a message shows."""
MAX_FIELD_CHARS = 1 << 20
"""Far more than any caption has. The default limit of the csv module is smaller than some report texts."""

CaptionRow = tuple[int, str, str, Mapping[str, str]]
"""Line (or record) number, id or file name, caption, further columns. File names begin with the mark FILE."""
FILE = "\0"
Rows = list[tuple[int, list[str]]]
"""Line number and cells of each row of a table, without blank rows."""
Others = list[tuple[str, str]]
"""First cell and rest of the lines after the first, see is_header."""


def read_ids(path: Path, columns: Columns = USUAL, *, whole: bool = False) -> list[str]:
    """Read a list of ids: a text file with one per line, or a column of a table.

    File names in a column become ids, or with `whole` stay unchanged. Raises DataError naming the file if it lists no
    ids or an id twice.
    """
    ids = _ids(path, columns, whole)
    if not ids:
        raise DataError(f"{path} lists no ids")
    repeated = sorted(name for name, count in Counter(ids).items() if count > 1)
    if repeated:
        raise DataError(f"{path} lists ids more than once: {join_some(repeated)}")
    return ids


def read_text(path: Path, *, names: bool = False) -> str:
    """Return the text of a file with its line ends unchanged: UTF-8, or UTF-16 if it has that byte order mark.

    With `names` bytes that are not UTF-8 are decoded like file names (surrogateescape), so that tables can name such
    files; `refuse_bytes` then refuses them in other columns. Raises DataError naming the file if it has another
    encoding or is not text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return decode_text(path, content, names=names)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line of a file that is not blank. Raises as read_text does."""
    lines = enumerate(read_text(path, names=True).split("\n"), 1)
    return ((number, line) for number, line in lines if line.strip())


def decode_text(path: Path, content: bytes, *, names: bool = False) -> str:
    """Decode the content of a file; see read_text."""
    if content and (what := wrong_content(content[:512]) or packed_content(content[:4096], path.suffix)):
        raise DataError(f"{path} is not text but {what}")
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding, "surrogateescape" if names and encoding != "utf-16" else "strict")
    except UnicodeDecodeError as error:
        what = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise DataError(f"{path} cannot be read: byte {error.start} is not {what}{_saved_by(what)}") from error
    if "\0" in text[:4096]:
        raise DataError(f"{path} contains NUL bytes, perhaps UTF-16 without a byte order mark: save it as UTF-8")
    return text


def refuse_bytes(path: Path, texts: Iterable[str]) -> None:
    """Raise DataError if a text, which is not a file name, holds bytes that are not UTF-8; see read_text."""
    if any(re.search("[\udc80-\udcff]", text) for text in texts):
        content = path.read_bytes()
        try:
            content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            reason = f"byte {error.start} is not UTF-8"
            raise DataError(f"{path} cannot be read: {reason}{_saved_by('UTF-8')}") from error


def _saved_by(encoding: str) -> str:
    return "" if encoding == "UTF-16" else " (if it comes from Excel, save it as `CSV UTF-8`)"


def table_text(path: Path) -> tuple[str, str | None]:
    """Return (text, delimiter) of a table; the delimiter is None unless the first line is Excel's `sep=;`.

    That line, blank lines and comments (`# ...`) before the first row become empty lines, so that line numbers do not
    change.
    """
    text, separator, start = read_text(path, names=True), None, 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        line = text[start:end].strip("\r\n")
        if match := re.fullmatch(r'"?sep=(.)"?', line):
            separator = match[1]
        elif line.strip() and not line.startswith("# "):
            break
        start = end
    return "\n" * text.count("\n", 0, start) + text[start:], separator


def read_rows(path: Path, text: str, delimiter: str, width: int | None = None) -> Rows:
    """Return the rows of a table, each with the number of its last line. Raises DataError naming file and line.

    Quotes have a meaning only in tables with commas or semicolons. With bars or TABs a quotation mark is part of the
    caption, unless the header is quoted too, because then a program has quoted all columns. Quotes that people write by
    hand, after a space or escaped as `\\"`, are accepted if every row then has `width` columns (None: as many as the
    first row).
    """
    rows, error = _parse(text, delimiter)
    width = width or len(rows[0][1] if rows else ())
    is_odd = any(re.fullmatch(r'(?s)\s+".*"\s*', cell) for _, row in rows for cell in row) and delimiter in ",;"
    if delimiter in ",;" and (error or is_odd or any(len(row) != width for _, row in rows)):
        unescaped = text.replace('\\"', '""')
        for variant, with_space in ((text, True), (unescaped, False), (unescaped, True)):
            parsed, variant_error = _parse(variant, delimiter, with_space)
            if not variant_error and parsed and all(len(row) == width for _, row in parsed):
                return parsed
    if error:
        raise DataError(f"{path}, {error}")
    return rows


def _parse(text: str, delimiter: str, with_space: bool = False) -> tuple[Rows, str]:
    """Return the rows of a table up to the first that cannot be read, and the error of that row or an empty string."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    is_quoted = delimiter in ",;" or text.lstrip("\r\n").startswith('"')
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
        skipinitialspace=with_space,
        strict=True,
    )
    rows: Rows = []
    try:
        rows += ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
    except csv.Error as error:
        return rows, f"line {reader.line_num}: {error}"
    return rows, ""


def delimited_rows(path: Path, columns: Columns = USUAL) -> Iterator[CaptionRow]:
    """Yield the captions of a table, one or several per row. Raises DataError naming the file and the line."""
    text, separator = table_text(path)
    delimiter, header = _layout(path, text, separator, columns)
    if header is None:
        for number, row in _headless(path, text, delimiter):
            if len(row) != 2:
                raise DataError(
                    f"{path}, line {number}: {counted(len(row), 'column')} instead of an id and a caption; a table "
                    "with more columns needs a header (ID,Caption,...), and a caption that contains the delimiter must "
                    "be quoted"
                )
            yield number, row[0], row[1].removeprefix(" "), {}
        return
    rows = read_rows(path, text, delimiter)
    names = [name.strip() for name in rows[0][1]]
    columns.note(path, names)
    at_id, at_caption = columns.place_of_id(names), columns.place_of_caption(names)
    at_prompt = columns.place_of_prompt(names)
    if at_id is None or at_caption is None:
        raise unknown_header(path, names, columns)
    kept = [i for i, name in enumerate(names) if name and i not in (at_id, at_caption)]
    kept = [i for i in kept if not names[i].startswith("Unnamed: ")]
    for number, cells in rows[1:]:
        row = [cell.removeprefix(" ") for cell in cells] if delimiter == "|" else cells
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {number}: {counted(len(row), 'column')}, but the header has {len(names)}; "
                "a caption that contains the delimiter must be quoted"
            )
        further = {PROMPT if i == at_prompt else names[i]: row[i] for i in kept}
        name = named(names[at_id], row[at_id])
        for caption in _captions(names[at_caption], row[at_caption]):
            yield number, name, caption, further


def _headless(path: Path, text: str, delimiter: str) -> Rows:
    """Return the rows of a table without a header. If each line begins with an image, captions may contain commas."""
    rows, error = _parse(text, delimiter)
    if delimiter == "," and (error or any(len(row) != 2 for _, row in rows)):
        lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if '"' not in text and all(_is_image(line.partition(",")[0]) for _, line in lines):
            return [(number, [line.partition(",")[0], line.partition(",")[2]]) for number, line in lines]
    return read_rows(path, text, delimiter, 2)


def _captions(column: str, cell: str) -> list[str]:
    """Return the captions of a cell. It is one caption, except in Flickr30k's column `raw`, which holds JSON lists."""
    if column.lower() == "raw":
        try:
            captions = json.loads(cell)
        except ValueError:
            return [cell]
        if isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions):
            return captions
    return [cell]


def _layout(path: Path, text: str, separator: str | None, columns: Columns) -> tuple[str, list[str] | None]:
    """Return the delimiter of a table and its header, which is None if it has none.

    A header with known names decides the delimiter. Without one it is a delimiter that every line has. Raises DataError
    if the names of the header are unknown.
    """
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    delimiters = separator or DELIMITERS
    if not lines:
        raise DataError(f"{path} is not a table of captions: it is empty")
    for delimiter in delimiters:
        names = _cells(lines[0], delimiter)
        if len(names) > 1 and None not in (columns.place_of_id(names), columns.place_of_caption(names)):
            return delimiter, names
    for delimiter in delimiters:
        names = _cells(lines[0], delimiter)
        if len(names) > 1 and is_header(names, _others(lines, delimiter), columns):
            columns.note(path, names)
            raise unknown_header(path, names, columns)
    for delimiter in separator or "\t|":
        if all(delimiter in line for line in lines):
            return delimiter, None
    if all("," in line for line in lines):
        return ",", None
    raise DataError(
        f"{path} is not a table of captions: its first line {lines[0][:MOST_SHOWN]!r} is not a header with ID and "
        'Caption, and not every line has a TAB, bar or comma, as in `a1,"CT, axial view"`'
    )


def _cells(line: str, delimiter: str) -> list[str]:
    """Return the cells of a header line."""
    rows, error = _parse(line, delimiter, with_space=True)
    return [cell.strip() for cell in rows[0][1]] if rows and not error else []


def _others(lines: Sequence[str], delimiter: str) -> Others:
    """Return (first cell, rest) of up to 99 lines after the first."""
    parts = [line.partition(delimiter) for line in lines[1:100]]
    return [(first.strip('"'), rest) for first, _, rest in parts]


def _is_image(name: str) -> bool:
    return cut_suffix(name.strip()) != name.strip()


def _ids(path: Path, columns: Columns, whole: bool) -> list[str]:
    """Return the id column of a table, or the lines of a plain list."""
    text, separator = table_text(path)
    lines = [line.rstrip("\r") for line in text.split("\n")]
    header = next((line for line in lines if line), "")
    filled = [line for line in lines if line]
    for delimiter in separator or DELIMITERS:
        names = _cells(header, delimiter)
        at_id = columns.place_of_id(names)
        if len(names) > 1 and at_id is not None:
            columns.note(path, names)
            rows = read_rows(path, text, delimiter)[1:]
            if short := next((number for number, row in rows if len(row) <= at_id), 0):
                raise DataError(f"{path}, line {short}: no column {names[at_id]!r}: the row or the file is incomplete")
            return [row[at_id] if whole else _stem(names[at_id], row[at_id]) for _, row in rows]
        if len(names) > 1 and is_header(names, _others(filled, delimiter), columns):
            raise unknown_header(path, names, columns, captions=False)
    bare = [name.strip('"') if name.startswith('"') and name.endswith('"') else name for name in filled]
    is_headed = columns.place_of_id(bare[:1]) is not None
    if not is_headed and len(bare) > 1 and is_header(bare[:1], [(name, "") for name in bare[1:100]], columns):
        raise unknown_header(path, bare[:1], columns, captions=False)
    return bare[is_headed:]


def _stem(column: str, value: str) -> str:
    """Return the id of a row. In a column of file names it is the name without folder and suffix."""
    return image_id(value) if holds_files(column) else value


def named(column: str, value: str) -> str:
    """Return the value of an id column, with the mark FILE in front if the column holds file names."""
    return FILE + value if holds_files(column) and value else value


def json_rows(path: Path, content: Any, columns: Columns = USUAL) -> tuple[Iterator[CaptionRow], dict[str, str]]:
    """Return the rows of a JSON file, and aliases {other name of an image: id}; see tables.Table.

    The file holds COCO captions or results, all splits at once (Karpathy, R2Gen), a list of objects, or {id: caption}.
    There a caption may also be pycocoevalcap's {"caption": ...} or a list of these.
    """
    aliases: dict[str, str] = {}
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        files = {str(image["id"]): str(image["file_name"]) for image in content.get("images") or []}
        aliases = {number: image_id(file) for number, file in files.items()}
        content = [
            (
                {"file_name": files[str(entry["image_id"])]}
                if str(entry["image_id"]) in files
                else {"image_id": entry["image_id"]}
            )
            | {"caption": entry["caption"], "prompt": entry.get("prompt")}
            for entry in content["annotations"]
        ]
    elif isinstance(content, dict) and (entries := _entries_by_split(content)) is not None:
        content = entries
    elif isinstance(content, dict):
        content = [{"id": name, "caption": _plain(caption)} for name, caption in content.items()]
        columns = USUAL
    if not isinstance(content, list):
        raise DataError(f"{path} holds neither COCO captions nor a list or an object of captions")
    return (
        row for number, entry in enumerate(content, 1) for row in _object_rows(path, number, entry, columns)
    ), aliases


def _plain(caption: Any) -> Any:
    """Return the caption of an entry {"caption": ...}, or those of a list of entries. Other values are unchanged."""
    if isinstance(caption, list):
        return [_plain(entry) for entry in caption]
    return caption.get("caption") if isinstance(caption, dict) else caption


def _entries_by_split(content: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return one object per image of a JSON file that holds all splits, or None for other layouts.

    Karpathy's dataset_coco.json has a list of images with sentences. R2Gen's annotation.json has a list of reports per
    split, and each report belongs to one image or several.
    """
    images = content.get("images")
    if (
        isinstance(images, list)
        and images
        and all(isinstance(image, dict) and "sentences" in image for image in images)
    ):
        return [
            {
                "file_name": "/".join(filter(None, (image.get("filepath"), image["filename"]))),
                "caption": [sentence["raw"] for sentence in image["sentences"]],
                "split": image.get("split", ""),
            }
            for image in images
        ]
    reports = [entry for part in content.values() if isinstance(part, list) for entry in part]
    if reports and all(isinstance(entry, dict) and {"report", "image_path"} <= set(entry) for entry in reports):
        return [
            {"file_name": path, "caption": entry["report"], "split": str(entry.get("split") or split)}
            for split, part in content.items()
            for entry in part
            for path in (entry["image_path"] if isinstance(entry["image_path"], list) else [entry["image_path"]])
        ]
    return None


def jsonl_rows(path: Path, text: str, columns: Columns = USUAL) -> Iterator[CaptionRow]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield from _object_rows(path, number, json.loads(line), columns)


def parquet_rows(path: Path, chosen: Columns = USUAL) -> Iterator[CaptionRow]:
    """Yield the captions of a parquet file. Of a column of images, only the file names are read, not the bytes."""
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
                yield from _object_rows(path, number, {k: v for k, v in flat.items() if v is not None}, chosen)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _object_rows(path: Path, number: int, entry: Any, columns: Columns) -> Iterator[CaptionRow]:
    """Yield the captions of one JSON object: one, several, or the best of an n-best list that this engine wrote."""
    if not isinstance(entry, dict):
        raise DataError(f"{path}, line {number}: not an object with an id and a caption")
    keys = [str(key) for key in entry]
    values = list(entry.values())
    columns.note(path, keys)
    at_id = columns.place_of_id(keys, _id_columns(entry))
    if at_id is None:
        known = ", ".join(ID_COLUMNS)
        raise DataError(
            f"{path}, line {number}: no id among {', '.join(keys)}: give --id-column (known names: {known})"
        )
    name = named(keys[at_id], str(values[at_id]))
    hypotheses, at_caption = entry.get("hypotheses"), columns.place_of_caption(keys)
    value: Any = (
        [hypotheses[0]["text"]] if hypotheses else values[at_caption] if at_caption is not None else _answer(entry)
    )
    captions: list[Any] = value if isinstance(value, list) else [value]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        hint = f" among {', '.join(keys)}: give --caption-column (known names: {', '.join(CAPTION_COLUMNS)})"
        where = hint if at_caption is None and not hypotheses else ""
        raise DataError(f"{path}, line {number}: no caption for {shown(name.removeprefix(FILE))}{where}")
    at_prompt = columns.place_of_prompt(keys)
    further = {
        PROMPT if i == at_prompt else key: ";".join(map(str, v)) if isinstance(v, list) else str(v)
        for i, (key, v) in enumerate(zip(keys, values, strict=True))
        if i not in (at_id, at_caption) and key != "hypotheses" and v is not None and not isinstance(v, dict)
    }
    yield from ((number, name, caption, further) for caption in captions)


def _answer(entry: Mapping[str, Any]) -> Any:
    """Return the caption of a conversation in LLaVA's layout, which is its only answer, or None."""
    turns = entry.get("conversations")
    answers = [turn.get("value") for turn in turns if turn.get("from") == "gpt"] if isinstance(turns, list) else []
    return answers[0] if len(answers) == 1 else None


def _id_columns(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that may hold an id, in order of preference.

    The annotation files of BLIP and LAVIS have both `image_id`, a number, and `image`, a path. The path comes first.
    """
    at_image = find_column(map(str, entry), ("image",))
    image = None if at_image is None else list(entry.values())[at_image]
    if isinstance(image, str) and cut_suffix(image) != image:
        return ("image", "image_id", *ID_COLUMNS)
    return ("image_id", *ID_COLUMNS)

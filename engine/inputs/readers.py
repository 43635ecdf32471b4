"""Read delimited tables and lists of ids; knows nothing of JSON, parquet and scores.

Ids and captions are taken as they are: never sorted or padded, and "NA", "null" and "None" are captions.
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

from engine.errors import DataError, UsageError
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
MAX_FIELD_CHARS = 1 << 20
"""No caption comes near it; the csv module's own limit is smaller than some report texts."""

CaptionRow = tuple[int, str, str, Mapping[str, str]]
"""Line (or record) number, id or file name, caption, further columns. A file name is marked by FILE in front."""
FILE = "\0"
Rows = list[tuple[int, list[str]]]
"""Line number and cells of the rows of a table, rows of blanks left out."""
Others = list[tuple[str, str]]


def read_ids(path: Path, columns: Columns = USUAL, *, whole: bool = False) -> list[str]:
    """Read a list of ids: one a line, or a column of a table; raise DataError naming the file.

    From a column of file names come their ids, or with `whole` the paths as they are.
    """
    ids = _ids(path, columns, whole)
    if not ids:
        raise DataError(f"{path} lists no ids")
    repeated = sorted(name for name, count in Counter(ids).items() if count > 1)
    if repeated:
        raise DataError(f"{path} lists ids more than once: {join_some(repeated)}")
    return ids


def read_columns(path: Path, columns: Columns = USUAL, *, whole: bool = False) -> dict[str, dict[str, str]]:
    """Read a table of anything about images: {column: {id: value}}.

    Ids or file names stand in the column that is headed so, else in the first. From file names come ids, or with
    `whole` the paths as they are. A column without a name is the index that pandas writes, and is left out.

    It has a header, and commas, TABs or bars. Raises DataError naming the file and the line.
    """
    text, separator = table_text(path)
    header_line = text.lstrip("\r\n").partition("\n")[0]
    found = [delimiter for delimiter in DELIMITERS if delimiter in header_line]
    by_id = (d for d in found if columns.place_of_id(header_line.split(d)) is not None)
    delimiter = separator or next(by_id, (found or ",")[0])
    (_, header), *rows = read_rows(path, text, delimiter) or [(1, [""])]
    header = [name.strip() for name in header]
    columns.note(path, header)
    if len(header) < 2:
        raise DataError(f"{path} has only an id column: expected at least one more, after a comma, TAB or bar")
    if len(set(header)) < len(header):
        raise DataError(f"{path} has two columns of one name: {', '.join(header)}")
    place = columns.place_of_id(header) or 0
    prompt = columns.place_of_prompt(header)
    others = [i for i, name in enumerate(header) if i != place and name and not name.startswith("Unnamed: ")]
    if not others:
        raise DataError(f"{path} has only an id column: expected at least one more")
    names = [PROMPT if i == prompt else name for i, name in enumerate(header)]
    found_columns: dict[str, dict[str, str]] = {names[i]: {} for i in others}
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: {len(row)} columns where the header has {len(header)}")
        name = row[place] if whole else _stem(header[place], row[place])
        if name in found_columns[names[others[0]]]:
            raise DataError(f"{path}, line {number}: {name} is there twice")
        refuse_bytes(path, (row[i] for i in others))
        for i in others:
            found_columns[names[i]][name] = row[i]
    return found_columns


def read_text(path: Path, *, names: bool = False) -> str:
    """Return the text of a file, line ends as they are: UTF-8, or UTF-16 where a byte order mark says so.

    With `names` bytes that are not UTF-8 come as Python decodes file names (surrogateescape), so that a run of such
    files can be read; `refuse_bytes` refuses them elsewhere. Raises DataError naming the file for other encodings and
    for what is not text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return decode_text(path, content, names=names)


def decode_text(path: Path, content: bytes, *, names: bool = False) -> str:
    """Return the text of a file's content, see read_text."""
    if content and (what := wrong_content(content[:512]) or packed_content(content[:4096], path.suffix)):
        raise DataError(f"{path} is not text but {what}")
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding, "surrogateescape" if names and encoding != "utf-16" else "strict")
    except UnicodeDecodeError as error:
        what = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise DataError(f"{path} cannot be read: byte {error.start} is not {what}{_saved_by(what)}") from error
    if "\0" in text[:4096]:
        raise DataError(f"{path} holds bytes of zero: is it UTF-16 without a byte order mark? save it as UTF-8")
    return text


def refuse_bytes(path: Path, texts: Iterable[str]) -> None:
    """Raise DataError where a text that is not a name holds bytes that are not UTF-8, see read_text."""
    if any(re.search("[\udc80-\udcff]", text) for text in texts):
        content = path.read_bytes()
        try:
            content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            at = f"byte {error.start} is not UTF-8"
            raise DataError(f"{path} cannot be read: {at}{_saved_by('UTF-8')}") from error


def _saved_by(encoding: str) -> str:
    return "" if encoding == "UTF-16" else " (saved by Excel? choose `CSV UTF-8` there)"


def table_text(path: Path) -> tuple[str, str | None]:
    """Return the text of a table, and the delimiter that a line `sep=;` of Excel names.

    That line, blank lines and comments (`# ...`) before the first row become empty lines, so that line numbers stay.
    """
    text, separator, start = read_text(path, names=True), None, 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        line = text[start:end].strip("\r\n")
        if found := re.fullmatch(r'"?sep=(.)"?', line):
            separator = found[1]
        elif line.strip() and not line.startswith("# "):
            break
        start = end
    return "\n" * text.count("\n", 0, start) + text[start:], separator


def read_rows(path: Path, text: str, delimiter: str, width: int | None = None) -> Rows:
    """Return the rows of a table, each with the number of its last line; raise DataError naming file and line.

    Only commas and semicolons come with quotes: a bar or a TAB ends an id, and a quotation mark is part of the caption.
    Where the header itself is quoted, a program wrote the quotes for all columns. Quotes as hands write them, after a
    space or escaped as `\\"`, are taken where every row then has `width` columns (those of the first row when None).
    """
    rows, trouble = _parse(text, delimiter)
    width = width or len(rows[0][1] if rows else ())
    is_odd = any(re.fullmatch(r'(?s)\s+".*"\s*', cell) for _, row in rows for cell in row) and delimiter in ",;"
    if delimiter in ",;" and (trouble or is_odd or any(len(row) != width for _, row in rows)):
        unescaped = text.replace('\\"', '""')
        for variant, with_space in ((text, True), (unescaped, False), (unescaped, True)):
            other, fault = _parse(variant, delimiter, with_space)
            if not fault and other and all(len(row) == width for _, row in other):
                return other
    if trouble:
        raise DataError(f"{path}, {trouble}")
    return rows


def _parse(text: str, delimiter: str, with_space: bool = False) -> tuple[Rows, str]:
    """Return the rows of a table up to the first that cannot be read, and what is wrong with that one."""
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
    """Yield the captions of a table, one a row or several; raise DataError naming the file and the line."""
    text, separator = table_text(path)
    delimiter, header = _layout(path, text, separator, columns)
    if header is None:
        for number, row in _headless(path, text, delimiter):
            if len(row) != 2:
                raise DataError(
                    f"{path}, line {number}: {len(row)} columns instead of an id and a caption; more columns need a "
                    "header, ID,Caption,..., and a caption that holds the delimiter must be quoted"
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
                f"{path}, line {number}: {len(row)} columns where the header has {len(names)}; "
                "a caption that holds the delimiter must be quoted"
            )
        further = {PROMPT if i == at_prompt else names[i]: row[i] for i in kept}
        name = named(names[at_id], row[at_id])
        for caption in _captions(names[at_caption], row[at_caption]):
            yield number, name, caption, further


def _headless(path: Path, text: str, delimiter: str) -> Rows:
    """Return rows without a header. Where each begins with an image, commas after the first are the caption's."""
    rows, trouble = _parse(text, delimiter)
    if delimiter == "," and (trouble or any(len(row) != 2 for _, row in rows)):
        lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if '"' not in text and all(_is_image(line.partition(",")[0]) for _, line in lines):
            return [(number, [line.partition(",")[0], line.partition(",")[2]]) for number, line in lines]
    return read_rows(path, text, delimiter, 2)


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


def _layout(path: Path, text: str, separator: str | None, columns: Columns) -> tuple[str, list[str] | None]:
    """Return the delimiter and the header, None for a table without one.

    By the header, else by what every line has. Raises DataError for a header of unknown names.
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
        f"{path} is not a table of captions: it has neither a header with ID and Caption nor one TAB, bar or comma "
        'a line, as in `a1,"CT, axial view"`'
    )


def _cells(line: str, delimiter: str) -> list[str]:
    """Return the cells of a header line."""
    rows, trouble = _parse(line, delimiter, with_space=True)
    return [cell.strip() for cell in rows[0][1]] if rows and not trouble else []


def _others(lines: Sequence[str], delimiter: str) -> Others:
    """Return the first cell and the rest of some lines after the first."""
    parts = [line.partition(delimiter) for line in lines[1:100]]
    return [(first.strip('"'), rest) for first, _, rest in parts]


def _is_image(name: str) -> bool:
    return cut_suffix(name.strip()) != name.strip()


def _ids(path: Path, columns: Columns, whole: bool) -> list[str]:
    """Return the column of a table whose header has a name of ids, else the lines as they are."""
    text, separator = table_text(path)
    lines = [line.rstrip("\r") for line in text.split("\n")]
    header = next((line for line in lines if line), "")
    filled = [line for line in lines if line]
    for delimiter in separator or DELIMITERS:
        names = _cells(header, delimiter)
        place = columns.place_of_id(names)
        if len(names) > 1 and place is not None:
            columns.note(path, names)
            rows = [row for _, row in read_rows(path, text, delimiter) if len(row) > place]
            return [row[place] if whole else _stem(names[place], row[place]) for row in rows][1:]
        if len(names) > 1 and is_header(names, _others(filled, delimiter), columns):
            raise unknown_header(path, names, columns, captions=False)
    bare = [name.strip('"') if name.startswith('"') and name.endswith('"') else name for name in filled]
    is_headed = columns.place_of_id(bare[:1]) is not None
    if not is_headed and len(bare) > 1 and is_header(bare[:1], [(one, "") for one in bare[1:100]], columns):
        raise unknown_header(path, bare[:1], columns, captions=False)
    return bare[is_headed:]


def _stem(column: str, value: str) -> str:
    """Return the id of a row of a manifest: a file name without folder and suffix where the column holds them."""
    return image_id(value) if holds_files(column) else value


def named(column: str, value: str) -> str:
    """Return a row's id, or its file name marked as one."""
    return FILE + value if holds_files(column) and value else value


def json_rows(path: Path, content: Any, columns: Columns = USUAL) -> tuple[Iterator[CaptionRow], dict[str, str]]:
    """Return the rows of a JSON file, and other names of its images with their ids; see Table.

    It holds COCO captions or results, all splits at once (Karpathy, R2Gen), a list of objects, or {id: caption}, where
    a caption may also be pycocoevalcap's {"caption": ...} or a list of these.
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
        raise DataError(f"{path} is neither COCO captions nor a list or an object of captions")
    return (
        row for number, entry in enumerate(content, 1) for row in _object_rows(path, number, entry, columns)
    ), aliases


def _plain(caption: Any) -> Any:
    """Return the caption or captions of an entry {"caption": ...} or a list of such, anything else as it is."""
    if isinstance(caption, list):
        return [_plain(one) for one in caption]
    return caption.get("caption") if isinstance(caption, dict) else caption


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


def jsonl_rows(path: Path, text: str, columns: Columns = USUAL) -> Iterator[CaptionRow]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield from _object_rows(path, number, json.loads(line), columns)


def parquet_rows(path: Path, chosen: Columns = USUAL) -> Iterator[CaptionRow]:
    """Read everything but images: of a column that holds them, the file name next to the bytes."""
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
    """Yield the captions of one JSON object: an id, and a caption, several, or the best of our own n-best lists."""
    if not isinstance(entry, dict):
        raise DataError(f"{path}, line {number}: not an object with an id and a caption")
    keys = [str(key) for key in entry]
    values = list(entry.values())
    columns.note(path, keys)
    at_id = columns.place_of_id(keys, _id_columns(entry))
    if at_id is None:
        known = ", ".join(ID_COLUMNS)
        raise DataError(f"{path}, line {number}: no id among {', '.join(keys)}: give --id-column (known are {known})")
    name = named(keys[at_id], str(values[at_id]))
    hypotheses, at_caption = entry.get("hypotheses"), columns.place_of_caption(keys)
    value: Any = (
        [hypotheses[0]["text"]] if hypotheses else values[at_caption] if at_caption is not None else _answer(entry)
    )
    captions: list[Any] = value if isinstance(value, list) else [value]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        known = f" among {', '.join(keys)}: give --caption-column (known are {', '.join(CAPTION_COLUMNS)})"
        where = known if at_caption is None and not hypotheses else ""
        raise DataError(f"{path}, line {number}: no caption for {shown(name.removeprefix(FILE))}{where}")
    at_prompt = columns.place_of_prompt(keys)
    further = {
        PROMPT if i == at_prompt else key: ";".join(map(str, v)) if isinstance(v, list) else str(v)
        for i, (key, v) in enumerate(zip(keys, values, strict=True))
        if i not in (at_id, at_caption) and key != "hypotheses" and v is not None and not isinstance(v, dict)
    }
    yield from ((number, name, caption, further) for caption in captions)


def _answer(entry: Mapping[str, Any]) -> Any:
    """Return the caption of a conversation in LLaVA's layout: its only answer; None for anything else."""
    turns = entry.get("conversations")
    said = [one.get("value") for one in turns if one.get("from") == "gpt"] if isinstance(turns, list) else []
    return said[0] if len(said) == 1 else None


def _id_columns(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that may hold an id, the best first: a path to an image says more than a number next to it.

    BLIP's and LAVIS' annotation files have both, and name the image by `image`.
    """
    place = find_column(map(str, entry), ("image",))
    image = None if place is None else list(entry.values())[place]
    if isinstance(image, str) and cut_suffix(image) != image:
        return ("image", "image_id", *ID_COLUMNS)
    return ("image_id", *ID_COLUMNS)

"""Rows of captions from JSON, JSON lines and parquet; knows nothing of delimited tables and scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import DataError, UsageError
from engine.inputs.columns import CAPTION_COLUMNS, ID_COLUMNS, PROMPT, USUAL, Columns, find_column
from engine.inputs.delimited import FILE, CaptionRow, named
from engine.inputs.ids import shown
from engine.inputs.kinds import cut_suffix, image_id


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

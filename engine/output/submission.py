"""Submission files of ImageCLEFmedical Caption: write one, and check any as strictly as the organisers' checker
does.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import EngineError, UsageError
from engine.output.run import CONTROL, format_row, replace_file
from engine.tables import shorten

MEMBER = "submission.csv"
"""The only file in the archive of 2025 and 2026."""
MAX_BYTES = 1 << 28
"""No submission comes near it; an archive may claim anything."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Format:
    """One year's file: in an archive or not, a header or not, and what separates id and caption."""

    is_zip: bool
    is_headed: bool = True
    delimiter: str = ","


FORMATS = {
    "imageclef2022": Format(is_zip=False, is_headed=False, delimiter="|"),
    "imageclef2023": Format(is_zip=False),
    "imageclef2024": Format(is_zip=False),
    "imageclef2025": Format(is_zip=True),
    "imageclef2026": Format(is_zip=True),
}


def write_submission(captions: Mapping[str, str], ids: Sequence[str], name: str, out: Path) -> list[str]:
    """Write captions of `ids`, in that order, as the format `name`; read the file back, check it, and return notes.

    Raises UsageError where captions and ids do not fit or the file name does not, EngineError when the file just
    written does not pass.
    """
    form = FORMATS[name]
    if form.is_zip != (out.suffix.lower() == ".zip"):
        wanted = "an archive: name it submission.zip" if form.is_zip else "a plain file: name it submission.csv"
        raise UsageError(f"{name} takes {wanted}, not {out.name}")
    missing = [one for one in ids if one not in captions]
    if missing:
        raise UsageError(f"the run lacks {len(missing)} ids of the manifest: {shorten(missing)}")
    extra = sorted(set(captions) - set(ids))
    if extra:
        raise UsageError(f"the run has {len(extra)} ids that the manifest has not: {shorten(extra)}")
    content = "".join(_row(one, captions[one], form) for one in ids).encode("utf-8")
    content = b"ID,Caption\n" + content if form.is_headed else content
    replace_file(out, _archive(content) if form.is_zip else content)
    problems = check_submission(out, ids, name)
    if problems:
        raise EngineError(f"{out} was written and does not pass the check: {problems[0]}")
    empty = sum(not captions[one].strip() for one in ids)
    return [f"{empty} captions are empty"] if empty else []


def check_submission(path: Path, ids: Sequence[str], name: str) -> list[str]:
    """Return what is wrong with a submission, by line, nothing when it is right.

    The rules are those of the 2026 checker, applied to every year with its own delimiter and header.
    """
    form = FORMATS[name]
    try:
        content = _read(path, form)
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return [f"byte {error.start} is not UTF-8"]
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        return [str(error)]
    if text.startswith("\ufeff"):
        return ["it begins with a byte order mark"]
    lines = text.split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    for number, line in enumerate(lines, 1):
        if not line.strip():
            return [f"line {number} is blank"]
    if not lines:
        return ["it is empty"]
    problems: list[str] = []
    if form.is_headed and next(csv.reader([lines[0].rstrip("\r")])) != ["ID", "Caption"]:
        problems.append(f"line 1: the header is {lines[0].strip()!r} instead of 'ID,Caption'")
    rows = lines[1:] if form.is_headed else lines
    found = [
        one
        for number, line in enumerate(rows, 2 if form.is_headed else 1)
        if (one := _check_line(number, line, form, problems)) is not None
    ]
    return problems + _check_ids(found, ids)


def _check_line(number: int, line: str, form: Format, problems: list[str]) -> str | None:
    """Return the id of a line, or None where it cannot be told; append what is wrong."""
    line = line.removesuffix("\r")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if form.delimiter == "," else csv.QUOTE_NONE
    try:
        (row,) = csv.reader(io.StringIO(line, newline=""), delimiter=form.delimiter, quoting=quoting, strict=True)
    except (csv.Error, ValueError):
        problems.append(f"line {number}: quotation marks that do not match, or a caption with a line break in it")
        return None
    if len(row) != 2:
        problems.append(
            f"line {number}: {len(row)} columns instead of an id and a caption; a caption with a comma must be quoted"
        )
        return None
    image_id, caption = row
    if image_id.lower().endswith(IMAGE_SUFFIXES):
        problems.append(f"line {number}: the id {image_id} ends like a file name")
    if image_id != image_id.strip() or caption != caption.strip():
        problems.append(f"line {number}: white space at an end of the id or the caption")
    if CONTROL.search(image_id + caption):
        problems.append(f"line {number}: a control character or a line separator")
    return image_id


def _check_ids(found: Sequence[str], ids: Sequence[str]) -> list[str]:
    problems = []
    counts, expected = Counter(found), set(ids)
    for what, names in (
        ("ids are there twice", [one for one, count in counts.items() if count > 1]),
        ("ids are not in the manifest", [one for one in counts if one not in expected]),
        ("ids are missing", [one for one in ids if one not in counts]),
    ):
        if names:
            problems.append(f"{len(names)} {what}: {shorten(names)}")
    if not problems and list(found) != list(ids):
        place = next(i for i, (a, b) in enumerate(zip(found, ids, strict=True)) if a != b)
        problems.append(f"other order than the manifest: row {place + 1} is {found[place]} instead of {ids[place]}")
    return problems


def _row(image_id: str, caption: str, form: Format) -> str:
    if form.delimiter == ",":
        return format_row(image_id, caption)
    text = CONTROL.sub(" ", caption.replace(form.delimiter, " ")).strip()
    return f"{image_id}{form.delimiter}{text}\n"


def _archive(content: bytes) -> bytes:
    """Return a zip whose bytes depend on the content alone."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), content, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _read(path: Path, form: Format) -> bytes:
    if not form.is_zip:
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if [member.filename for member in members] != [MEMBER]:
            names = shorten([member.filename for member in members])
            raise ValueError(f"the archive holds {names or 'nothing'} instead of {MEMBER} alone")
        if members[0].file_size > MAX_BYTES:
            raise ValueError(f"{MEMBER} is larger than {MAX_BYTES} bytes")
        with archive.open(MEMBER) as stream:
            return stream.read(MAX_BYTES)

"""Submission files of ImageCLEFmedical Caption: write one, and check any as strictly as the organisers' checker
does.
"""

from __future__ import annotations

import csv
import io
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import DataError, EngineError, UsageError
from engine.files.atomic import replace_file
from engine.files.run_files import CONTROL, format_row
from engine.inputs.columns import USUAL, Columns
from engine.inputs.delimited import read_ids
from engine.inputs.ids import Ids, join_some
from engine.inputs.kinds import cut_suffix, image_id

MEMBER = "submission.csv"
"""The only file in the archive of 2025 and 2026."""
MAX_BYTES = 1 << 28
"""No submission comes near it; an archive may claim anything."""


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


def manifest_ids(manifest: Path, columns: Columns = USUAL) -> tuple[list[str], list[str]]:
    """Return the ids of a submission in their order, and notes on what is odd about their list.

    A list of files (`ls`) stands for their ids. The organisers' list is in the order of its numbers, and their checker
    takes no other order, while `ls` puts 10 before 2.
    """
    ids, notes = read_ids(manifest, columns), []
    if all(cut_suffix(one) != one for one in ids):
        ids = [image_id(one) for one in ids]
        notes.append(f"{manifest} lists files: ids are their names without suffix")
    numbers = [re.fullmatch(r"(.*?)(\d+)", one) for one in ids]
    pairs = [(one[1], int(one[2])) for one in numbers if one is not None]
    if len(pairs) == len(ids) and len({prefix for prefix, _ in pairs}) == 1:
        row = next((i for i in range(1, len(pairs)) if pairs[i][1] < pairs[i - 1][1]), None)
        if row is not None:
            notes.append(
                f"{manifest} is not in numeric order: row {row + 1} is {ids[row]}, after {ids[row - 1]}; the "
                "organisers' checker takes no order but that of their own list (sort -V sorts by numbers)"
            )
    return ids, notes


def write_submission(captions: Mapping[str, str], ids: Sequence[str], name: str, out: Path) -> list[str]:
    """Write captions of `ids`, in that order, as the format `name`; read the file back, check it, and return notes.

    Raises DataError where captions and ids do not fit, UsageError where the file name does not, EngineError when the
    file just written does not pass.
    """
    form = FORMATS[name]
    if form.is_zip != (out.suffix.lower() == ".zip"):
        wanted = "an archive: name it submission.zip" if form.is_zip else "a plain file: name it submission.csv"
        raise UsageError(f"{name} takes {wanted}, not {out.name}")
    found = Ids(captions).find_all(ids, "the manifest")
    meant = set(found.values())
    others = {name: caption for name, caption in captions.items() if name not in meant}
    captions = others | {name: captions[one] for name, one in found.items()}
    missing = [one for one in ids if one not in captions]
    if missing:
        raise DataError(f"the run lacks {len(missing)} ids of the manifest: {join_some(missing)}")
    extra = sorted(set(captions) - set(ids))
    if extra:
        raise DataError(f"the run has {len(extra)} ids that the manifest has not: {join_some(extra)}")
    refused = [one for one in ids if not one.isprintable() and re.search("[\ud800-\udfff]", one)]
    if refused:
        raise DataError(f"ids that are not UTF-8 cannot be in a submission: rename {join_some(refused)}")
    content = "".join(_row(one, captions[one], form) for one in ids).encode("utf-8")
    content = b"ID,Caption\n" + content if form.is_headed else content
    replace_file(out, _archive(content) if form.is_zip else content)
    verdict = check_submission(out, ids, name)
    if verdict.errors or verdict.warnings:
        raise EngineError(f"{out} was written and does not pass: {(verdict.errors + verdict.warnings)[0]}")
    empty = sum(not captions[one].strip() for one in ids)
    return [f"{empty} captions are empty"] if empty else []


@dataclass(frozen=True)
class Verdict:
    """What the organisers' checker would refuse, and what it takes but a careful writer would not hand in; by line."""

    errors: list[str]
    warnings: list[str]


def check_submission(path: Path, ids: Sequence[str], name: str) -> Verdict:
    """Check a submission by the rules of the 2026 checker, applied to every year with its own delimiter and header."""
    form = FORMATS[name]
    try:
        text = _read(path, form).decode("utf-8")
    except UnicodeDecodeError as error:
        return Verdict([f"byte {error.start} is not UTF-8"], [])
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        return Verdict([f"it cannot be read: {error}"], [])
    if text.startswith("\ufeff"):
        return Verdict(["it begins with a byte order mark"], [])
    lines = text.splitlines()
    blank = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if not lines or blank is not None:
        return Verdict([f"line {blank} is blank" if lines else "it is empty"], [])
    try:
        return _check_rows(text, lines, form, ids)
    except csv.Error as error:
        return Verdict([f"it is no table: {error}"], [])


def _check_rows(text: str, lines: Sequence[str], form: Format, ids: Sequence[str]) -> Verdict:
    verdict = Verdict([], [])
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if form.delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=form.delimiter, quoting=quoting)
    if form.is_headed and (header := next(reader)) != ["ID", "Caption"]:
        verdict.errors.append(f"line 1: the header is {form.delimiter.join(header)!r} instead of 'ID,Caption'")
    found = []
    start = reader.line_num
    for row in reader:
        number, is_one_line = start + 1, reader.line_num == start + 1
        start = reader.line_num
        if len(row) != 2:
            what = f"{len(row)} columns instead of an id and a caption; a caption with a comma must be quoted"
            verdict.errors.append(f"line {number}: {what}")
            continue
        image_id, caption = row
        found.append(image_id)
        behind = lines[number - 1].partition(form.delimiter)[2] if number <= len(lines) else ""
        is_quoted = is_one_line and behind.startswith('"') and behind.endswith('"')
        if form.delimiter == "," and "," in caption and not is_quoted:
            verdict.errors.append(f"line {number}: a caption with a comma must be quoted, from end to end of one line")
        if image_id != image_id.strip():
            verdict.errors.append(f"line {number}: white space at an end of the id")
        if caption != caption.strip():
            verdict.warnings.append(f"line {number}: white space at an end of the caption")
        if CONTROL.search(caption):
            verdict.warnings.append(f"line {number}: a line break or another control character in the caption")
    return Verdict(verdict.errors + _check_ids(found, ids), verdict.warnings)


def _check_ids(found: Sequence[str], ids: Sequence[str]) -> list[str]:
    problems = []
    counts, expected = Counter(found), set(ids)
    for what, names in (
        ("ids are there twice", [one for one, count in counts.items() if count > 1]),
        ("ids are not in the manifest", [one for one in counts if one not in expected]),
        ("ids are missing", [one for one in ids if one not in counts]),
    ):
        if names:
            problems.append(f"{len(names)} {what}: {join_some(names)}")
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
            names = join_some([member.filename for member in members])
            raise ValueError(f"the archive holds {names or 'nothing'} instead of {MEMBER} alone")
        if members[0].file_size > MAX_BYTES:
            raise ValueError(f"{MEMBER} is larger than {MAX_BYTES} bytes")
        with archive.open(MEMBER) as stream:
            return stream.read(MAX_BYTES)

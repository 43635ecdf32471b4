"""Submission files of ImageCLEFmedical Caption: write one, and check any as strictly as the organisers' checker
does.
"""

from __future__ import annotations

import codecs
import csv
import io
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import DataError, EngineError, UsageError
from engine.files.atomic import replace_file
from engine.inputs.columns import USUAL, Columns
from engine.inputs.ids import Ids, join_some
from engine.inputs.kinds import cut_suffix, image_id
from engine.inputs.readers import read_ids
from engine.run.outputs import CONTROL, format_row

MEMBER = "submission.csv"
"""The only file in the archive of 2025 and 2026."""
MAX_BYTES = 1 << 28
"""No submission comes near it; an archive may claim anything."""
MAX_LINE = 1 << 20
"""Characters; no caption comes near it, and a line is held in memory."""
MOST_PROBLEMS = 100
"""Errors at which a check stops: a file of wrong lines alone has as many as lines."""


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
    """What the organisers' checker would refuse, and what it takes but a careful writer would not hand in; by line.

    Neither holds more than MOST_PROBLEMS entries. `is_whole` is False where the check stopped before the end.
    """

    errors: list[str]
    warnings: list[str]
    is_whole: bool = True


def check_submission(path: Path, ids: Sequence[str], name: str) -> Verdict:
    """Check a submission by the rules of the 2026 checker, applied to every year with its own delimiter and header.

    The file is read line by line and no further than its first MOST_PROBLEMS errors or one row more than `ids`, so that
    an archive of any size takes little memory.
    """
    form = FORMATS[name]
    try:
        with _open(path, form) as text:
            return _check_rows(_Lines(text, form, len(ids)), form, ids)
    except csv.Error as error:
        return Verdict([f"it is not a table: {error}"], [], is_whole=False)
    except _RefusedError as error:
        return Verdict([str(error)], [], is_whole=False)
    except UnicodeDecodeError:
        return Verdict([f"byte {_first_not_utf8(path, form)} is not UTF-8"], [], is_whole=False)
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        return Verdict([f"it cannot be read: {error}"], [], is_whole=False)


class _RefusedError(Exception):
    """What makes the organisers' checker refuse a file without looking at its rows."""


class _Lines(Iterator[str]):
    """The lines of a submission as the csv module needs them, checked on their way as the organisers check theirs.

    Theirs also end at form feeds, U+2028 and what else `str.splitlines` knows, and the n-th of these lines, not the
    line of the n-th row, is where they look at how the n-th row is quoted. `unquoted` has the numbers of those that
    they would refuse, as far as there can be rows. Raises _RefusedError for a blank line, a byte order mark or a line
    that is too long for a caption.
    """

    def __init__(self, text: io.TextIOWrapper, form: Format, rows: int) -> None:
        self._text, self._delimiter, self._most = text, form.delimiter, rows + 2
        self._read, self._number = 0, 0  # lines as the csv module counts them, and as the organisers do
        self.unquoted: set[int] = set()

    def __next__(self) -> str:
        line = self._text.readline(MAX_LINE)
        if not line:
            if not self._number:
                raise _RefusedError("it is empty")
            raise StopIteration
        if not self._number and line.startswith("\ufeff"):
            raise _RefusedError("it begins with a byte order mark")
        self._read += 1
        for part in (parts := line.splitlines()):
            self._number += 1
            if not part.strip():
                where = " before or after a line separator (a form feed, U+2028, ...)" if len(parts) > 1 else ""
                raise _RefusedError(f"line {self._read} is blank{where}")
            if self._number <= self._most and _is_unquoted(part.partition(self._delimiter)[2], self._delimiter):
                self.unquoted.add(self._number)
        if len(line) == MAX_LINE:
            raise _RefusedError(f"line {self._read} has {MAX_LINE} characters or more")
        return line


def _is_unquoted(text: str, delimiter: str) -> bool:
    """Return whether what follows the first comma of a line has another one and is not in quotes from end to end."""
    return delimiter == "," and "," in text and not (text.startswith('"') and text.endswith('"'))


def _check_rows(lines: _Lines, form: Format, ids: Sequence[str]) -> Verdict:
    errors: list[str] = []
    warnings: list[str] = []
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if form.delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=form.delimiter, quoting=quoting)
    if form.is_headed and (header := next(reader)) != ["ID", "Caption"]:
        errors.append(f"line 1: the header is {form.delimiter.join(header)[:200]!r} instead of 'ID,Caption'")
    found: list[str] = []
    start = reader.line_num
    for count, row in enumerate(reader, 1):
        where = f"line {start + 1}"
        start = reader.line_num
        if count > len(ids):
            errors.append(f"{where}: more rows than the {len(ids)} ids of the manifest")
        if len(row) != 2:
            errors.append(
                f"{where}: {len(row)} columns instead of an id and a caption; a caption with a comma must be quoted"
            )
        else:
            found.append(row[0])
            if "," in row[1] and count + form.is_headed in lines.unquoted:
                errors.append(f"{where}: a caption with a comma must be quoted, from end to end of one line")
            if row[0] != row[0].strip():
                errors.append(f"{where}: white space at an end of the id")
            if len(warnings) < MOST_PROBLEMS and row[1] != row[1].strip():
                warnings.append(f"{where}: white space at an end of the caption")
            if len(warnings) < MOST_PROBLEMS and CONTROL.search(row[1]):
                warnings.append(f"{where}: a line break or another control character in the caption")
        if count > len(ids) or len(errors) >= MOST_PROBLEMS:
            problems = _check_ids(found, ids, is_whole=False)
            return Verdict([*errors, *problems][:MOST_PROBLEMS], warnings, is_whole=False)
    return Verdict(errors + _check_ids(found, ids), warnings)


def _check_ids(found: Sequence[str], ids: Sequence[str], *, is_whole: bool = True) -> list[str]:
    """Return what is wrong with the ids `found`; in what is not the whole file missing ids are not known."""
    problems = []
    counts, expected = Counter(found), set(ids)
    for what, names in (
        ("ids are there twice", [one for one, count in counts.items() if count > 1]),
        ("ids are not in the manifest", [one for one in counts if one not in expected]),
        ("ids are missing", [one for one in ids if one not in counts and is_whole]),
    ):
        if names:
            problems.append(f"{len(names)} {what}: {join_some(names)}")
    if is_whole and not problems and list(found) != list(ids):
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


@contextmanager
def _open(path: Path, form: Format) -> Iterator[io.TextIOWrapper]:
    """Open the table of a submission. Raises ValueError for what cannot be one."""
    if not form.is_zip:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        with path.open(encoding="utf-8", newline="") as text:
            yield text
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if [member.filename for member in members] != [MEMBER]:
            names = join_some([member.filename for member in members])
            raise ValueError(f"the archive holds {names or 'nothing'} instead of {MEMBER} alone")
        if members[0].file_size > MAX_BYTES:
            raise ValueError(f"{MEMBER} is larger than {MAX_BYTES} bytes")
        with archive.open(MEMBER) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
            yield text


def _first_not_utf8(path: Path, form: Format) -> int:
    """Return the place of the first byte of a submission that is not UTF-8."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(path, form) as text:
        while chunk := bytes(text.buffer.read(1 << 16)):
            begun = len(decoder.getstate()[0])  # bytes of a character that began in the chunk before
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return start - begun + error.start
            start += len(chunk)
        return start - len(decoder.getstate()[0])

"""Write and check submission files of ImageCLEFmedical Caption, by the rules of the organisers' checker."""

from __future__ import annotations

import codecs
import csv
import io
import lzma
import re
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import DataError, EngineError, UsageError, counted
from engine.files.atomic import replace_file
from engine.inputs.columns import USUAL, Columns
from engine.inputs.ids import Ids, join_some
from engine.inputs.kinds import cut_suffix, image_id
from engine.inputs.readers import read_ids
from engine.run.outputs import CONTROL, format_row

MEMBER = "submission.csv"
"""Name of the only file in a zip submission (2025 and 2026)."""
MAX_BYTES = 1 << 28
"""Largest size of a submission in bytes, far above any real one. It bounds what a malicious archive can unpack to."""
MAX_LINE = 1 << 20
"""Longest line in characters, far above any caption; a line is held in memory."""
MOST_PROBLEMS = 100
"""Number of errors at which a check stops. A file with only wrong lines has one error per line."""


@dataclass(frozen=True)
class Format:
    """The file format of one year: zip archive or plain, header or not, and the delimiter between id and caption."""

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
    """Return the ids of a submission in the order of `manifest`, and notes on a suspicious list.

    If every entry is a file name, as in the output of `ls`, the ids are the names without suffix. A list that is not in
    numeric order gets a note: the organisers' list is, their checker requires its order, and `ls` puts 10 before 2.
    """
    ids, notes = read_ids(manifest, columns), []
    if all(cut_suffix(name) != name for name in ids):
        ids = [image_id(name) for name in ids]
        notes.append(f"{manifest} lists files: the ids are their names without suffix")
        if repeated := sorted(name for name, count in Counter(ids).items() if count > 1):
            raise DataError(f"{manifest} lists several files of one name, so that ids repeat: {join_some(repeated)}")
    numbers = [re.fullmatch(r"(.*?)(\d+)", name) for name in ids]
    pairs = [(match[1], int(match[2])) for match in numbers if match is not None]
    if len(pairs) == len(ids) and len({prefix for prefix, _ in pairs}) == 1:
        row = next((i for i in range(1, len(pairs)) if pairs[i][1] < pairs[i - 1][1]), None)
        if row is not None:
            notes.append(
                f"{manifest} is not in numeric order: row {row + 1} is {ids[row]}, after {ids[row - 1]}; the "
                "organisers' checker accepts only the order of their own list: if this is not theirs, `sort -V` sorts "
                "by number"
            )
    return ids, notes


def write_submission(captions: Mapping[str, str], ids: Sequence[str], name: str, out: Path) -> list[str]:
    """Write the captions of `ids` in that order in the format `name` and return notes.

    Raises DataError if captions and ids do not match, UsageError if the suffix of `out` does not fit the format, and
    EngineError if the file would not pass the check; an earlier file then stays.
    """
    form = FORMATS[name]
    if form.is_zip != (out.suffix.lower() == ".zip"):
        wanted = "an archive: name it submission.zip" if form.is_zip else "a plain file: name it submission.csv"
        raise UsageError(f"{name} takes {wanted}, not {out.name}")
    # {id: name in the run}: the run may write an id differently, for example with a folder or a suffix
    run_names = Ids(captions).find_all(ids, "the manifest")
    matched = set(run_names.values())
    unmatched = {name: caption for name, caption in captions.items() if name not in matched}
    captions = unmatched | {name: captions[run_name] for name, run_name in run_names.items()}
    missing = [name for name in ids if name not in captions]
    if missing:
        raise DataError(
            f"the run has no caption for {counted(len(missing), 'id')} of the manifest: {join_some(missing)}"
        )
    extra = sorted(set(captions) - set(ids))
    if extra:
        raise DataError(
            f"the run has {counted(len(extra), 'id that is', 'ids that are')} not in the manifest: {join_some(extra)}"
        )
    undecodable = [name for name in ids if not name.isprintable() and re.search("[\ud800-\udfff]", name)]
    if undecodable:
        raise DataError(f"ids that are not UTF-8 cannot be in a submission: rename {join_some(undecodable)}")
    content = "".join(_row(name, captions[name], form) for name in ids).encode("utf-8")
    content = b"ID,Caption\n" + content if form.is_headed else content
    file = _archive(content) if form.is_zip else content
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / out.name
        draft.write_bytes(file)
        verdict = check_submission(draft, ids, name)
    if verdict.errors or verdict.warnings:
        problem = (verdict.errors + verdict.warnings)[0]
        raise EngineError(f"{out} was not written, because it would not pass the check: {problem}")
    replace_file(out, file)
    return verdict.notes


@dataclass(frozen=True)
class Verdict:
    """The result of a check: `errors` that the organisers' checker rejects, and `warnings` that it accepts, by line.

    Each holds at most MOST_PROBLEMS entries. `is_whole` is False if the check stopped before the end of the file.
    `empty` is the number of empty captions, which the organisers accept.
    """

    errors: list[str]
    warnings: list[str]
    is_whole: bool = True
    empty: int = 0

    @property
    def notes(self) -> list[str]:
        """A note for the user if captions are empty."""
        return [f"{counted(self.empty, 'caption is', 'captions are')} empty"] if self.empty else []


def check_submission(path: Path, ids: Sequence[str], name: str) -> Verdict:
    """Check a submission by the rules of the 2026 checker, with the delimiter and header of the year `name`.

    The file is read line by line, up to MOST_PROBLEMS errors or one row more than `ids`, so that an archive of any size
    needs little memory.
    """
    form = FORMATS[name]
    try:
        with _open(path, form) as text:
            return _check_rows(_Lines(text, form, len(ids)), form, ids)
    except csv.Error as error:
        return Verdict([f"not a table: {error}"], [], is_whole=False)
    except _RejectedError as error:
        return Verdict([str(error)], [], is_whole=False)
    except UnicodeDecodeError:
        return Verdict([f"byte {_first_not_utf8(path, form)} is not UTF-8"], [], is_whole=False)
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        return Verdict([f"the file cannot be read: {error}"], [], is_whole=False)


class _RejectedError(Exception):
    """Raised for a fault for which the organisers' checker rejects a file without reading its rows."""


class _Lines(Iterator[str]):
    """Iterate over the lines of a submission for the csv module, and check them as the organisers' checker does.

    That checker splits lines with `str.splitlines`, which also splits at form feeds, U+2028 and other separators. To
    see whether the n-th row is quoted, it looks at the n-th of these lines, even if the n-th row is elsewhere.
    `unquoted` collects the numbers of the lines that it would reject, up to the number of expected rows.

    Raises _RejectedError for a blank line, a byte order mark or a line that is too long for a caption.
    """

    def __init__(self, text: io.TextIOWrapper, form: Format, rows: int) -> None:
        self._text, self._delimiter, self._last = text, form.delimiter, rows + 2
        self._read, self._number = 0, 0  # lines as counted by the csv module, and by str.splitlines
        self.unquoted: set[int] = set()

    def __next__(self) -> str:
        line = self._text.readline(MAX_LINE)
        if not line:
            if not self._number:
                raise _RejectedError("the file is empty")
            raise StopIteration
        if not self._number and line.startswith("\ufeff"):
            raise _RejectedError("the file begins with a byte order mark")
        self._read += 1
        for part in (parts := line.splitlines()):
            self._number += 1
            if not part.strip():
                where = " before or after a line separator (a form feed, U+2028, ...)" if len(parts) > 1 else ""
                raise _RejectedError(f"line {self._read} is blank{where}")
            if self._number <= self._last and _is_unquoted(part.partition(self._delimiter)[2], self._delimiter):
                self.unquoted.add(self._number)
        if len(line) == MAX_LINE:
            raise _RejectedError(f"line {self._read} has {MAX_LINE} characters or more")
        return line


def _is_unquoted(text: str, delimiter: str) -> bool:
    """Return whether the text after the first comma of a line has another comma and is not quoted from end to end."""
    return delimiter == "," and "," in text and not (text.startswith('"') and text.endswith('"'))


def _check_rows(lines: _Lines, form: Format, ids: Sequence[str]) -> Verdict:
    errors: list[str] = []
    warnings: list[str] = []
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if form.delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=form.delimiter, quoting=quoting)
    if form.is_headed and (header := next(reader)) != ["ID", "Caption"]:
        errors.append(f"line 1: the header is {form.delimiter.join(header)[:200]!r} instead of 'ID,Caption'")
    names: list[str] = []
    empty = 0
    start = reader.line_num
    for count, row in enumerate(reader, 1):
        where = f"line {start + 1}"
        start = reader.line_num
        if count > len(ids):
            errors.append(f"{where}: more rows than the {counted(len(ids), 'id')} of the manifest")
        if len(row) != 2:
            errors.append(
                f"{where}: {counted(len(row), 'column')} instead of an id and a caption; a caption with a comma must "
                "be quoted"
            )
        else:
            names.append(row[0])
            empty += not row[1].strip()
            if "," in row[1] and count + form.is_headed in lines.unquoted:
                errors.append(f"{where}: a caption with a comma must be quoted, from end to end of one line")
            if row[0] != row[0].strip():
                errors.append(f"{where}: white space before or after the id")
            if len(warnings) < MOST_PROBLEMS and row[1] != row[1].strip():
                warnings.append(f"{where}: white space before or after the caption")
            if len(warnings) < MOST_PROBLEMS and CONTROL.search(row[1]):
                warnings.append(f"{where}: a line break or other control character in the caption")
        if count > len(ids) or len(errors) >= MOST_PROBLEMS:
            problems = _check_ids(names, ids, is_whole=False)
            return Verdict([*errors, *problems][:MOST_PROBLEMS], warnings, is_whole=False)
    return Verdict(errors + _check_ids(names, ids), warnings, empty=empty)


def _check_ids(names: Sequence[str], ids: Sequence[str], *, is_whole: bool = True) -> list[str]:
    """Return the problems of the ids `names` of a file. Missing ids are only reported if the whole file was read."""
    problems = []
    counts, expected = Counter(names), set(ids)
    for what, affected in (
        (("id occurs twice", "ids occur twice"), [name for name, count in counts.items() if count > 1]),
        (
            ("id is not in the manifest", "ids are not in the manifest"),
            [name for name in counts if name not in expected],
        ),
        (("id is missing", "ids are missing"), [name for name in ids if name not in counts and is_whole]),
    ):
        if affected:
            problems.append(f"{counted(len(affected), *what)}: {join_some(affected)}")
    if is_whole and not problems and list(names) != list(ids):
        row = next(i for i, (a, b) in enumerate(zip(names, ids, strict=True)) if a != b)
        problems.append(f"the order differs from the manifest: row {row + 1} is {names[row]} instead of {ids[row]}")
    return problems


def _row(image_id: str, caption: str, form: Format) -> str:
    if form.delimiter == ",":
        return format_row(image_id, caption)
    text = CONTROL.sub(" ", caption.replace(form.delimiter, " ")).strip()
    return f"{image_id}{form.delimiter}{text}\n"


def _archive(content: bytes) -> bytes:
    """Return a zip archive whose bytes depend only on the content: no time stamp."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), content, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


@contextmanager
def _open(path: Path, form: Format) -> Iterator[io.TextIOWrapper]:
    """Open the table of a submission. Raises ValueError if it is too large or the archive has other members."""
    if not form.is_zip:
        if zipfile.is_zipfile(path):
            raise ValueError("it is an archive, but this year's format is a plain file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        with path.open(encoding="utf-8", newline="") as text:
            yield text
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if [member.filename for member in members] != [MEMBER]:
            names = join_some([member.filename for member in members])
            raise ValueError(f"the archive holds {names or 'nothing'} instead of only {MEMBER}")
        if members[0].file_size > MAX_BYTES:
            raise ValueError(f"{MEMBER} is larger than {MAX_BYTES} bytes")
        with archive.open(MEMBER) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
            yield text


def _first_not_utf8(path: Path, form: Format) -> int:
    """Return the offset of the first byte of a submission that is not UTF-8."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(path, form) as text:
        while chunk := bytes(text.buffer.read(1 << 16)):
            pending = len(decoder.getstate()[0])  # bytes of a character that started in the previous chunk
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return start - pending + error.start
            start += len(chunk)
        return start - len(decoder.getstate()[0])

"""Files that a run writes: run.csv, n-best, timings, and sidecars next to the images."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from engine.captions import Caption
from engine.errors import OutputError, UsageError
from engine.files.atomic import LONGEST_NAME, replace_file, write_atomically
from engine.files.lock import folder_lock
from engine.inputs.images import ImageFile
from engine.inputs.kinds import cut_suffix, open_regular
from engine.inputs.read_ahead import read_ahead
from engine.inputs.tables import MAX_SIDECAR_BYTES

CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]+")
"""Control characters and everything some reader takes for a line break."""


CSV_HEADER = "ID,Caption\n"


@dataclass(frozen=True)
class Row:
    """What a run says of an image: its id, its file, the text, and why there is none.

    Without a text, not even an empty one, it has no line in a run.csv.
    """

    id: str
    file: str
    text: str | None
    error: str = ""


def one_line(text: str) -> str:
    """Return a text on one line, without white space around it."""
    return CONTROL.sub(" ", text).strip()


def format_json(row: Row) -> str:
    """Return one line of JSON: id, file, caption, and the error of an image that cannot be read; bytes of file names
    that are not UTF-8 as lone surrogates, escaped.
    """
    entry = {"id": row.id, "file": row.file}
    entry |= {} if row.text is None else {"caption": row.text}
    entry |= {"error": row.error} if row.error else {}
    return _json_line(entry)


def _json_line(entry: Mapping[str, Any]) -> str:
    """Return an object as one line of valid JSON: half characters (bytes of file names) are escaped, not written."""
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def format_row(image_id: str, caption: str) -> str:
    """Return one line of run.csv: the id bare where it may be, the caption always quoted, on one line."""
    text = one_line(caption).replace('"', '""')
    return f'{_format_id(image_id)},"{text}"\n'


def _format_id(image_id: str) -> str:
    if any(character in image_id for character in ',"\r\n'):
        return '"' + image_id.replace('"', '""') + '"'
    return image_id


def write_run(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write (id, caption) rows as run.csv: UTF-8, header `ID,Caption`, in the order given."""
    write_atomically(path, CSV_HEADER + "".join(format_row(image_id, caption) for image_id, caption in rows))


def write_json_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON, one a line, in the order given."""
    write_atomically(path, "".join(map(format_json, rows)))


def write_timings(path: Path, rows: Iterable[tuple[str, float | None]]) -> None:
    """Write (id, latency in seconds) rows as CSV: UTF-8, header `ID,latency_s`; an empty cell where it is unknown."""
    lines = (f"{_format_id(name)},{'' if seconds is None else f'{seconds:.6f}'}\n" for name, seconds in rows)
    write_atomically(path, "ID,latency_s\n" + "".join(lines))


def write_n_best(path: Path, captions: Iterable[Caption], *, drawn: bool = False) -> None:
    """Write one JSON object a line: id, whether its hypotheses were drawn and not searched for, and these with text,
    raw_text, ids, sum_log_prob and score.
    """
    lines = []
    for caption in captions:
        hypotheses = [
            {
                "text": alternative.text,
                "raw_text": alternative.raw_text,
                "ids": list(alternative.ids),
                "sum_log_prob": alternative.sum_log_prob,
                "score": alternative.score,
            }
            for alternative in caption.alternatives
        ]
        lines.append(_json_line({"id": caption.id, "drawn": drawn, "hypotheses": hypotheses}))
    write_atomically(path, "".join(lines))


SUFFIX = ".txt"
WRITERS = 8
"""Files that are written at a time: each waits for the disk."""
OWN_SEPARATOR = ",.;:"
"""A text that begins so, or with white space, is joined to the one before it without a space."""


def sidecar_paths(images: Iterable[ImageFile], folder: Path | None) -> dict[str, Path]:
    """Return the text file of each image, by id: beside it, or below `folder` where it lies below its root.

    Raises UsageError where two images would share one, or have none.
    """
    paths: dict[str, Path] = {}
    owners: dict[Path, ImageFile] = {}
    for image in images:
        if folder is None and image.folder is not None:
            raise UsageError(f"{image.source} lies at a URI, where no sidecar can be written: add --sidecar-dir")
        place = image.path if folder is None else folder / image.inside
        if folder is not None and ".." in image.inside.parts:
            raise UsageError(f"the sidecar of {image.source} would lie outside of --sidecar-dir {folder}")
        path = place.with_name(cut_suffix(place.name) + SUFFIX)
        if (owner := owners.setdefault(path, image)) is not image:
            raise UsageError(f"{owner.source} and {image.source} would share the sidecar {path}: rename one of them")
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise UsageError(f"the name of {image.source} is too long for a sidecar: shorten it")
        paths[image.id] = path
    return paths


def check_sidecars(paths: Mapping[str, Path], mode: str, folder: Path | None, kept: Mapping[Path, str]) -> None:
    """Refuse sidecars that cannot be written, lie behind a link or would take the place of a file that is `kept`.

    `kept` says in words what each file is. Raises UsageError.
    """
    taken = {os.path.realpath(path): what for path, what in kept.items()}
    if folder is not None and not folder.parent.is_dir():
        raise UsageError(f"--sidecar-dir {folder}: {folder.parent} does not exist, create it first")
    real = {parent: _check_folder(parent, folder) for parent in {path.parent for path in paths.values()}}
    for path in paths.values():
        if (what := taken.get(os.path.join(real[path.parent], path.name))) is not None:  # noqa: PTH118 (names as bytes)
            raise UsageError(f"the sidecar {path} would overwrite {what}")
        if mode == "skip":
            continue
        try:
            found = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(found):
            kind = "a link" if stat.S_ISLNK(found) else "a folder, a pipe or a device"
            raise UsageError(f"the sidecar {path} is {kind}, which is not written to: remove it or use --sidecar skip")


def _check_folder(parent: Path, root: Path | None) -> str:
    """Return where a folder for sidecars really is or will be; raise UsageError where nothing may be written there."""
    if root is not None:
        _refuse_links(parent, root)
    there = next(place for place in (parent, *parent.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"sidecars cannot be written into {parent}: {there} is not a folder that is writable")
    return os.path.realpath(parent)


def _refuse_links(parent: Path, root: Path) -> None:
    for place in (parent, *parent.parents):
        if place == root:
            return
        if place.is_symlink():
            raise UsageError(f"{place} is a link, and sidecars do not follow it out of --sidecar-dir: remove it")


def write_sidecars(
    texts: Mapping[str, str], paths: Mapping[str, Path], mode: str, folder: Path | None = None
) -> tuple[int, int]:
    """Write the texts, by image id, into their files; return how many were written and how many left as they were.

    A file appears whole or not at all, and one that has its text already is left alone: a run that was killed in
    between does the rest. `append` and `prepend` keep what is there, see `joined`. Raises OutputError.
    """
    written = 0
    wanted = sorted((paths[name].parent, paths[name], text) for name, text in texts.items())
    for parent, group in groupby(wanted, key=lambda one: one[0]):
        if folder is not None:
            _make_folder(parent, folder)
        with folder_lock(parent):
            done = read_ahead(lambda one: _write(one[1], one[2], mode), group, threads=WRITERS, window=4 * WRITERS)
            written += sum(done)
    return written, len(texts) - written


def _make_folder(parent: Path, root: Path) -> None:
    _refuse_links(parent, root)
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{parent} cannot be made: {error.strerror}") from error


def _write(path: Path, text: str, mode: str) -> bool:
    """Write one sidecar; return False where it is left as it is."""
    if mode == "skip" and os.path.lexists(path):
        return False
    old = _read(path)
    new = joined(old, text, mode) if old is not None else _ended(text.strip())
    if new == old:
        return False
    replace_file(path, new.encode("utf-8", "surrogateescape"), follow=False)
    return True


def _read(path: Path) -> str | None:
    """Return what a sidecar holds, bytes that are no UTF-8 as surrogates; None where there is none."""
    try:
        with open_regular(path, MAX_SIDECAR_BYTES, follow=False) as stream:
            content = stream.read()
    except ValueError as error:
        raise OutputError(f"{path} is not the text of an image ({error}): move it away") from error
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise OutputError(f"{path} is UTF-16: save it as UTF-8")
    return content.decode("utf-8", "surrogateescape")


def joined(old: str, text: str, mode: str) -> str:
    """Return the content of a sidecar that holds `old` once `text` is written: in its place, behind or before it.

    Between them stands a space, unless the second begins with white space or one of OWN_SEPARATOR, or the first ends
    with white space. What begins or ends with the text already, as that would be, is left as it is: that a run writes
    twice, because it was killed or called again, changes nothing. A byte order mark stays in front.
    """
    if mode == "overwrite":
        return _ended(text.strip())
    mark, body = ("\ufeff", old[1:]) if old.startswith("\ufeff") else ("", old)
    content = body.strip()
    if not text or content == text.strip():
        return old
    if mode == "append":
        new = text.rstrip()
        rest = content.removesuffix(new).rstrip()
        is_there = content.endswith(new) and _with_space(rest, new) == content
        whole = _with_space(body.rstrip(), new)
    else:
        new = text.lstrip()
        rest = content.removeprefix(new).lstrip()
        is_there = content.startswith(new) and _with_space(new, rest) == content
        whole = _with_space(new, body.strip())
    return old if is_there else mark + _ended(whole if content else text.strip())


def _with_space(first: str, second: str) -> str:
    is_apart = not first or not second or first[-1].isspace() or second[0].isspace() or second[0] in OWN_SEPARATOR
    return first + second if is_apart else f"{first} {second}"


def _ended(text: str) -> str:
    return f"{text}\n" if text else ""

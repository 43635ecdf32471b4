"""Write the files of a run: run.csv, JSON lines, n-best, timings, attention, and sidecars next to the images."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from engine.attention import attention_path, is_attention_of, write_attention
from engine.captions import Caption
from engine.errors import OutputError, UsageError
from engine.files.atomic import LONGEST_NAME, replace_file, write_atomically
from engine.files.lock import folder_lock
from engine.inputs.images import ImageFile
from engine.inputs.kinds import cut_suffix, open_regular
from engine.inputs.read_ahead import read_ahead
from engine.inputs.tables import MAX_SIDECAR_BYTES

CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]+")
"""Control characters, and everything that some reader treats as a line break."""


CSV_HEADER = "ID,Caption\n"


@dataclass(frozen=True)
class Row:
    """The result for one image: id, file, text, and the error if it cannot be read.

    With the text None an image has no line in run.csv; an empty text is written.
    """

    id: str
    file: str
    text: str | None
    error: str = ""


def one_line(text: str) -> str:
    """Return a text on one line, without white space at its ends."""
    return CONTROL.sub(" ", text).strip()


def format_json(row: Row) -> str:
    """Return one line of JSON: id, file, caption, and the error of an image that cannot be read.

    Bytes of file names that are not UTF-8 become escaped lone surrogates.
    """
    entry = {"id": row.id, "file": row.file}
    entry |= {} if row.text is None else {"caption": row.text}
    entry |= {"error": row.error} if row.error else {}
    return _json_line(entry)


def _json_line(entry: Mapping[str, Any]) -> str:
    """Return an object as one line of valid JSON, with lone surrogates (bytes of file names) escaped."""
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def format_row(image_id: str, caption: str) -> str:
    """Return one line of run.csv: the id quoted only if necessary, the caption always quoted, on one line."""
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
    """Write rows as JSON lines, in the order given."""
    write_atomically(path, "".join(map(format_json, rows)))


def write_timings(path: Path, rows: Iterable[tuple[str, float | None]]) -> None:
    """Write (id, latency in seconds) rows as CSV: UTF-8, header `ID,latency_s`, empty cells for unknown values."""
    lines = (f"{_format_id(name)},{'' if seconds is None else f'{seconds:.6f}'}\n" for name, seconds in rows)
    write_atomically(path, "ID,latency_s\n" + "".join(lines))


def write_n_best(
    path: Path,
    captions: Iterable[Caption],
    *,
    drawn: bool = False,
    verdicts: Mapping[str, Mapping[str, float | bool | None]] = {},
) -> None:
    """Write one JSON object per line: id, drawn (whether the captions were sampled), confidence and hypotheses.

    Each hypothesis has the fields of Alternative, `confidence` those of Confidence. `verdicts` are further keys by
    image id: expected_score and review.
    """
    lines = []
    for caption in captions:
        entry = {"id": caption.id, "drawn": drawn, "confidence": vars(caption.confidence)}
        entry |= verdicts.get(caption.id, {})
        lines.append(_json_line(entry | {"hypotheses": [vars(alternative) for alternative in caption.alternatives]}))
    write_atomically(path, "".join(lines))


def write_review(path: Path, rows: Iterable[tuple[str, float | None]]) -> None:
    """Write (id, expected score) rows as CSV: UTF-8, header `ID,expected_score`, empty cells for unknown values."""
    lines = (f"{_format_id(name)},{'' if expected is None else expected}\n" for name, expected in rows)
    write_atomically(path, "ID,expected_score\n" + "".join(lines))


class AttentionFiles:
    """The files of --attention, one per image in `folder`, with attention averaged over `layers`."""

    def __init__(self, folder: Path, layers: Sequence[int]) -> None:
        self.folder, self.layers = folder, tuple(layers)

    def has(self, caption: Caption) -> bool:
        """Return whether the file of a caption is there: for the same tokens, averaged over the same layers."""
        return is_attention_of(attention_path(self.folder, caption.id), caption.ids[1:], self.layers)

    def write(self, caption: Caption) -> None:
        """Write the file of a caption. Raises OutputError."""
        assert caption.attention is not None, "it was asked for"
        path = attention_path(self.folder, caption.id)
        _make_folder(path.parent, self.folder)
        write_attention(path, caption.attention)


def check_attention(folder: Path, ids: Iterable[str]) -> None:
    """Raise UsageError if the files of --attention cannot be written."""
    if not folder.parent.is_dir():
        raise UsageError(f"--attention {folder}: {folder.parent} does not exist, create it first")
    existing = folder if folder.exists() else folder.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"--attention {folder}: {existing} is not a writable folder")
    for image_id in ids:
        attention_path(folder, image_id)  # raises UsageError for an id that is not a file name


SUFFIX = ".txt"
WRITERS = 8
"""Number of files that are written in parallel, as each waits for the disk."""
OWN_SEPARATOR = ",.;:"
"""A text that begins with one of these, or with white space, is appended without a space."""


def sidecar_paths(images: Iterable[ImageFile], folder: Path | None) -> dict[str, Path]:
    """Return {image id: path of its text file}: next to the image, or in `folder` at the same relative path.

    Raises UsageError if two images would share a sidecar, or if an image cannot have one.
    """
    paths: dict[str, Path] = {}
    owners: dict[Path, ImageFile] = {}
    for image in images:
        if folder is None and image.folder is not None:
            raise UsageError(f"{image.source} is at a URI, where no sidecar can be written: add --sidecar-dir")
        location = image.path if folder is None else folder / image.inside
        if folder is not None and ".." in image.inside.parts:
            raise UsageError(f"the sidecar of {image.source} would be outside of --sidecar-dir {folder}")
        path = location.with_name(cut_suffix(location.name) + SUFFIX)
        if (owner := owners.setdefault(path, image)) is not image:
            raise UsageError(f"{owner.source} and {image.source} would share the sidecar {path}: rename one of them")
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise UsageError(f"the name of {image.source} is too long for a sidecar: shorten it")
        paths[image.id] = path
    return paths


def check_sidecars(paths: Mapping[str, Path], mode: str, folder: Path | None, reserved: Mapping[Path, str]) -> None:
    """Raise UsageError if a sidecar cannot be written, is reached through a link, or would overwrite a file.

    `reserved` are the files that must not be overwritten, with descriptions for the message.
    """
    taken = {os.path.realpath(path): description for path, description in reserved.items()}
    if folder is not None and not folder.parent.is_dir():
        raise UsageError(f"--sidecar-dir {folder}: {folder.parent} does not exist, create it first")
    real = {parent: _check_folder(parent, folder) for parent in {path.parent for path in paths.values()}}
    for path in paths.values():
        if (other := taken.get(os.path.join(real[path.parent], path.name))) is not None:  # noqa: PTH118 (names as bytes)
            raise UsageError(f"the sidecar {path} would overwrite {other}")
        if mode == "skip":
            continue
        try:
            file_mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(file_mode):
            kind = "a link" if stat.S_ISLNK(file_mode) else "a folder, a pipe or a device"
            raise UsageError(
                f"the sidecar {path} is {kind}, which is never overwritten: remove it, or use --sidecar skip"
            )


def _check_folder(parent: Path, root: Path | None) -> str:
    """Return the real path of a folder for sidecars, existing or not. Raises UsageError if it is not writable."""
    if root is not None:
        _refuse_links(parent, root)
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"sidecars cannot be written to {parent}: {existing} is not a writable folder")
    return os.path.realpath(parent)


def _refuse_links(parent: Path, root: Path) -> None:
    """Raise UsageError if a folder between `root` and `parent` is a link, which may lead out of `root`."""
    for folder in (parent, *parent.parents):
        if folder == root:
            return
        if folder.is_symlink():
            raise UsageError(f"{folder} is a link, which could lead out of {root}: remove it")


def write_sidecars(
    texts: Mapping[str, str], paths: Mapping[str, Path], mode: str, folder: Path | None = None
) -> tuple[int, int]:
    """Write the texts, by image id, into their files; return how many were written and how many are unchanged.

    Each file is written atomically, and a file that has its text already is not changed, so that a run that was killed
    can be repeated. `append` and `prepend` keep the existing text, see `joined`. Raises OutputError.
    """
    written = 0
    wanted = sorted((paths[name].parent, paths[name], text) for name, text in texts.items())
    for parent, group in groupby(wanted, key=lambda entry: entry[0]):
        if folder is not None:
            _make_folder(parent, folder)
        with folder_lock(parent):
            done = read_ahead(
                lambda entry: _write(entry[1], entry[2], mode), group, threads=WRITERS, window=4 * WRITERS
            )
            written += sum(done)
    return written, len(texts) - written


def _make_folder(parent: Path, root: Path) -> None:
    _refuse_links(parent, root)
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{parent} cannot be created: {error.strerror}") from error


def _write(path: Path, text: str, mode: str) -> bool:
    """Write one sidecar; return False if it is not changed."""
    if mode == "skip" and os.path.lexists(path):
        return False
    old = _read(path)
    new = joined(old, text, mode) if old is not None else _ended(text.strip())
    if new == old:
        return False
    replace_file(path, new.encode("utf-8", "surrogateescape"), follow=False)
    return True


def _read(path: Path) -> str | None:
    """Return the text of a sidecar, with bytes that are not UTF-8 as surrogates, or None if there is no file."""
    try:
        with open_regular(path, MAX_SIDECAR_BYTES, follow=False) as stream:
            content = stream.read()
    except ValueError as error:
        raise OutputError(f"{path} is not the text file of an image ({error}): move it away") from error
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise OutputError(f"{path} is UTF-16: save it as UTF-8")
    return content.decode("utf-8", "surrogateescape")


def joined(old: str, text: str, mode: str) -> str:
    """Return the new content of a sidecar with the content `old`: `text` overwrites, follows or precedes it.

    The two are separated by a space, unless the second begins with white space or one of OWN_SEPARATOR, or the first
    ends with white space. If `old` already begins or ends with the text, joined in that way, it is returned unchanged:
    a run that writes twice, because it was killed or repeated, does not add the text twice. A byte order mark stays in
    front.
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

"""Divide a run among independent jobs (`--shard 3/8`) and merge their outputs into those of one run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.errors import DataError, UsageError
from engine.files.atomic import check_outputs, file_sha256, replace_file, write_atomically
from engine.run.job import Shard

NOTE = ".shard"
"""Suffix of the note next to each output of a shard."""


@dataclass(frozen=True)
class ShardNote:
    """What `engine merge` must know about an output of a shard; a JSON file next to it.

    shard    which part it is, such as 3/8
    run      identifies the run: sha256 of what must be equal in all its shards; see `signature` for most of that
    output   the option that wrote the file, such as --out
    places   for each line, the place of its image among all images of the run, counted from 0
    header   number of lines before these
    sha256   sha256 of the file
    """

    shard: str
    run: str
    signature: str
    output: str
    places: list[int]
    header: int
    sha256: str


def write_notes(
    shard: Shard,
    outputs: Mapping[str, tuple[Path, Iterable[bool], int]],
    all_ids: Sequence[str],
    signature: str,
    settings: Sequence[object],
) -> None:
    """Write the note of each output of a shard.

    `outputs` has, by option, the file, whether each image of the shard has a line in it, and the lines of its header.
    `all_ids` are those of the whole run. `settings` must be equal in all shards, in addition to the signature.
    """
    run = hashlib.sha256(json.dumps([shard.count, list(all_ids), signature, list(settings)]).encode()).hexdigest()
    for option, (path, has_line, header) in outputs.items():
        own = shard.part(range(len(all_ids)))
        places = [place for place, is_there in zip(own, has_line, strict=True) if is_there]
        note = ShardNote(str(shard), run, signature, option, places, header, file_sha256(path))
        write_atomically(_note_path(path), json.dumps(asdict(note)) + "\n")


def merge(paths: Sequence[Path], out: Path) -> int:
    """Merge the same output of all shards of a run into `out`, the bytes of one run; return the number of lines.

    Raises DataError if a file or its note is missing, was changed or belongs to another run, and if a shard is missing
    or given twice. Raises UsageError if `out` cannot be written.
    """
    check_outputs({"--out": out}, [*paths, *map(_note_path, paths)])
    notes = {path: _read_note(path) for path in paths}
    first = paths[0]
    seen: dict[str, Path] = {}
    for path, note in notes.items():
        if note.output != notes[first].output:
            raise DataError(f"{first} is from {notes[first].output} and {path} from {note.output}: merge them apart")
        if note.run != notes[first].run:
            raise DataError(f"{first} and {path} are not of one run: {_difference(notes[first], note)}")
        if (other := seen.setdefault(note.shard, path)) is not path:
            raise DataError(f"{other} and {path} are both shard {note.shard}: give each shard once")
    count = Shard.parse(notes[first].shard).count
    if missing := [name for number in range(count) if (name := f"{number + 1}/{count}") not in seen]:
        raise DataError(
            f"{len(missing)} of {count} shards {'is' if len(missing) == 1 else 'are'} missing: "
            f"{', '.join(missing[:10])}: add their files"
        )
    lines: dict[int, bytes] = {}
    header: list[bytes] = []
    for path, note in notes.items():
        content = list(_lines(path.read_bytes(), quoted=note.header > 0))
        if len(content) != note.header + len(note.places):
            raise DataError(f"{_note_path(path)} does not fit {path}: caption this shard again")
        header = content[: note.header]
        lines.update(zip(note.places, content[note.header :], strict=True))
    replace_file(out, b"".join(header + [lines[place] for place in sorted(lines)]))
    return len(lines)


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + NOTE)


def _read_note(path: Path) -> ShardNote:
    note_path = _note_path(path)
    try:
        note = ShardNote(**json.loads(note_path.read_text(encoding="utf-8")))
        Shard.parse(note.shard)
    except FileNotFoundError as error:
        raise DataError(f"there is no {note_path}: only files that --shard wrote can be merged") from error
    except OSError as error:
        raise DataError(f"{note_path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, UsageError) as error:
        raise DataError(f"{note_path} is damaged: caption this shard again") from error
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if digest != note.sha256:
        raise DataError(f"{path} was changed after --shard wrote it: caption this shard again")
    return note


def _difference(first: ShardNote, second: ShardNote) -> str:
    """Say in which part of their signatures two notes differ, such as `num_beams:4 and num_beams:1`."""
    pairs = zip(first.signature.split("|"), second.signature.split("|"), strict=False)
    differing = [f"{one} and {other}" for one, other in pairs if one != other]
    return differing[0] if differing else "they differ in images, prompts, shards or the options for the text"


def _lines(content: bytes, *, quoted: bool) -> Iterator[bytes]:
    """Yield the lines with their ends; in CSV (`quoted`) an id may contain line breaks, between quotes."""
    line = b""
    for part in re.findall(rb"[^\n]*\n", content):  # unlike splitlines, not at a carriage return
        line += part
        if not quoted or line.count(b'"') % 2 == 0:
            yield line
            line = b""

"""What is wrong with the captioned images of a split, and the rest of it; knows nothing of layouts and models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from engine.errors import DataError, ImageError
from engine.host import available_cores
from engine.inputs.pixels import CLIP, CLIPPED, FRAMES, TRANSPARENT, ImageNote, decode_image
from train.data.dataset import Split
from train.data.problems import Problems, is_empty

Progress = Callable[[int, int], None]
"""Told how many images of how many are done."""
T = TypeVar("T")
R = TypeVar("R")

REASONS = {
    CLIPPED: "values above 255 become white; high_bit_depth scale keeps their range",
    TRANSPARENT: "which is dropped",
    FRAMES: "the first is used",
}
"""What becomes of the images of a kind of note."""
AT_ONCE = 512
"""Images handed to the threads at a time: Ctrl-C and a full queue of 70,000 both wait for no more."""


def check_split(
    split: Split,
    *,
    decode: bool = True,
    depth: str = CLIP,
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
    lost_in: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> Problems:
    """Return what reading the split found, and what only its pictures and a tokenizer can tell.

    With `decode` every picture is decoded once, in threads, as `depth` says (engine/inputs/pixels.py). `count_tokens`
    returns the length of a caption as the model gets it, its prompt in front, and `max_tokens` is what fits: both count
    [DEC] and [SEP]. `lost_in` returns what a text loses when it is tokenized: "", ACCENTS or WORDS
    (prompts.lost_in_tokens).
    Raises EngineError for trouble that is the system's and not the picture's, such as too many open files.
    """
    gone = {name for name, _ in split.problems.missing}
    files = {example.image: example.id for example in split.examples if example.id not in gone} if decode else {}
    notes: list[ImageNote] = []
    reasons = in_threads(partial(_why_unreadable, depth=depth, notes=notes), list(files), progress)
    unreadable = [(name, why) for name, why in zip(files.values(), reasons, strict=True) if why]
    cut = []
    if count_tokens is not None and max_tokens is not None:
        for example in split.examples:
            tokens = count_tokens(example.text)
            if tokens > max_tokens:
                cut.append((example.id, f"{tokens} tokens where {max_tokens} fit"))
    noted = {
        kind: sorted((files[Path(note.name)], reason) for note in notes if note.kind == kind)
        for kind, reason in REASONS.items()
    }
    noted |= _lost(split, lost_in) if lost_in is not None else {}
    return replace(split.problems, unreadable=unreadable, cut=cut, **noted)


def _lost(split: Split, lost_in: Callable[[str], str]) -> dict[str, list[tuple[str, str]]]:
    """Return the captions of a split that lose something in the tokenizer, by what they lose."""
    found: dict[str, list[tuple[str, str]]] = {}
    for example in split.examples:
        if what := lost_in(example.text):
            found.setdefault(what, []).append((example.id, ""))
    return found


def _why_unreadable(path: Path, *, depth: str, notes: list[ImageNote]) -> str:
    try:
        decode_image(path, depth=depth, notes=notes)
    except ImageError as error:
        return error.reason
    except MemoryError:
        return "needs more memory than is free"
    return ""


def in_threads(work: Callable[[T], R], items: list[T], progress: Progress | None = None) -> Iterator[R]:
    """Yield work(item) in the order of the items, computed in as many threads as there are cores for this process."""
    with ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(items), AT_ONCE):
            yield from pool.map(work, items[start : start + AT_ONCE])
            if progress is not None:
                progress(min(start + AT_ONCE, len(items)), len(items))


def drop_unusable(split: Split, problems: Problems) -> Split:
    """Return the split minus missing images, unreadable images and empty captions; raise DataError if nothing is left.

    Of an image with several captions only the empty ones go.
    """
    lost = {name for name, _ in (*problems.missing, *problems.unreadable)}
    silent = {name for name, _ in problems.empty}
    kept = [
        example
        for example in split.examples
        if example.id not in lost and not (example.id in silent and is_empty(example.caption))
    ]
    if not kept:
        raise DataError(f"{split.captions_file}: no usable example is left of split {split.name}: {_why(problems)}")
    rest = replace(problems, missing=[], unreadable=[], empty=[])
    return replace(split, examples=kept, problems=rest)


def _why(problems: Problems) -> str:
    return "; ".join(problems.fatal.lines(1)) or "it had none"


def fingerprint(split: Split) -> str:
    """Return a sha256 (hexadecimal) over ids, captions, image file sizes in bytes and prompts where there are any, in
    the order of the examples.

    Pictures are not read, so that 70,000 of them take a second: one replaced by another of the same size goes unseen. A
    missing file has the size -1. The order counts because training's shuffle starts from it; names of folders do not.
    """
    digest = hashlib.sha256()
    sizes = _sizes(example.image for example in split.examples)
    for example in split.examples:
        prompt = [example.prompt] if example.prompt else []
        digest.update(json.dumps([example.id, example.caption, sizes[example.image], *prompt]).encode() + b"\n")
    return digest.hexdigest()


def _sizes(paths: Iterable[Path]) -> dict[Path, int]:
    sizes = {}
    for path in dict.fromkeys(paths):
        try:
            sizes[path] = path.stat().st_size
        except OSError:
            sizes[path] = -1
    return sizes

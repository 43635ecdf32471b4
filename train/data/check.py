"""Check the images and captions of a split, drop the unusable examples and compute a fingerprint of the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from engine.errors import DataError, ImageError
from engine.host import available_cores
from engine.inputs.depth import CLIP
from engine.inputs.pixels import CLIPPED, FRAMES, TRANSPARENT, ImageNote, decode_image
from train.data.examples import ACCENTS, WORDS, Finding, Problems, Split

T = TypeVar("T")
R = TypeVar("R")

REASONS = {
    CLIPPED: "values above 255 become white; high_bit_depth scale keeps their range",
    TRANSPARENT: "which is dropped",
    FRAMES: "the first is used",
}
"""How an image is read, by the kind of note that reading it gives."""
AT_ONCE = 512
"""Images submitted to the threads at a time. With all 70,000 in the queue, Ctrl-C would wait for every one of them."""


def check_split(
    split: Split,
    *,
    decode: bool = True,
    depth: str = CLIP,
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
    lost_in: Callable[[str], str] | None = None,
) -> Problems:
    """Return the problems of a split: those found while reading it, and those of its images and tokenized captions.

    With `decode`, every image is decoded once, in threads; `depth` is explained in engine/inputs/pixels.py.
    `count_tokens` returns the length of a caption with its prompt, as the model gets it, and `max_tokens` is the limit.
    Both include [DEC] and [SEP]. `lost_in` returns what a text loses when it is tokenized: "", ACCENTS or WORDS
    (train.data.batches.lost_in_tokens).
    Raises EngineError for errors of the system rather than of an image, such as too many open files.
    """
    missing = {name for name, _ in split.problems.missing}
    files = {example.image: example.id for example in split.examples if example.id not in missing} if decode else {}
    notes: list[ImageNote] = []

    def why_unreadable(path: Path) -> str:
        try:
            decode_image(path, depth=depth, notes=notes)
        except ImageError as error:
            return error.reason
        except MemoryError:
            return "needs more memory than is free"
        return ""

    reasons = in_threads(why_unreadable, list(files))
    unreadable = [(name, why) for name, why in zip(files.values(), reasons, strict=True) if why]
    found: dict[str, list[Finding]] = {"cut": [], ACCENTS: [], WORDS: []}
    for example in split.examples:
        if count_tokens is not None and max_tokens is not None and (tokens := count_tokens(example.text)) > max_tokens:
            found["cut"].append((example.id, f"{tokens} tokens, at most {max_tokens} fit"))
        if lost_in is not None and (category := lost_in(example.text)):
            found[category].append((example.id, ""))
    for kind, reason in REASONS.items():
        found[kind] = sorted((files[Path(note.name)], reason) for note in notes if note.kind == kind)
    return replace(split.problems, unreadable=unreadable, **found)


def in_threads(work: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """Yield work(item) in the order of the items, with one thread for each core available to this process."""
    with ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(items), AT_ONCE):
            yield from pool.map(work, items[start : start + AT_ONCE])


def drop_unusable(split: Split, problems: Problems) -> Split:
    """Return the split without missing images, unreadable images and empty captions.

    If an image has several captions, only the empty ones are dropped. Raises DataError if nothing is left.
    """
    without_image = {name for name, _ in (*problems.missing, *problems.unreadable)}
    with_empty = {name for name, _ in problems.empty}
    kept = [
        example
        for example in split.examples
        if example.id not in without_image and not (example.id in with_empty and example.is_empty)
    ]
    if not kept:
        why = "; ".join(problems.fatal.lines(1)) or "it is empty"
        raise DataError(f"{split.captions_file}: split {split.name} has no usable examples: {why}")
    rest = replace(problems, missing=[], unreadable=[], empty=[])
    return replace(split, examples=kept, problems=rest)


def fingerprint(split: Split) -> str:
    """Return the sha256 (hexadecimal) of a split: its ids, captions, image file sizes in bytes and non-empty prompts.

    Images are not read, so that 70,000 of them take one second. An image replaced by another of the same size is
    therefore not noticed. A missing file has the size -1. The order of the examples counts, because the shuffle of
    training starts from it. Names of folders do not count.
    """
    digest = hashlib.sha256()
    sizes = {}
    for path in dict.fromkeys(example.image for example in split.examples):
        try:
            sizes[path] = path.stat().st_size
        except OSError:
            sizes[path] = -1
    for example in split.examples:
        prompt = [example.prompt] if example.prompt else []
        digest.update(json.dumps([example.id, example.caption, sizes[example.image], *prompt]).encode() + b"\n")
    return digest.hexdigest()

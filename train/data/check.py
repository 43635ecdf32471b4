"""Check the images and captions of a split, drop the unusable examples and compute a fingerprint of the rest."""

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
from engine.inputs.depth import CLIP
from engine.inputs.pixels import CLIPPED, FRAMES, TRANSPARENT, ImageNote, decode_image
from train.data.dataset import Split
from train.data.problems import Problems, is_empty

Progress = Callable[[int, int], None]
"""Called with (images done, images in total)."""
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
    progress: Progress | None = None,
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
    reasons = in_threads(partial(_why_unreadable, depth=depth, notes=notes), list(files), progress)
    unreadable = [(name, why) for name, why in zip(files.values(), reasons, strict=True) if why]
    cut = []
    if count_tokens is not None and max_tokens is not None:
        for example in split.examples:
            tokens = count_tokens(example.text)
            if tokens > max_tokens:
                cut.append((example.id, f"{tokens} tokens, at most {max_tokens} fit"))
    noted = {
        kind: sorted((files[Path(note.name)], reason) for note in notes if note.kind == kind)
        for kind, reason in REASONS.items()
    }
    noted |= _lost(split, lost_in) if lost_in is not None else {}
    return replace(split.problems, unreadable=unreadable, cut=cut, **noted)


def _lost(split: Split, lost_in: Callable[[str], str]) -> dict[str, list[tuple[str, str]]]:
    """Return findings for the captions that the tokenizer changes, by category (ACCENTS or WORDS)."""
    findings: dict[str, list[tuple[str, str]]] = {}
    for example in split.examples:
        if category := lost_in(example.text):
            findings.setdefault(category, []).append((example.id, ""))
    return findings


def _why_unreadable(path: Path, *, depth: str, notes: list[ImageNote]) -> str:
    try:
        decode_image(path, depth=depth, notes=notes)
    except ImageError as error:
        return error.reason
    except MemoryError:
        return "needs more memory than is free"
    return ""


def in_threads(work: Callable[[T], R], items: list[T], progress: Progress | None = None) -> Iterator[R]:
    """Yield work(item) in the order of the items, with one thread for each core available to this process."""
    with ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(items), AT_ONCE):
            yield from pool.map(work, items[start : start + AT_ONCE])
            if progress is not None:
                progress(min(start + AT_ONCE, len(items)), len(items))


def drop_unusable(split: Split, problems: Problems) -> Split:
    """Return the split without missing images, unreadable images and empty captions.

    If an image has several captions, only the empty ones are dropped. Raises DataError if nothing is left.
    """
    without_image = {name for name, _ in (*problems.missing, *problems.unreadable)}
    with_empty = {name for name, _ in problems.empty}
    kept = [
        example
        for example in split.examples
        if example.id not in without_image and not (example.id in with_empty and is_empty(example.caption))
    ]
    if not kept:
        raise DataError(f"{split.captions_file}: split {split.name} has no usable examples: {_why(problems)}")
    rest = replace(problems, missing=[], unreadable=[], empty=[])
    return replace(split, examples=kept, problems=rest)


def _why(problems: Problems) -> str:
    return "; ".join(problems.fatal.lines(1)) or "it is empty"


def fingerprint(split: Split) -> str:
    """Return the sha256 (hexadecimal) of a split: its ids, captions, image file sizes in bytes and non-empty prompts.

    Images are not read, so that 70,000 of them take one second. An image replaced by another of the same size is
    therefore not noticed. A missing file has the size -1. The order of the examples counts, because the shuffle of
    training starts from it. Names of folders do not count.
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

"""What is wrong with the captioned images of a split, and the rest of it; knows nothing of layouts and models."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from engine.errors import DataError, ImageError
from engine.inputs.images import decode_image

if TYPE_CHECKING:
    from train.dataset import Split

Finding = tuple[str, str]
"""An id (for an image without caption its path) and the reason."""
Progress = Callable[[int, int], None]
"""Told how many images of how many are done."""
T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 512
"""Images handed to the threads at a time: Ctrl-C and a full queue of 70,000 both wait for no more."""

NOUNS = {
    "missing": ("missing image", "missing images"),
    "unreadable": ("unreadable image", "unreadable images"),
    "empty": ("empty caption", "empty captions"),
    "uncaptioned": ("image without caption", "images without caption"),
    "repeated": ("id with several captions", "ids with several captions"),
    "cut": ("caption that will be cut", "captions that will be cut"),
}
FATAL = ("missing", "unreadable", "empty")


@dataclass(frozen=True)
class Problems:
    """What is wrong with a split, each category a list of findings in the order of the data set.

    missing: captioned, but there is no file. unreadable: the file is no picture, or damaged. empty: a caption without
    a visible character. uncaptioned: a picture beside the others that no caption names. repeated: an id with several
    captions where the layout has one each. cut: a caption with more tokens than fit.
    """

    missing: list[Finding] = field(default_factory=list)
    unreadable: list[Finding] = field(default_factory=list)
    empty: list[Finding] = field(default_factory=list)
    uncaptioned: list[Finding] = field(default_factory=list)
    repeated: list[Finding] = field(default_factory=list)
    cut: list[Finding] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in NOUNS)

    @property
    def fatal(self) -> Problems:
        """Those with which training must not start silently: missing and unreadable images, empty captions."""
        return Problems(**{name: getattr(self, name) for name in FATAL})

    def select(self, wanted: Callable[[str], bool]) -> Problems:
        """Return the findings whose id is wanted; images without caption, which belong to no id, stay out."""
        kept = {name: [one for one in getattr(self, name) if wanted(one[0])] for name in NOUNS if name != "uncaptioned"}
        return Problems(**kept)

    def lines(self, most: int = 3) -> list[str]:
        """Return a line for every category that holds something, naming the first `most` of it."""
        lines = []
        for name, nouns in NOUNS.items():
            found: list[Finding] = getattr(self, name)
            if found:
                named = ", ".join(f"{one} ({reason})" if reason else one for one, reason in found[:most])
                more = f", ... and {len(found) - most} more" if len(found) > most else ""
                lines.append(f"{len(found)} {nouns[len(found) > 1]}: {named}{more}")
        return lines


def check_split(
    split: Split,
    *,
    decode: bool = True,
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Problems:
    """Return what reading the split found, and what only its pictures and a tokenizer can tell.

    With `decode` every picture is decoded once, in threads. `count_tokens` returns the length of a caption as the model
    gets it, and `max_tokens` is what fits: both count [DEC] and [SEP]. Raises EngineError for trouble that is the
    system's and not the picture's, such as too many open files.
    """
    lost = {name for name, _ in split.problems.missing}
    files = {example.image: example.id for example in split.examples if example.id not in lost} if decode else {}
    reasons = in_threads(_why_unreadable, list(files), progress)
    unreadable = [(name, why) for name, why in zip(files.values(), reasons, strict=True) if why]
    cut = []
    if count_tokens is not None and max_tokens is not None:
        for example in split.examples:
            tokens = count_tokens(example.caption)
            if tokens > max_tokens:
                cut.append((example.id, f"{tokens} tokens where {max_tokens} fit"))
    return replace(split.problems, unreadable=unreadable, cut=cut)


def _why_unreadable(path: Path) -> str:
    try:
        decode_image(path)
    except ImageError as error:
        return error.reason
    return ""


def in_threads(work: Callable[[T], R], items: list[T], progress: Progress | None = None) -> Iterator[R]:
    """Yield work(item) in the order of the items, computed in as many threads as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), AT_ONCE):
            yield from pool.map(work, items[start : start + AT_ONCE])
            if progress is not None:
                progress(min(start + AT_ONCE, len(items)), len(items))


def without(split: Split, problems: Problems) -> Split:
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


def is_empty(caption: str) -> bool:
    """Return whether a caption holds nothing to learn: no character but white space."""
    return not caption.strip()


def fingerprint(split: Split) -> str:
    """Return a sha256 (hexadecimal) over ids, captions and image file sizes in bytes, in the order of the examples.

    Pictures are not read, so that 70,000 of them take a second: one replaced by another of the same size goes unseen. A
    missing file has the size -1. The order counts because training's shuffle starts from it; names of folders do not.
    """
    digest = hashlib.sha256()
    sizes = _sizes(example.image for example in split.examples)
    for example in split.examples:
        digest.update(json.dumps([example.id, example.caption, sizes[example.image]]).encode() + b"\n")
    return digest.hexdigest()


def _sizes(paths: Iterable[Path]) -> dict[Path, int]:
    sizes = {}
    for path in dict.fromkeys(paths):
        try:
            sizes[path] = os.stat(path).st_size  # noqa: PTH116 - half the time of Path.stat, 70,000 times
        except OSError:
            sizes[path] = -1
    return sizes

"""An example of a data set, from readers to batches, and the checks of a split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

from engine.errors import DataError, ImageError
from engine.host import available_cores
from engine.inputs.pixels import CLIPPED, FRAMES, TRANSPARENT, ImageNote, decode_image
from engine.options import CLIP

Finding = tuple[str, str]
"""An id (or the path, for an image without caption) and the reason."""
ACCENTS, WORDS = "accents", "words"
OF_NO_ID = ("uncaptioned", "imageless")
"""Categories whose findings are paths instead of ids."""
FATAL = ("missing", "unreadable", "empty")


@dataclass(frozen=True)
class Example:
    """An image with one of its captions: the only form of a row, from the reader of a layout to the batch.

    `concepts` are UMLS CUIs, () if the data set has none. `prompt` is the text before the caption. It is not part of
    `caption`, and empty if the image has no prompt.
    """

    id: str
    image: Path
    caption: str
    concepts: tuple[str, ...] = ()
    prompt: str = ""

    @property
    def text(self) -> str:
        """The prompt followed by the caption: the full text that the model gets."""
        return f"{self.prompt} {self.caption}" if self.prompt else self.caption

    @property
    def is_empty(self) -> bool:
        """Whether the caption is empty or only white space, so that there is nothing to learn."""
        return not self.caption.strip()


def category(one: str, many: str) -> list[Finding]:
    """Declare a category of problems by the noun for one finding and for several."""
    return field(default_factory=list, metadata={"nouns": (one, many)})


@dataclass(frozen=True)
class Problems:
    """The problems of a split: a list of findings for each category, in the order of the data set.

    missing: a captioned image without a file. unreadable: a file that is damaged or not an image. empty: a caption
    without a visible character. uncaptioned: an image without a caption. imageless: a DICOM file that is not an image,
    such as a report. repeated: an id with several captions in a layout that has one caption per image. cut: a caption
    with more tokens than fit. clipped: an image with more than 8 bits per channel, of which only values up to 255 are
    kept. accents, words: a caption that changes when it is tokenized and decoded. transparent: an image with
    transparency, which is dropped. frames: a file with several frames, of which the first is used.
    """

    missing: list[Finding] = category("missing image", "missing images")
    unreadable: list[Finding] = category("unreadable image", "unreadable images")
    empty: list[Finding] = category("empty caption", "empty captions")
    uncaptioned: list[Finding] = category("image without caption", "images without caption")
    imageless: list[Finding] = category("DICOM file without an image, skipped", "DICOM files without an image, skipped")
    repeated: list[Finding] = category("id with several captions", "ids with several captions")
    cut: list[Finding] = category("caption that will be cut", "captions that will be cut")
    clipped: list[Finding] = category(
        "image with more than 8 bits per channel", "images with more than 8 bits per channel"
    )
    accents: list[Finding] = category(
        "caption loses its accents in the tokenizer and is learned without them",
        "captions lose their accents in the tokenizer and are learned without them",
    )
    words: list[Finding] = category(
        "caption has words that the vocabulary cannot spell, learned as [UNK]",
        "captions have words that the vocabulary cannot spell, learned as [UNK]",
    )
    transparent: list[Finding] = category("image with transparency", "images with transparency")
    frames: list[Finding] = category("image with several frames", "images with several frames")

    def __bool__(self) -> bool:
        return any(vars(self).values())

    @property
    def fatal(self) -> Problems:
        """The problems that training must not ignore silently: missing and unreadable images, empty captions."""
        return Problems(**{name: getattr(self, name) for name in FATAL})

    def select(self, wanted: Callable[[str], bool]) -> Problems:
        """Return the findings whose id is wanted. Findings without an id (OF_NO_ID) are left out."""
        by_id = {name: findings for name, findings in vars(self).items() if name not in OF_NO_ID}
        return Problems(**{name: [item for item in found if wanted(item[0])] for name, found in by_id.items()})

    def lines(self, most: int = 3) -> list[str]:
        """Return one line for every category with findings. Each line names the first `most` findings."""
        lines = []
        for declared in fields(self):
            findings: list[Finding] = getattr(self, declared.name)
            if findings:
                named = ", ".join(f"{item} ({reason})" if reason else item for item, reason in findings[:most])
                more = f", ... and {len(findings) - most} more" if len(findings) > most else ""
                lines.append(f"{len(findings)} {declared.metadata['nouns'][len(findings) > 1]}: {named}{more}")
        return lines


@dataclass(frozen=True)
class Split:
    """The captioned images of one split ("train", "valid" or "test") in the order of its captions file.

    `problems` are those found while reading: missing images, empty captions, repeated ids, images without caption. The
    path of a missing image points to a file that does not exist.
    """

    name: str
    examples: list[Example]
    captions_file: Path
    problems: Problems = field(default_factory=Problems)


def references_by_id(examples: Sequence[Example]) -> dict[str, tuple[str, ...]]:
    """Return {image id: its captions}, in the order of first appearance."""
    references: dict[str, tuple[str, ...]] = {}
    for example in examples:
        references[example.id] = (*references.get(example.id, ()), example.caption)
    return references


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

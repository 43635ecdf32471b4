"""The types of a data set: an example, a split of examples, and the problems that a split can have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

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

"""What can be wrong with the captioned images of a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Finding = tuple[str, str]
"""An id (for an image without caption its path) and the reason."""

NOUNS = {
    "missing": ("missing image", "missing images"),
    "unreadable": ("unreadable image", "unreadable images"),
    "empty": ("empty caption", "empty captions"),
    "uncaptioned": ("image without caption", "images without caption"),
    "imageless": ("DICOM file without an image, skipped", "DICOM files without an image, skipped"),
    "repeated": ("id with several captions", "ids with several captions"),
    "cut": ("caption that will be cut", "captions that will be cut"),
    "clipped": ("image of more than 8 bits a channel", "images of more than 8 bits a channel"),
    "accents": (
        "caption loses its accents in the tokenizer and is learned without them",
        "captions lose their accents in the tokenizer and are learned without them",
    ),
    "words": (
        "caption has words that the vocabulary cannot spell, learned as [UNK]",
        "captions have words that the vocabulary cannot spell, learned as [UNK]",
    ),
    "transparent": ("image with transparency", "images with transparency"),
    "frames": ("image with several frames", "images with several frames"),
}
ACCENTS, WORDS = "accents", "words"
OF_NO_ID = ("uncaptioned", "imageless")
FATAL = ("missing", "unreadable", "empty")


@dataclass(frozen=True)
class Problems:
    """What is wrong with a split, each category a list of findings in the order of the data set.

    missing: captioned, but there is no file. unreadable: the file is not an image, or damaged. empty: a caption without
    a visible character. uncaptioned: an image that no caption names. imageless: a DICOM file that is not an image, such
    as a report. repeated: an id with several captions where the layout has one each. cut: a caption with more tokens
    than fit. clipped: an image of more than 8 bits a channel, of which only values up to 255 are kept. accents, words:
    a caption that the tokenizer does not give back. transparent: an image with transparency, which is dropped. frames:
    a file of several frames, of which the first is used.
    """

    missing: list[Finding] = field(default_factory=list)
    unreadable: list[Finding] = field(default_factory=list)
    empty: list[Finding] = field(default_factory=list)
    uncaptioned: list[Finding] = field(default_factory=list)
    imageless: list[Finding] = field(default_factory=list)
    repeated: list[Finding] = field(default_factory=list)
    cut: list[Finding] = field(default_factory=list)
    clipped: list[Finding] = field(default_factory=list)
    accents: list[Finding] = field(default_factory=list)
    words: list[Finding] = field(default_factory=list)
    transparent: list[Finding] = field(default_factory=list)
    frames: list[Finding] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in NOUNS)

    @property
    def fatal(self) -> Problems:
        """Those with which training must not start silently: missing and unreadable images, empty captions."""
        return Problems(**{name: getattr(self, name) for name in FATAL})

    def select(self, wanted: Callable[[str], bool]) -> Problems:
        """Return the findings whose id is wanted; those that belong to no id, stay out."""
        kept = {name: [one for one in getattr(self, name) if wanted(one[0])] for name in NOUNS if name not in OF_NO_ID}
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


def is_empty(caption: str) -> bool:
    """Return whether a caption holds nothing to learn: no character but white space."""
    return not caption.strip()

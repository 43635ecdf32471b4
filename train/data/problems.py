"""The problems that the images and captions of a split can have, by category."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Finding = tuple[str, str]
"""An id (or the path, for an image without caption) and the reason."""

NOUNS = {
    "missing": ("missing image", "missing images"),
    "unreadable": ("unreadable image", "unreadable images"),
    "empty": ("empty caption", "empty captions"),
    "uncaptioned": ("image without caption", "images without caption"),
    "imageless": ("DICOM file without an image, skipped", "DICOM files without an image, skipped"),
    "repeated": ("id with several captions", "ids with several captions"),
    "cut": ("caption that will be cut", "captions that will be cut"),
    "clipped": ("image with more than 8 bits per channel", "images with more than 8 bits per channel"),
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
"""Categories whose findings are paths instead of ids."""
FATAL = ("missing", "unreadable", "empty")


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
        """The problems that training must not ignore silently: missing and unreadable images, empty captions."""
        return Problems(**{name: getattr(self, name) for name in FATAL})

    def select(self, wanted: Callable[[str], bool]) -> Problems:
        """Return the findings whose id is wanted. Findings without an id (OF_NO_ID) are left out."""
        kept = {
            name: [item for item in getattr(self, name) if wanted(item[0])] for name in NOUNS if name not in OF_NO_ID
        }
        return Problems(**kept)

    def lines(self, most: int = 3) -> list[str]:
        """Return one line for every category with findings. Each line names the first `most` findings."""
        lines = []
        for name, nouns in NOUNS.items():
            findings: list[Finding] = getattr(self, name)
            if findings:
                named = ", ".join(f"{item} ({reason})" if reason else item for item, reason in findings[:most])
                more = f", ... and {len(findings) - most} more" if len(findings) > most else ""
                lines.append(f"{len(findings)} {nouns[len(findings) > 1]}: {named}{more}")
        return lines


def is_empty(caption: str) -> bool:
    """Return whether a caption is empty or only white space, so that there is nothing to learn."""
    return not caption.strip()

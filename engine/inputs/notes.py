"""What reading dropped from images that can be read: collected for the run's log, a line for each kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.inputs.ids import join_some

CLIPPED, TRANSPARENT, FRAMES = "clipped", "transparent", "frames"
"""More than 8 bits a channel, of which values above 255 became white; transparency; more frames than the one used."""
REMEDIES = {
    CLIPPED: (
        "more than 8 bits a channel: values above 255 become white, as in Hugging Face's processor",
        "; --high-bit-depth scale keeps their range",
    ),
    TRANSPARENT: ("transparency, which is dropped, as in transformers 4.57", ""),
    FRAMES: ("more frames than the one that is used", "; of DICOM files --dicom-frame chooses it"),
}
"""What the images of a kind have, and what to do about it."""


class ImageNote(NamedTuple):
    """An image that was read without something: one of the kinds above, and the image's file or id."""

    kind: str
    name: str


def note_lines(notes: Iterable[ImageNote]) -> list[str]:
    """Return one line for each kind of note: how many images, the first three names, the remedy."""
    names: dict[str, set[str]] = {}
    for kind, name in notes:
        names.setdefault(kind, set()).add(name)
    lines = []
    for kind, (what, remedy) in REMEDIES.items():
        if found := sorted(names.get(kind, ())):
            images = "1 image has" if len(found) == 1 else f"{len(found)} images have"
            lines.append(f"{images} {what}: {join_some(found, 3)}{remedy}")
    return lines

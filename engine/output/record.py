"""What a run has said so far: between the captioner that speaks and the files that appear when all is said.

In memory for now; a journal on disk takes this place, so that a run can be continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError, ImageError
from engine.images import ImageFile
from engine.output.run import write_n_best, write_run

if TYPE_CHECKING:
    from engine.captioner import Caption


class RunRecord:
    """Captions and failures of the images of one run."""

    def __init__(self, images: Sequence[ImageFile]) -> None:
        self.images = images
        self.captions: dict[str, Caption] = {}
        self.failures: list[ImageError] = []

    def add(self, caption: Caption) -> None:
        """Note a caption."""
        self.captions[caption.id] = caption

    def fail(self, error: ImageError) -> None:
        """Note an image that cannot be read."""
        self.failures.append(error)

    def check_complete(self, *, allow_missing: bool) -> None:
        """Raise EngineError when images failed, unless that is allowed and some did not."""
        count = len(self.failures)
        if count and count == len(self.images):
            raise EngineError("not one image could be read and nothing was written")
        if count and not allow_missing:
            raise EngineError(
                f"{count} of {len(self.images)} images cannot be read and nothing was written: mend or remove them, "
                "or pass --allow-missing for empty captions"
            )

    def write(self, out: Path, n_best_out: Path | None, *, raw_text: bool) -> None:
        """Write run.csv in the order of the images, empty captions for failures, and the n-best file if wanted."""
        if n_best_out is not None:
            write_n_best(n_best_out, (self.captions[i.id] for i in self.images if i.id in self.captions))
        write_run(out, ((image.id, self._text(image.id, raw_text)) for image in self.images))

    def _text(self, image_id: str, raw_text: bool) -> str:
        caption = self.captions.get(image_id)
        if caption is None:
            return ""
        return caption.raw_text if raw_text else caption.text

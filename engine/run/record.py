"""The captions and failures of a run, kept in its journal until its files are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.captions import Alternative, Caption
from engine.errors import EngineError, ImageError
from engine.files.run_files import write_n_best, write_run, write_timings
from engine.inputs.images import ImageFile
from engine.run.fingerprints import fingerprints, run_key
from engine.run.job import Outputs
from engine.run.journal import Journal, journal_path


class RunRecord:
    """Captions and failures of the images of one run, kept in a journal beside `out` until the run is complete.

    A context manager: leaving it closes the journal, which stays on disk if it holds captions and nothing was written.
    """

    def __init__(self, images: Sequence[ImageFile], out: Path, made_with: str, *, resume: bool = True) -> None:
        """Open the journal of this run; `resumed` of its captions are taken, `not_reused` are not: their image
        has changed or their record is damaged.

        `made_with` says what besides the images decides the captions: signature and versions. Without `resume`, or
        when the journal is of another bundle, option or list of images, it is set aside (`set_aside` names where).
        Raises OutputError.
        """
        self.images = images
        self.same_command = "the same command" if resume else "the same command without --no-resume"
        """What goes on from the journal, in words for the user."""
        self.captions: dict[str, Caption] = {}
        self._failed: dict[str, ImageError] = {}
        self._fingerprints = fingerprints(images)
        self.journal_path = journal_path(out)
        self._journal = Journal(self.journal_path, run_key(images, made_with), resume=resume)
        self.set_aside = self._journal.set_aside
        for record in self._journal.records:
            self._recall(record)
        self.resumed = len(self.captions)
        self.not_reused = len(self._journal.records) + self._journal.damaged - self.resumed

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal.is_empty:
            self._journal.delete()
        self._journal.close()

    def remaining(self) -> Iterator[ImageFile]:
        """Yield the images that have neither a caption nor failed."""
        return (i for i in self.images if i.id not in self.captions and str(i.source) not in self._failed)

    def has(self, image_id: str) -> bool:
        """Return whether an image has its caption."""
        return image_id in self.captions

    @property
    def failures(self) -> list[ImageError]:
        """What failed, in the order of the images."""
        return [self._failed[path] for path in map(str, (i.source for i in self.images)) if path in self._failed]

    @property
    def done(self) -> int:
        """How many images this run, not an earlier one, has done: captioned or failed."""
        return len(self.captions) - self.resumed + len(self._failed)

    def add(self, caption: Caption) -> None:
        """Note a caption. Raises OutputError when the journal cannot be written."""
        self._journal.append(
            {
                "id": caption.id,
                "file": self._fingerprints[caption.id],
                "latency_s": caption.latency_s,
                "alternatives": [vars(alternative) for alternative in caption.alternatives],
            }
        )
        self.captions[caption.id] = caption

    def fail(self, error: ImageError) -> None:
        """Note an image that cannot be read, once; it is not journaled, so that a later run tries it again."""
        self._failed[error.path] = error

    def check_complete(self, *, allow_missing: bool) -> None:
        """Raise EngineError when images failed, unless that is allowed and some did not."""
        count = len(self._failed)
        if count and count == len(self.images):
            raise EngineError("not one image could be read and nothing was written")
        if count and not allow_missing:
            raise EngineError(
                f"{count} of {len(self.images)} images cannot be read and no run was written: mend them in place and "
                f"run {self.same_command} again, which captions only these, or pass --allow-missing for empty captions"
            )

    def check_unchanged(self) -> None:
        """Raise EngineError when an image is not the file any more that it was when the run began.

        Its caption may be of either, and a run that goes on from the journal would make it again.
        """
        current = fingerprints([image for image in self.images if image.id in self.captions])
        changed = [
            image.path.name
            for image in self.images
            if current.get(image.id) not in (None, self._fingerprints[image.id])
        ]
        if changed:
            raise EngineError(
                f"{len(changed)} images changed while the run was going on ({', '.join(changed[:3])}"
                f"{', ...' if len(changed) > 3 else ''}) and no run was written: run {self.same_command} again, "
                "which captions only these"
            )

    def write(self, outputs: Outputs, *, drawn: bool = False) -> None:
        """Write run.csv in the order of the images, empty captions for failures, and the other files where wanted.

        The journal is deleted only then.
        """
        if outputs.n_best_out is not None:
            captions = (self.captions[image.id] for image in self.images if image.id in self.captions)
            write_n_best(outputs.n_best_out, captions, drawn=drawn)
        if outputs.timings_out is not None:
            write_timings(outputs.timings_out, ((image.id, self._latency_s(image.id)) for image in self.images))
        write_run(outputs.out, ((image.id, self._text(image.id, outputs.raw_text)) for image in self.images))
        self._journal.delete()

    def _latency_s(self, image_id: str) -> float | None:
        caption = self.captions.get(image_id)
        return None if caption is None else caption.latency_s

    def _text(self, image_id: str, raw_text: bool) -> str:
        caption = self.captions.get(image_id)
        if caption is None:
            return ""
        return caption.raw_text if raw_text else caption.text

    def _recall(self, record: Mapping[str, Any]) -> None:
        """Take a caption out of the journal, unless its image has changed since; a malformed one is done again."""
        try:
            image_id = record["id"]
            current = self._fingerprints.get(image_id)
            if current is None or current != record["file"]:
                return
            alternatives = tuple(
                Alternative(
                    text=str(entry["text"]),
                    raw_text=str(entry["raw_text"]),
                    ids=tuple(int(token) for token in entry["ids"]),
                    sum_log_prob=float(entry["sum_log_prob"]),
                    score=float(entry["score"]),
                )
                for entry in record["alternatives"]
            )
            latency_s = record.get("latency_s")  # journals of an earlier version have none
            latency_s = None if latency_s is None else float(latency_s)
        except (KeyError, TypeError, ValueError):
            return
        if alternatives:
            self.captions[image_id] = Caption(image_id, alternatives, latency_s)

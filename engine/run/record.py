"""The captions and failures of a run, kept in its journal until its files are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from engine.captions import Caption
from engine.errors import EngineError, ImageError
from engine.files.run_files import Row, write_json_lines, write_n_best, write_run, write_timings
from engine.inputs.images import ImageFile
from engine.run.fingerprints import fingerprints, run_key, settings_key
from engine.run.job import Outputs
from engine.run.journal import Journal, NoJournal, journal_path, update_path
from engine.run.recall import KnownPictures, encode_caption, recall_by_id


class RunRecord:
    """Captions and failures of the images of one run, kept in a journal beside `out` until the run is complete.

    A context manager: leaving it closes the journal, which stays on disk if it holds captions and nothing was written.
    With `update` it stays then, too, for the next such run: its captions go by their pictures, not by a list of images.
    """

    def __init__(
        self,
        images: Sequence[ImageFile],
        out: Path | None,
        made_with: str,
        *,
        prompts: Mapping[str, str] | None = None,
        resume: bool = True,
        update: bool = False,
    ) -> None:
        """Open the journal of this run; `resumed` captions are taken from its `earlier` records, `not_reused` are not:
        their image has changed or is no more, or they are damaged.

        `made_with` says what besides the images and their `prompts` decides the captions: signature and versions.
        Without `resume`, or when the journal is of another bundle or option, or without `update` of another list of
        images, it is set aside (`set_aside` names where). Without `out` nothing is kept. Raises OutputError.
        """
        self.images = images
        self.prompts = prompts
        self.update = update
        self.same_command = "the same command" if resume else "the same command without --no-resume"
        """What goes on from the journal, in words for the user."""
        self._failed: dict[str, ImageError] = {}
        self._fingerprints = fingerprints(images)
        self.journal_path: Path | None = None
        self._journal: Journal | NoJournal = NoJournal()
        if out is not None:
            self.journal_path = update_path(out) if update else journal_path(out)
            key = settings_key(images, made_with) if update else run_key(images, made_with, prompts)
            self._journal = Journal(self.journal_path, key, resume=resume)
        self.set_aside = self._journal.set_aside
        self._known = KnownPictures(self._journal.records, prompts or {}) if update else None
        self.captions = (
            recall_by_id(self._journal.records, self._fingerprints)
            if self._known is None
            else self._known.recall(images, self._fingerprints)
        )
        self._images = {image.id: image for image in images}
        self.earlier = len(self._journal.records)
        self.resumed = len(self.captions)
        self.not_reused = self.earlier + self._journal.damaged - self.resumed

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

    def failure(self, image: ImageFile) -> ImageError | None:
        """Return why an image cannot be read, None where it can or was not tried yet."""
        return self._failed.get(str(image.source))

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
        stamp = self._fingerprints[caption.id]
        self._journal.append(
            encode_caption(caption, stamp)
            if self._known is None
            else self._known.encode_new(self._images[caption.id], caption, stamp)
        )
        self.captions[caption.id] = caption

    def fail(self, error: ImageError) -> None:
        """Note an image that cannot be read, once; it is not journaled, so that a later run tries it again."""
        self._failed[error.path] = error

    def check_complete(self, *, allow_missing: bool) -> None:
        """Raise EngineError when images failed, unless that is allowed and some did not."""
        count = len(self._failed)
        if count and count == len(self.images):
            written = "" if self.journal_path is None else " and nothing was written"
            raise EngineError(f"not one image could be read{written}")
        if count and not allow_missing and self.journal_path is None:
            raise EngineError(
                f"{count} of {len(self.images)} images cannot be read and have no caption: mend them, or pass "
                "--allow-missing for empty captions"
            )
        if count and not allow_missing:
            raise EngineError(
                f"{count} of {len(self.images)} images cannot be read and no run was written: mend them in place and "
                f"run {self.same_command} again, which captions only these, or pass --allow-missing for empty captions"
            )

    def check_unchanged(self) -> None:
        """Raise EngineError when an image is not the file any more that it was when the run began.

        Its caption may be of either, and a run that goes on from the journal would make it again.
        """
        if self._known is not None:  # before the look at the files: a digest is of the bytes that were captioned, then
            self._known.learn_digests(image for image in self.images if image.id in self.captions)
        current = fingerprints([image for image in self.images if image.id in self.captions])
        changed = [
            image.path.name
            for image in self.images
            if current.get(image.id) not in (None, self._fingerprints[image.id])
        ]
        if changed:
            named = f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
            what = f"{len(changed)} images changed while the run was going on ({named})"
            if self.journal_path is None:
                raise EngineError(f"{what}: their captions may be of what they were or of what they are")
            raise EngineError(
                f"{what} and no run was written: run {self.same_command} again, which captions only these"
            )
        if self._known is not None:
            for name in (name for name, stamp in current.items() if stamp is None):
                self._known.digests.pop(name, None)  # it is gone, and may have changed before

    def write(self, outputs: Outputs, rows: Iterable[Row], *, drawn: bool = False) -> None:
        """Write the rows into `out`, unless it is standard output, and before them the other files where wanted.

        The journal is deleted only then; with `update` it keeps what was written.
        """
        if outputs.n_best_out is not None:
            captions = (self.captions[image.id] for image in self.images if image.id in self.captions)
            write_n_best(outputs.n_best_out, captions, drawn=drawn)
        if outputs.timings_out is not None:
            write_timings(outputs.timings_out, ((image.id, self._latency_s(image.id)) for image in self.images))
        if outputs.jsonl and not outputs.is_stream:
            write_json_lines(outputs.out, rows)
        elif not outputs.is_stream:
            write_run(outputs.out, ((row.id, row.text or "") for row in rows))
        if self._known is None:
            self._journal.delete()
            return
        captioned = [image for image in self.images if image.id in self.captions]
        self._journal.replace(
            self._known.encode(image, self.captions[image.id], self._fingerprints[image.id]) for image in captioned
        )

    def _latency_s(self, image_id: str) -> float | None:
        caption = self.captions.get(image_id)
        return None if caption is None else caption.latency_s

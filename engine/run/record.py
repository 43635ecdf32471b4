"""The captions and failures of a run, kept in its journal until its files are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.captions import Caption
from engine.errors import EngineError, ImageError
from engine.files.run_files import Row, write_json_lines, write_n_best, write_run, write_timings
from engine.inputs.images import ImageFile
from engine.run.fingerprints import fingerprints, run_key, settings_key
from engine.run.job import Outputs
from engine.run.journal import Journal, NoJournal, journal_path, update_path
from engine.run.recall import KnownImages, digests_of, with_places


class RunRecord:
    """Captions and failures of the images of one run, kept in a journal next to `out` until the run is complete.

    A context manager: leaving it closes the journal, which stays on disk if it holds captions and nothing was written.
    With `update` it stays then, too, for the next such run.
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
        check_bundle: Callable[[], None] | None = None,
    ) -> None:
        """Open the journal of this run; `resumed` captions are taken from its `earlier` records, `not_reused` of these
        are not: their image has changed or is not among `images`, or they are damaged.

        `made_with` is what decides the captions besides the images and their `prompts`: signature and versions. A
        journal made with something else, or any without `resume`, is set aside (`set_aside` is where). `check_bundle`
        raises an EngineError once the bundle is not the one that was loaded: no caption is kept from then on. Without
        `out` nothing is kept. Raises OutputError.
        """
        self.images = images
        self.prompts = prompts
        self.update = update
        self.same_command = "the same command" if resume else "the same command without --no-resume"
        """The command that resumes from the journal, in words for the user."""
        self._check_bundle = check_bundle or (lambda: None)
        self._failed: dict[str, ImageError] = {}
        self._fingerprints = fingerprints(images)
        self.journal_path: Path | None = None
        self._journal: Journal | NoJournal = NoJournal()
        if out is not None:
            self.journal_path = update_path(out) if update else journal_path(out)
            key = settings_key(images, made_with)
            earlier_key = "" if update else run_key(images, made_with, prompts)
            self._journal = Journal(self.journal_path, key, earlier_key=earlier_key, resume=resume)
        self.set_aside = self._journal.set_aside
        records = self._journal.records
        if self._journal.is_earlier:
            self._journal.replace(records := with_places(records, images, prompts or {}))
        self._known = KnownImages(records, prompts or {}, strict=update)
        self.captions = self._known.recall(images, self._fingerprints)
        self._images = {image.id: image for image in images}
        self.earlier = len(records)
        self.resumed = len(self.captions)
        self.not_reused = self.earlier + self._journal.damaged - self._known.used

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
        """Note a caption. Raises OutputError when the journal cannot be written, and as `check_bundle` does."""
        self._check_bundle()
        self._journal.append(self._encode(caption))
        self.captions[caption.id] = caption

    def _encode(self, caption: Caption) -> dict[str, Any]:
        return self._known.encode(self._images[caption.id], caption, self._fingerprints[caption.id])

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
                f"{count} of {len(self.images)} images cannot be read and have no caption: fix them, or pass "
                "--allow-missing for empty captions"
            )
        if count and not allow_missing:
            raise EngineError(
                f"{count} of {len(self.images)} images cannot be read and no run was written: fix, replace or delete "
                f"them and run {self.same_command} again, which keeps the other captions, or pass --allow-missing for "
                "empty captions"
            )

    def check_unchanged(self) -> None:
        """Raise EngineError when an image or the bundle is not any more what it was when the run began.

        An image counts as changed when its bytes are not those that were captioned, whatever its times and its number.
        """
        self._check_bundle()
        captioned = [image for image in self.images if image.id in self.captions]
        digests = dict(self._known.digests)
        if self.update:  # before the look at the files: a digest is of the bytes that were captioned, then
            self._known.learn_digests(captioned)
        current = fingerprints(captioned)
        suspects = [image for image in captioned if current[image.id] not in (None, self._fingerprints[image.id])]
        found = digests_of([image for image in suspects if image.id in digests and image.folder is None])
        changed = []
        for image in suspects:
            stamp, begun = current[image.id], self._fingerprints[image.id]
            if image.id in digests:
                is_same = found.get(image.id) == digests[image.id]
            else:  # from the journal of an earlier version, and trusted as it was when the run began
                is_same = self._known.trusted(stamp) == self._known.trusted(begun)
            if is_same:
                self._fingerprints[image.id] = stamp
            else:
                changed.append(image.path.name)
        if changed:
            named = f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
            what = f"{len(changed)} images changed during the run ({named})"
            if self.journal_path is None:
                raise EngineError(f"{what}: their captions may be of the earlier or of the present content")
            raise EngineError(
                f"{what} and no run was written: run {self.same_command} again, which captions only these"
            )
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
        if not self.update:
            self._journal.delete()
            return
        captions = (self.captions[image.id] for image in self.images if image.id in self.captions)
        self._journal.replace(map(self._encode, captions))

    def _latency_s(self, image_id: str) -> float | None:
        caption = self.captions.get(image_id)
        return None if caption is None else caption.latency_s

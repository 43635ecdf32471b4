"""RunRecord, the captions and failures of a run, and how captions of earlier runs are found again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from engine.calibration import Calibration
from engine.captions import Alternative, Caption, after_prompt
from engine.errors import EngineError, ImageError, UsageError, counted
from engine.inputs.images import ImageFile, utf8
from engine.inputs.pixels import open_file
from engine.inputs.read_ahead import read_ahead
from engine.options import CLIP
from engine.run.job import Outputs
from engine.run.journal import Journal, NoJournal, journal_path, update_path
from engine.run.outputs import (
    CSV_HEADER,
    AttentionFiles,
    Row,
    format_json,
    format_row,
    one_line,
    write_json_lines,
    write_n_best,
    write_review,
    write_run,
    write_timings,
)


def run_key(images: Sequence[ImageFile], made_with: str, prompts: Mapping[str, str] | None = None) -> str:
    """Return the sha256 of the settings `made_with`, and of the images in their order with their prompts.

    This is the key of journals of earlier versions.
    """
    digest = hashlib.sha256(made_with.encode("utf-8", "surrogateescape"))
    for image in images:
        location = str(image.path.absolute() if image.folder is None else image.source)
        # depth and prompts are only added if used: versions that lacked them made the same key
        depth = [] if image.depth == CLIP else [image.depth]
        prompt = [] if prompts is None else [{"prompt": prompts[image.id]}]
        digest.update(json.dumps([image.id, location, image.frame, *depth, *prompt]).encode("ascii"))
    return digest.hexdigest()


def settings_key(images: Sequence[ImageFile], made_with: str) -> str:
    """Return the sha256 of the settings `made_with` and of how images are read, independent of which images."""
    how = sorted({(image.frame, image.depth) for image in images})
    return hashlib.sha256(f"{made_with}|{json.dumps(how)}".encode("utf-8", "surrogateescape")).hexdigest()


def fingerprints(images: Sequence[ImageFile]) -> dict[str, list[int] | None]:
    """Return {image id: fingerprint}. Folders at URIs are listed, which gives size and modification time only."""
    folders = {image.folder for image in images if image.folder is not None}
    listed = {folder: folder.list(recursive=any(len(i.path.parts) > 1 for i in images)) for folder in folders}
    stamps: dict[str, list[int] | None] = {}
    for image in images:
        if image.folder is None:
            stamps[image.id] = fingerprint(image.path)
        else:
            stamp = listed[image.folder].get(image.path.as_posix())
            stamps[image.id] = list(stamp) if stamp else None
    return stamps


def fingerprint(path: Path) -> list[int] | None:
    """Return [size in bytes, mtime in ns, ctime in ns, inode number], or None if there is no file.

    Any of them may change when a file is replaced. ctime and inode may also change otherwise, see SIZE_AND_TIME.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


Stamp = list[int] | None
"""The fingerprint of an image file, see fingerprints."""
Stamps = Mapping[str, Stamp]
"""Fingerprints of images by their ids."""
READERS = 4
"""Threads that read images to compute their digests, which is limited by the disk."""
SIZE_AND_TIME = 2
"""Number of leading entries of a fingerprint that only change with the content. Some network file systems give a file
another inode number whenever their cache expires, and chmod, hard links and copies set the ctime.
"""


def decode_caption(record: Mapping[str, Any], image_id: str) -> Caption | None:
    """Return the caption of a record for the image `image_id`, or None if the record is malformed."""
    try:
        alternatives = tuple(map(Alternative.from_json, record["alternatives"]))
        latency_s = record.get("latency_s")  # missing in journals of an earlier version
        latency_s = None if latency_s is None else float(latency_s)
    except (KeyError, TypeError, ValueError):
        return None
    return Caption(image_id, alternatives, latency_s) if alternatives else None


def place_of(image: ImageFile) -> str:
    """Return the absolute path or URI of an image, independent of its id and the working directory."""
    return os.path.abspath(image.path) if image.folder is None else str(image.source)  # noqa: PTH100 (follows links)


class KnownImages:
    """Captions of earlier runs, found by the content of the image and its prompt.

    A file at the same path with the same size and mtime is trusted without reading it. Other files may have been
    copied, moved or touched. They are compared by sha256, and only read if their size occurs in the journal. Images at
    a URI are not read for that.

    With `strict`, a file is only trusted if its inode number and ctime are the same as well: `--update` may follow
    months later, on data that was unpacked again with fixed times. `prompts` are the images' own prompts by id.
    """

    def __init__(
        self, records: Iterable[Mapping[str, Any]], prompts: Mapping[str, str], *, strict: bool = False
    ) -> None:
        self._prompts = prompts
        self._stamp_length = None if strict else SIZE_AND_TIME
        self._by_place: dict[tuple[str, str, str | None], Mapping[str, Any]] = {}
        self._by_digest: dict[tuple[str, str, str | None], Mapping[str, Any]] = {}
        self._sizes: set[int] = set()
        self._used: set[int] = set()
        self.digests: dict[str, str] = {}
        """sha256 of the bytes that were captioned, by image id, if known."""
        for record in records:
            self.learn(record)

    def learn(self, record: Mapping[str, Any]) -> None:
        """Add a record; a malformed one is ignored."""
        place, stamp, digest = record.get("place"), record.get("file"), record.get("sha256")
        prompt = record.get("prompt")
        if not isinstance(place, str) or not isinstance(stamp, list) or not stamp or not _is_text(prompt):
            return
        self._by_place[place, self.trusted(stamp), prompt] = record
        if isinstance(digest, str) and isinstance(stamp[0], int):
            self._by_digest[digest, _suffix(place), prompt] = record
            self._sizes.add(stamp[0])

    @property
    def used(self) -> int:
        """Number of records whose caption was used."""
        return len(self._used)

    def trusted(self, stamp: Stamp) -> str:
        """Return the part of a fingerprint that identifies the content of a file at the same path"""
        return str(stamp and stamp[: self._stamp_length])

    def recall(self, images: Sequence[ImageFile], stamps: Stamps) -> dict[str, Caption]:
        """Return {image id: caption} for the images whose content is known. Malformed records are ignored."""
        captions: dict[str, Caption] = {}
        others: list[ImageFile] = []
        for image in images:
            if (stamp := stamps[image.id]) is None:
                continue
            record = self._by_place.get((place_of(image), self.trusted(stamp), self._prompts.get(image.id)))
            if record is not None and self._take(record, image, captions):
                if isinstance(digest := record.get("sha256"), str):
                    self.digests[image.id] = digest
            elif image.folder is None and stamp[0] in self._sizes:
                others.append(image)
        self.learn_digests(others)
        for image in others:
            digest = self.digests.get(image.id, "")
            record = self._by_digest.get((digest, _suffix(place_of(image)), self._prompts.get(image.id)))
            if record is None or not self._take(record, image, captions):
                # the file will be read again for captioning, when its bytes may be others
                self.digests.pop(image.id, None)
        return captions

    def _take(self, record: Mapping[str, Any], image: ImageFile, captions: dict[str, Caption]) -> bool:
        if (caption := decode_caption(record, image.id)) is None:
            return False
        captions[image.id] = caption
        self._used.add(id(record))
        return True

    def learn_digests(self, images: Iterable[ImageFile]) -> None:
        """Read the local images whose digests are not known yet."""
        self.digests |= digests_of([image for image in images if image.folder is None and image.id not in self.digests])

    def encode(self, image: ImageFile, caption: Caption, stamp: Stamp) -> dict[str, Any]:
        """Return the record of a caption; `stamp` is the fingerprint of its image."""
        if caption.file_sha256 is not None:
            self.digests[image.id] = caption.file_sha256
        record = {
            "id": caption.id,
            "file": stamp,
            "latency_s": caption.latency_s,
            "alternatives": [vars(alternative) for alternative in caption.alternatives],
            "place": place_of(image),
        }
        if image.id in self._prompts:
            record["prompt"] = self._prompts[image.id]
        if image.id in self.digests:
            record["sha256"] = self.digests[image.id]
        return record


def with_places(
    records: Iterable[Mapping[str, Any]], images: Iterable[ImageFile], prompts: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Add locations and prompts to the records of a journal of an earlier version, whose key identified the images.

    Records whose image is not among `images` are dropped.
    """
    by_id = {image.id: image for image in images}
    completed = []
    for record in records:
        if (image := by_id.get(str(record.get("id")))) is not None:
            prompt = {"prompt": prompts[image.id]} if image.id in prompts else {}
            completed.append({**record, "place": place_of(image)} | prompt)
    return completed


def digests_of(images: Sequence[ImageFile]) -> dict[str, str]:
    """Return {image id: sha256} of local files; those that cannot be read are missing."""
    paths = [image.path for image in images]
    digests = read_ahead(digest_of, paths, threads=READERS, window=4 * READERS) if paths else iter(())
    return {image.id: digest for image, digest in zip(images, digests, strict=True) if digest is not None}


def digest_of(path: Path) -> str | None:
    """Return the sha256 of a file's content in hexadecimal, or None if the file cannot be read."""
    try:
        with open_file(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
    except (OSError, ValueError):
        return None


def _suffix(place: str) -> str:
    """Return the suffix of a file, which decides how it is read if its first bytes do not."""
    return os.path.splitext(place)[1].lower()  # noqa: PTH122 (of URIs, too)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


class ReaderGoneError(Exception):
    """The reader of standard output has closed it, such as `| head`: the run ends without a message."""


def text_of(caption: Caption, outputs: Outputs, prompt: str | None = None) -> str:
    """Return a caption's text on one line, with prefix and suffix; an empty caption stays empty.

    With `without_prompt`, the prompt that the caption was generated from is removed.
    """
    text = one_line(caption.raw_text if outputs.raw_text else caption.text)
    if outputs.without_prompt and prompt:
        rest = after_prompt(text, prompt)
        text = text if rest is None else rest
    return f"{outputs.prefix}{text}{outputs.suffix}" if text else ""


def row_of(record: RunRecord, image: ImageFile, outputs: Outputs) -> Row | None:
    """Return the row of an image, or None if it has neither a caption nor failed yet.

    A failed image has the text None, or with `allow_missing` an empty text.
    """
    caption, failure = record.captions.get(image.id), record.failure(image)
    if caption is not None:
        return Row(image.id, file_of(image), text_of(caption, outputs, record.prompt_of(image)).strip())
    if failure is None:
        return None
    return Row(image.id, file_of(image), "" if outputs.allow_missing else None, failure.reason)


def file_of(image: ImageFile) -> str:
    """Return an image's path or URI as it is written to files."""
    return utf8(str(image.source)) if image.folder is None else str(image.source)


def rows_of(record: RunRecord, outputs: Outputs) -> Iterator[Row]:
    """Yield the rows of all images that are finished, in their order."""
    return (row for image in record.images if (row := row_of(record, image, outputs)) is not None)


def lines_written(record: RunRecord, outputs: Outputs) -> dict[str, tuple[Path, list[bool], int]]:
    """Return, by option, each file of a complete run, whether each image has a line in it, and its header lines."""
    captioned = [image.id in record.captions for image in record.images]
    every = [True] * len(captioned)
    marked = record.verdicts(outputs)
    reviewed = [bool(marked.get(image.id, {}).get("review")) for image in record.images]
    lines = {
        "--out": (every, 0 if outputs.jsonl else 1),
        "--n-best-out": (captioned, 0),
        "--review-out": (reviewed, 1),
        "--timings-out": (every, 1),
    }
    return {option: (path, *lines[option]) for option, path in outputs.files().items()}


class RowStream:
    """Writes rows to standard output in the order of the images, each as soon as all earlier ones are finished."""

    def __init__(self, record: RunRecord, outputs: Outputs) -> None:
        """Raises UsageError if standard output is closed."""
        if sys.stdout is None:
            raise UsageError("--out - writes to standard output, which is closed")
        self._out: IO[bytes] = sys.stdout.buffer
        self._record, self._outputs, self._next = record, outputs, 0
        self._header = "" if outputs.jsonl else CSV_HEADER

    def advance(self) -> None:
        """Write the rows that are next in order. Raises ReaderGoneError, or OSError if the disk is full."""
        images, lines = self._record.images, []
        while self._next < len(images):
            row = row_of(self._record, images[self._next], self._outputs)
            if row is None:
                break
            self._next += 1
            if self._outputs.jsonl:
                lines.append(format_json(row))
            elif row.text is not None:
                lines.append(format_row(row.id, row.text))
        if not lines:
            return
        try:
            self._out.write((self._header + "".join(lines)).encode("utf-8", "surrogateescape"))
            self._out.flush()
        except BrokenPipeError as error:
            raise ReaderGoneError from error
        self._header = ""


class RunRecord:
    """Captions and failures of one run, kept in a journal next to `out` until the run is complete.

    As a context manager it closes the journal at the end, which stays on disk if it holds captions and the outputs were
    not written. With `update` it always stays, for the next run.
    """

    def __init__(
        self,
        images: Sequence[ImageFile],
        out: Path | None,
        made_with: str,
        *,
        prompts: Mapping[str, str] | None = None,
        prompt: str | None = None,
        resume: bool = True,
        update: bool = False,
        check_bundle: Callable[[], None] | None = None,
        calibration: Calibration | None = None,
        attention: AttentionFiles | None = None,
    ) -> None:
        """Open the journal of this run and take over the captions of an earlier one.

        Of its `earlier` records, `resumed` captions are used. `not_reused` are not, because the image has changed or is
        not among `images`, or because the record is damaged, and `without_attention` because their file is missing.

        made_with     what decides the captions besides images and prompts: signature and versions. A journal made with
                      something else is renamed to `set_aside`
        prompts       each image's own prompt by id, or None
        prompt        the prompt of all images without their own, or None
        resume        whether to use an existing journal; otherwise it is renamed as well
        update        whether to keep the journal after a complete run
        check_bundle  raises an EngineError if the bundle has changed since it was loaded; then no caption is kept
        out           the output, or None for standard output: nothing is kept then
        calibration   the map to expected scores, if any
        attention     the files with each caption's attention, if any: captions without theirs are not used

        Raises OutputError.
        """
        self.images = images
        self.prompts, self._prompt = prompts, prompt
        self.update = update
        self.calibration = calibration
        self.same_command = "the same command" if resume else "the same command without --no-resume"
        """Name of the command that resumes from the journal, for messages."""
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
        self._attention = attention
        recalled = len(self.captions)
        if attention is not None:
            self.captions = {name: caption for name, caption in self.captions.items() if attention.has(caption)}
        self.without_attention = recalled - len(self.captions)
        self._images = {image.id: image for image in images}
        self.earlier = len(records)
        self.resumed = len(self.captions)
        self._failed_before = 0
        self.not_reused = self.earlier + self._journal.damaged - self._known.used

    def refresh(self, images: Sequence[ImageFile]) -> None:
        """Set the images of a folder that has changed (--watch, with `update`).

        Captions are kept for the images whose content is known. Failures are kept for files that have not changed.
        """
        stamps = fingerprints(images)
        captions = self._known.recall(images, stamps)
        same = {str(image.source) for image in images if stamps[image.id] == self._fingerprints.get(image.id)}
        # only now: Ctrl-C may come at any time, and the outputs are then written from these
        self.images, self._images = images, {image.id: image for image in images}
        self._fingerprints, self.captions = stamps, captions
        self._failed = {path: error for path, error in self._failed.items() if path in same}
        self.resumed, self._failed_before = len(self.captions), len(self._failed)

    @property
    def to_do(self) -> int:
        """Number of images that have no caption and had not failed when the run, or the last `refresh`, began."""
        return len(self.images) - self.resumed - self._failed_before

    def prompt_of(self, image: ImageFile) -> str | None:
        """Return the prompt that the caption of an image starts with, or None."""
        return self._prompt if self.prompts is None else self.prompts.get(image.id)

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
        """Return whether an image already has a caption."""
        return image_id in self.captions

    def failure(self, image: ImageFile) -> ImageError | None:
        """Return why an image cannot be read, or None if it can be read or was not tried yet."""
        return self._failed.get(str(image.source))

    @property
    def failures(self) -> list[ImageError]:
        """Errors of the images that cannot be read, in the order of the images."""
        return [self._failed[path] for path in map(str, (i.source for i in self.images)) if path in self._failed]

    @property
    def done(self) -> int:
        """Number of images that this run has finished, captioned or failed, without those of earlier runs."""
        return len(self.captions) - self.resumed + len(self._failed) - self._failed_before

    def add(self, caption: Caption) -> None:
        """Record a caption. Raises OutputError if the journal cannot be written, and the errors of `check_bundle`."""
        self._check_bundle()
        if self._attention is not None:  # before the journal: a caption in it has its file, unless someone deletes it
            self._attention.write(caption)
        self._journal.append(record := self._encode(caption))
        self.captions[caption.id] = caption
        if self.update:  # `refresh` looks for it
            self._known.learn(record)

    def _encode(self, caption: Caption) -> dict[str, Any]:
        return self._known.encode(self._images[caption.id], caption, self._fingerprints[caption.id])

    def fail(self, error: ImageError) -> None:
        """Record an image that cannot be read, not in the journal, so that a later run tries it again."""
        self._failed[error.path] = error

    def check_complete(self, *, allow_missing: bool, is_shard: bool = False) -> None:
        """Raise EngineError if all images failed, or if some did without `allow_missing`.

        With both `allow_missing` and `is_shard` all may have failed, since other shards have the images that did not.
        """
        count = len(self._failed)
        if count and count == len(self.images) and not (is_shard and allow_missing):
            written = "" if self.journal_path is None else " and nothing was written"
            raise EngineError(f"not one image could be read{written}")
        if count and not allow_missing and self.journal_path is None:
            raise EngineError(
                f"{count} of {counted(len(self.images), 'image')} cannot be read: fix or delete them, or pass "
                "--allow-missing for empty captions"
            )
        if count and not allow_missing:
            raise EngineError(
                f"{count} of {counted(len(self.images), 'image')} cannot be read and no run was written: fix, replace "
                "or delete "
                f"them and run {self.same_command} again, which keeps the other captions, or pass --allow-missing for "
                "empty captions"
            )

    def check_unchanged(self) -> None:
        """Raise EngineError if an image or the bundle has changed since the run started.

        An image counts as changed if its bytes differ from those that were captioned, whatever its times and inode.
        """
        self._check_bundle()
        captioned = [image for image in self.images if image.id in self.captions]
        digests = dict(self._known.digests)
        # before the fingerprints are taken again: a file that is replaced after its digest was read is noticed below
        if self.update:
            self._known.learn_digests(captioned)
        current = fingerprints(captioned)
        modified = [image for image in captioned if current[image.id] not in (None, self._fingerprints[image.id])]
        found = digests_of([image for image in modified if image.id in digests and image.folder is None])
        changed = []
        for image in modified:
            stamp, initial = current[image.id], self._fingerprints[image.id]
            if image.id in digests:
                is_same = found.get(image.id) == digests[image.id]
            else:  # from the journal of an earlier version, without a digest
                is_same = self._known.trusted(stamp) == self._known.trusted(initial)
            if is_same:
                self._fingerprints[image.id] = stamp
            else:
                changed.append(image)
        if changed:
            names = [image.path.name for image in changed]
            named = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            what = f"{counted(len(changed), 'image')} changed during the run ({named})"
            if self.journal_path is None:
                raise EngineError(f"{what}: their captions may be those of the old or of the new content")
            # the next run may find a file of the same size and time, and would take its caption from the journal
            for image in changed:
                del self.captions[image.id]
            self._keep_only()
            raise EngineError(
                f"{what} and no run was written: run {self.same_command} again, which captions only these"
            )
        for name in (name for name, stamp in current.items() if stamp is None):
            self._known.digests.pop(name, None)  # the file is gone, and may have changed before that

    def verdicts(self, outputs: Outputs) -> dict[str, dict[str, float | bool | None]]:
        """Return {image id: expected_score, and review with --abstain-below} in the order of the images.

        A caption whose expected score is unknown is marked for review. Without a calibration the result is empty.
        """
        if self.calibration is None:
            return {}
        verdicts: dict[str, dict[str, float | bool | None]] = {}
        for caption in (self.captions[image.id] for image in self.images if image.id in self.captions):
            expected, limit = self.calibration.expected_score(caption), outputs.abstain_below
            verdicts[caption.id] = {"expected_score": expected}
            if limit is not None:
                verdicts[caption.id]["review"] = expected is None or expected < limit
        return verdicts

    def write(self, outputs: Outputs, rows: Iterable[Row], *, drawn: bool = False) -> int:
        """Write the other outputs, then the rows to `out` unless that is standard output.

        Returns the number of captions that are marked for review.
        """
        verdicts = self.verdicts(outputs)
        marked = [name for name, verdict in verdicts.items() if verdict.get("review")]
        if outputs.n_best_out is not None:
            captions = (self.captions[image.id] for image in self.images if image.id in self.captions)
            write_n_best(outputs.n_best_out, captions, drawn=drawn, verdicts=verdicts)
        if outputs.review_out is not None:
            write_review(outputs.review_out, ((name, verdicts[name]["expected_score"]) for name in marked))
        if outputs.timings_out is not None:
            write_timings(outputs.timings_out, ((image.id, self._latency_s(image.id)) for image in self.images))
        if outputs.jsonl and not outputs.is_stream:
            write_json_lines(outputs.out, rows)
        elif not outputs.is_stream:
            write_run(outputs.out, ((row.id, row.text or "") for row in rows))
        return len(marked)

    def finish(self) -> None:
        """Delete the journal once all files are written; with `update`, keep only the captions of this run in it."""
        if self.update:
            self._keep_only()
        else:
            self._journal.delete()

    def _keep_only(self) -> None:
        """Rewrite the journal with the captions of this run."""
        captions = (self.captions[image.id] for image in self.images if image.id in self.captions)
        self._journal.replace(map(self._encode, captions))

    def _latency_s(self, image_id: str) -> float | None:
        caption = self.captions.get(image_id)
        return None if caption is None else caption.latency_s

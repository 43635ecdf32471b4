"""What is known of a run: fingerprints of images, recalled captions, and the rows of run.csv."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from engine.captions import Alternative, Caption
from engine.errors import EngineError, ImageError, UsageError
from engine.inputs.images import ImageFile, utf8
from engine.inputs.pixels import CLIP, open_file
from engine.inputs.read_ahead import read_ahead
from engine.run.job import Outputs
from engine.run.journal import Journal, NoJournal, journal_path, update_path
from engine.run.outputs import (
    CSV_HEADER,
    Row,
    format_json,
    format_row,
    one_line,
    write_json_lines,
    write_n_best,
    write_run,
    write_timings,
)


def run_key(images: Sequence[ImageFile], made_with: str, prompts: Mapping[str, str] | None = None) -> str:
    """Return the sha256 of what captions are made with, and of the images in their order, with their prompts by id.

    Journals of earlier versions have it as their key.
    """
    digest = hashlib.sha256(made_with.encode("utf-8", "surrogateescape"))
    for image in images:
        place = str(image.path.absolute() if image.folder is None else image.source)
        depth = [] if image.depth == CLIP else [image.depth]  # journals of earlier versions know none, nor prompts
        prompt = [] if prompts is None else [{"prompt": prompts[image.id]}]
        digest.update(json.dumps([image.id, place, image.frame, *depth, *prompt]).encode("ascii"))
    return digest.hexdigest()


def settings_key(images: Sequence[ImageFile], made_with: str) -> str:
    """Return the sha256 of what captions are made with and how the images are read, whatever images these are."""
    how = sorted({(image.frame, image.depth) for image in images})
    return hashlib.sha256(f"{made_with}|{json.dumps(how)}".encode("utf-8", "surrogateescape")).hexdigest()


def fingerprints(images: Sequence[ImageFile]) -> dict[str, list[int] | None]:
    """Return the fingerprint of every image by its id; those at a URI are listed, for size and time of change alone."""
    folders = {image.folder for image in images if image.folder is not None}
    listed = {folder: folder.list(recursive=any(len(i.path.parts) > 1 for i in images)) for folder in folders}
    found: dict[str, list[int] | None] = {}
    for image in images:
        if image.folder is None:
            found[image.id] = fingerprint(image.path)
        else:
            stamp = listed[image.folder].get(image.path.as_posix())
            found[image.id] = list(stamp) if stamp else None
    return found


def fingerprint(path: Path) -> list[int] | None:
    """Return size in bytes, time of the last change of content and of status in ns, and number; None without a file.

    Any of them may change when a file is replaced. The last two may also change without that, see recall.py.
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
"""Threads that read images for their digests, which takes as long as the disk does."""
SIZE_AND_TIME = 2
"""The first numbers of a fingerprint. The others change without the content: some network file systems give a file
another number whenever their cache expires, and chmod, hard links and copies set the time of the last status change."""


def decode_caption(record: Mapping[str, Any], image_id: str) -> Caption | None:
    """Return the caption of a record as that of `image_id`, None where the record is malformed."""
    try:
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
        return None
    return Caption(image_id, alternatives, latency_s) if alternatives else None


def place_of(image: ImageFile) -> str:
    """Return where an image is, whatever its id and the working directory."""
    return os.path.abspath(image.path) if image.folder is None else str(image.source)  # noqa: PTH100 (follows links)


class KnownImages:
    """Captions that earlier runs made, found by the content of the image and its prompt.

    A file at the same path with the same size and time of change is trusted without reading it. Other files may have
    been copied, moved or touched: they are compared by sha256, and only those are read whose size is in the journal.
    Images at a URI are not read for that. With `strict`, a file is only trusted where its number and the time of its
    last status change are the same, too: `--update` may follow months later, on data unpacked again with fixed times.
    `prompts` are those of the images by their ids, where each has its own.
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
        """sha256 of the bytes that were captioned, by image id, where it is known."""
        for record in records:
            place, stamp, digest = record.get("place"), record.get("file"), record.get("sha256")
            prompt = record.get("prompt")
            if not isinstance(place, str) or not isinstance(stamp, list) or not stamp or not _is_text(prompt):
                continue
            self._by_place[place, self.trusted(stamp), prompt] = record
            if isinstance(digest, str) and isinstance(stamp[0], int):
                self._by_digest[digest, _suffix(place), prompt] = record
                self._sizes.add(stamp[0])

    @property
    def used(self) -> int:
        """How many records gave a caption."""
        return len(self._used)

    def trusted(self, stamp: Stamp) -> str:
        """Return the part of a fingerprint that stands for the content of a file at the same path."""
        return str(stamp and stamp[: self._stamp_length])

    def recall(self, images: Sequence[ImageFile], stamps: Stamps) -> dict[str, Caption]:
        """Return the captions of the images, by id, whose content is known; a malformed one is decoded again."""
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
                self.digests.pop(image.id, None)  # the bytes that will be captioned are read later
        return captions

    def _take(self, record: Mapping[str, Any], image: ImageFile, captions: dict[str, Caption]) -> bool:
        if (caption := decode_caption(record, image.id)) is None:
            return False
        captions[image.id] = caption
        self._used.add(id(record))
        return True

    def learn_digests(self, images: Iterable[ImageFile]) -> None:
        """Read those of the images, on this machine's disks, whose digests are not known."""
        self.digests |= digests_of([image for image in images if image.folder is None and image.id not in self.digests])

    def encode(self, image: ImageFile, caption: Caption, stamp: Stamp) -> dict[str, Any]:
        """Return a caption as a record; `stamp` is the fingerprint of its image."""
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
    """Return the records of a journal of an earlier version, which had only ids: its key stood for the list of images.

    Records whose image is not in the list are left out.
    """
    by_id = {image.id: image for image in images}
    found = []
    for record in records:
        if (image := by_id.get(str(record.get("id")))) is not None:
            prompt = {"prompt": prompts[image.id]} if image.id in prompts else {}
            found.append({**record, "place": place_of(image)} | prompt)
    return found


def digests_of(images: Sequence[ImageFile]) -> dict[str, str]:
    """Return the sha256 of local files by image id, without those that cannot be read."""
    paths = [image.path for image in images]
    found = read_ahead(digest_of, paths, threads=READERS, window=4 * READERS) if paths else iter(())
    return {image.id: digest for image, digest in zip(images, found, strict=True) if digest is not None}


def digest_of(path: Path) -> str | None:
    """Return the sha256 of a file's content in hexadecimal, None where it cannot be read."""
    try:
        with open_file(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
    except (OSError, ValueError):
        return None


def _suffix(place: str) -> str:
    """Return the suffix of a file, which decides how it is read where its bytes do not tell."""
    return os.path.splitext(place)[1].lower()  # noqa: PTH122 (of URIs, too)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


class ReaderGoneError(Exception):
    """Nobody reads standard output any more, as behind `| head`: the run ends without a word."""


def text_of(caption: Caption, outputs: Outputs) -> str:
    """Return a caption's text between prefix and suffix, on one line; an empty caption stays empty."""
    text = one_line(caption.raw_text if outputs.raw_text else caption.text)
    return f"{outputs.prefix}{text}{outputs.suffix}" if text else ""


def row_of(record: RunRecord, image: ImageFile, outputs: Outputs) -> Row | None:
    """Return what is known of an image, None before it is captioned or has failed.

    One that failed has no text, or with `allow_missing` an empty one.
    """
    caption, failure = record.captions.get(image.id), record.failure(image)
    if caption is not None:
        return Row(image.id, file_of(image), text_of(caption, outputs).strip())
    if failure is None:
        return None
    return Row(image.id, file_of(image), "" if outputs.allow_missing else None, failure.reason)


def file_of(image: ImageFile) -> str:
    """Return an image's path or URI as files name it."""
    return utf8(str(image.source)) if image.folder is None else str(image.source)


def rows_of(record: RunRecord, outputs: Outputs) -> Iterator[Row]:
    """Yield what is known of all images, in their order."""
    return (row for image in record.images if (row := row_of(record, image, outputs)) is not None)


class RowStream:
    """Writes rows to standard output in the order of the images, each as soon as those before it are known."""

    def __init__(self, record: RunRecord, outputs: Outputs) -> None:
        """Raises UsageError when standard output is closed."""
        if sys.stdout is None:
            raise UsageError("--out - writes to standard output, which is closed")
        self._out: IO[bytes] = sys.stdout.buffer
        self._record, self._outputs, self._next = record, outputs, 0
        self._header = "" if outputs.jsonl else CSV_HEADER

    def advance(self) -> None:
        """Write what is known by now. Raises ReaderGoneError, or OSError where the output is full."""
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

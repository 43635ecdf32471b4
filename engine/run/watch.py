"""`engine caption --watch`: caption the images of a folder that grows, until the command is stopped.

A round captions the images that are new or have changed and then rewrites the outputs. After each round `run.csv` is
what a run over the folder would write. The captions are kept in the journal of --update, from which the same command,
or one with --update, resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from engine.bundle.open import BundleRef
from engine.bundle.signature import run_signature
from engine.bundle.tokenizer import CaptionTokenizer
from engine.calibration import Calibration
from engine.captioner import resolve
from engine.captions import Caption
from engine.checkpoints.cache import ModelRef
from engine.errors import ImageError, UsageError, counted
from engine.inputs.images import ImageFile, NoImagesError, describe_ignored
from engine.inputs.paths import find_inputs
from engine.inputs.pixels import note_lines
from engine.options import DecodeOptions, declared
from engine.run.job import Inputs, Outputs
from engine.run.outputs import SUFFIX, sidecar_paths, write_sidecars
from engine.run.pipeline import (
    Log,
    Progress,
    Source,
    check,
    choose_runtime,
    keep,
    lock,
    log_notes,
    open_record,
    open_source,
)
from engine.run.record import RunRecord, rows_of, text_of
from engine.runtime import Runtime, Workers
from engine.workers.messages import WorkOrder

SETTLE_S = 2.0
"""Seconds without a change of size and modification time after which a file counts as complete. A copy that pauses for
longer is read too early. It then cannot be read, is reported, and is read again once it has changed.
"""
POLL_S = 0.5
"""Seconds between two looks at the folder."""
LOOK_SHARE = 0.05
"""Largest share of the time that is spent looking: a folder of 17,000 images is listed less often."""
WRITE_SHARE, WRITE_EVERY_S = 0.05, 10.0
"""Largest share of the time spent on rewriting the outputs during a long round, and the seconds between two times."""
KNOWN = {
    Inputs: {"places", "watch", "recursive", "ids", "dicom_frame", "high_bit_depth"},
    Outputs: {
        *("out", "jsonl", "n_best_out", "timings_out", "calibration", "abstain_below", "review_out", "sidecar"),
        *("sidecar_dir", "prefix", "suffix", "without_prompt", "raw_text", "allow_missing", "resume", "update"),
    },
    Workers: {"processes", "devices"},
}
"""The options that work with --watch. Others are refused: most choose among images that are known in advance."""


def refuse_others(*parts: Inputs | Outputs | Workers) -> None:
    """Raise UsageError for an option that does not work with --watch, and for an input that is not one local folder."""
    for part in parts:
        for name, (option, _) in declared(type(part)).items():
            default = () if option.default is MISSING else option.default
            if name not in KNOWN[type(part)] and getattr(part, name) != default:
                raise UsageError(f"--watch does not work with {option.flag}: remove one of them")
        if isinstance(part, Outputs) and part.is_stream:
            raise UsageError("--watch rewrites the file of --out, which must then be a file, not -")
        if isinstance(part, Inputs) and not all(isinstance(at, Path) and at.is_dir() for at in part.places):
            raise UsageError("--watch needs an --input that is a folder on this machine")
        if isinstance(part, Inputs) and len(part.places) > 1:
            raise UsageError("--watch takes one --input: give the common folder, with --recursive and --ids path")


@dataclass
class SettledImages:
    """The images of a folder whose size and modification time have not changed for SETTLE_S.

    `find` lists all images of the folder. `sleep` waits some seconds; `clock` returns the time in seconds.
    """

    find: Callable[[], list[ImageFile]]
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _seen: dict[str, tuple[tuple[int, int], float]] = field(default_factory=dict)
    _latest: dict[str, tuple[int, int]] = field(default_factory=dict)

    def look(self) -> list[ImageFile]:
        """Return the settled images of this moment, in the order of `find`."""
        now, seen, settled = self.clock(), {}, []
        for image in self.find():
            try:
                status = image.path.stat()
            except OSError:  # deleted a moment ago
                continue
            path, stamp = str(image.path), (status.st_size, status.st_mtime_ns)
            before, since = self._seen.get(path, (None, now))
            seen[path] = stamp, since if stamp == before else now
            if now - seen[path][1] >= SETTLE_S:
                settled.append(image)
        self._seen = seen
        return settled

    def wait(self) -> list[ImageFile]:
        """Return the settled images as soon as they differ from those of the last call: new, changed or gone."""
        while True:
            start = self.clock()
            images = self.look()
            stamps = {str(image.path): self._seen[str(image.path)][0] for image in images}
            if stamps != self._latest:
                self._latest = stamps
                return images
            self.sleep(max(POLL_S, (self.clock() - start) / LOOK_SHARE))


def watch_directory(
    inputs: Inputs,
    outputs: Outputs,
    bundle: BundleRef | ModelRef = BundleRef(),
    requested: DecodeOptions = DecodeOptions(),
    *,
    rows: int | None = None,
    runtime: Runtime = Runtime(),
    workers: Workers = Workers(),
    log: Log,
    progress: Progress,
) -> NoReturn:
    """Caption all images of a folder, and new ones, until a KeyboardInterrupt; then `outputs.out` has those finished.

    The arguments are those of caption_directory. An image that cannot be read is reported, and read again once it has
    changed. Raises an EngineError, and KeyboardInterrupt at the end.
    """
    refuse_others(inputs, outputs, workers)
    outputs = replace(outputs, update=True)
    runtime = choose_runtime(runtime, workers, log)
    calibration = None if outputs.calibration is None else Calibration.read(outputs.calibration)
    skipped: set[str] = set()
    sidecars = SUFFIX if outputs.sidecar is not None else ""
    folder = SettledImages(lambda: _find(inputs, log, skipped, sidecars))
    calibrations = [path for path in (outputs.calibration,) if path is not None]
    outputs.check(calibrations)
    with lock(outputs, log):
        located = bundle.located(log)
        opened = located.open()
        decoding = resolve(opened, CaptionTokenizer(opened), requested, None)
        if calibration is not None:
            calibration.require(decoding.options.num_return_sequences)
        with open_source(opened, WorkOrder(located, opened.digest, runtime, decoding, rows), workers, log) as source:
            options = decoding.options
            log_notes(opened, requested, options, outputs, log, rows=rows)
            log(run_signature(opened, source.backend_name, options, inputs.high_bit_depth, runtime))
            log(f"watching {inputs.places[0]}: Ctrl-C stops, and the same command resumes")
            images = folder.wait()
            # opened with the first images, because the key of the journal depends on how they are read
            with open_record(images, source, outputs, log, runtime=runtime, calibration=calibration) as record:
                files = _Files(record, source, outputs, log)
                try:
                    while True:
                        check(outputs, images, [image.path for image in images] + calibrations, bundle)
                        if record.to_do:
                            keep(files.written(source.captions(record, log, more=True)), record, progress)
                        files.write()
                        images = folder.wait()
                        record.refresh(images)
                except KeyboardInterrupt:
                    files.write()
                    raise


def _find(inputs: Inputs, log: Log, skipped: set[str], sidecars: str) -> list[ImageFile]:
    """Return all images of the folder; log what is skipped and not among `skipped` yet.

    Files with the suffix `sidecars` are not mentioned: this run writes them.
    """
    try:
        found = find_inputs(inputs.places, inputs.find_options)
    except NoImagesError:
        return []
    for folder, names in found.left_aside.items():
        new = [name for name in names if name not in skipped and not (sidecars and name.endswith(sidecars))]
        skipped.update(new)
        if new:
            log(f"skipped in {folder}: {describe_ignored(new, found.imageless)}")
    return found.images


class _Files:
    """The outputs of a run that is not over: each `write` replaces them by those of the images finished so far."""

    def __init__(self, record: RunRecord, source: Source, outputs: Outputs, log: Log) -> None:
        self._record, self._source, self._outputs, self._log = record, source, outputs, log
        self._sidecars: dict[str, str] = {}
        self._noted = 0
        self._reported: list[ImageError] = []
        self._due, self._captions = time.monotonic() + WRITE_EVERY_S, -1

    def written(self, captions: Iterable[Caption]) -> Iterator[Caption]:
        """Yield the captions, and write the files in between when it is time."""
        for caption in captions:
            yield caption
            if time.monotonic() > self._due:
                self.write()

    def write(self) -> None:
        """Write all files, `out` last, and log images that cannot be read."""
        start, record, outputs = time.monotonic(), self._record, self._outputs
        for failure in record.failures:
            if failure not in self._reported:
                self._reported.append(failure)
                self._log(f"unreadable: {failure}")
        for line in note_lines(self._source.notes[self._noted :]):
            self._log(f"note: {line}")
        self._noted = len(self._source.notes)
        if outputs.sidecar is not None:
            captioned = [image for image in record.images if image.id in record.captions]
            texts = {i.id: text_of(record.captions[i.id], outputs, record.prompt_of(i)) for i in captioned}
            new = {name: text for name, text in texts.items() if self._sidecars.get(name) != text}
            write_sidecars(new, sidecar_paths(captioned, outputs.sidecar_dir), outputs.sidecar, outputs.sidecar_dir)
            self._sidecars = texts
        # as on standard output, an image that cannot be read has no line, unless --allow-missing gives it an empty one
        rows = (row for row in rows_of(record, outputs) if row.text is not None or outputs.jsonl)
        marked = record.write(outputs, rows, drawn=self._source.decoding.options.do_sample)
        if len(record.captions) != self._captions:
            self._captions = len(record.captions)
            review = "" if outputs.abstain_below is None else f", {marked} marked for review"
            self._log(f"{counted(self._captions, 'caption')}{review} -> {outputs.out}")
        now = time.monotonic()
        self._due = now + max(WRITE_EVERY_S, (now - start) / WRITE_SHARE)

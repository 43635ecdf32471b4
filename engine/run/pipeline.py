"""The run: find the images, resume, caption what is left, write the outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from engine.backends import require_backend
from engine.bundle.manifest import Bundle, watched
from engine.bundle.open import BundlePlace, folders_of
from engine.bundle.signature import environment, run_signature, settings_line
from engine.captioner import Captioner, PendingImages, caption_within_memory
from engine.captions import Caption
from engine.errors import UsageError
from engine.files.lock import OutputLock
from engine.inputs.images import ImageFile, describe_ignored, order_by_manifest
from engine.inputs.paths import find_inputs
from engine.inputs.pixels import ImageNote, note_lines
from engine.inputs.tables import read_prompts
from engine.options import DecodeOptions, notes_on
from engine.run.job import Inputs, Outputs
from engine.run.outputs import check_sidecars, sidecar_paths, write_sidecars
from engine.run.record import RowStream, RunRecord, rows_of, text_of
from engine.runtime import Runtime, Workers
from engine.workers.cluster import open_cluster, require_ray
from engine.workers.driver import open_processes
from engine.workers.resources import plan_workers

Log = Callable[[str], None]


class Source(Protocol):
    """Captions made with `bundle` on `backend_name`; `environment` says with which packages.

    `notes` grows by the images that were read without something (engine/inputs/pixels.py).
    """

    bundle: Bundle
    backend_name: str
    environment: str
    notes: list[ImageNote]

    def resolve(self, asked: DecodeOptions, prompts: Mapping[str, str] | None = None) -> DecodeOptions:
        """Return what is asked laid over the bundle's settings. Raises UsageError where it, or one of the images'
        prompts, does not fit the bundle.
        """
        ...

    def captions(self, options: DecodeOptions, pending: PendingImages, log: Log) -> Iterator[Caption]:
        """Yield a caption of every image that remains, each once and in any order; unreadable ones fail in `todo`."""
        ...


def choose_runtime(runtime: Runtime, workers: Workers, log: Log) -> Runtime:
    """Return the runtime with what `auto` means here, which `log` gets a note of; that of a cluster as it is.

    Raises an EngineError, in one sentence and at once, when something that is needed is missing here.
    """
    if workers.address is not None:
        require_ray()
        return runtime
    wanted = "cuda" if workers.devices is not None and runtime.backend == "auto" else runtime.backend
    chosen = replace(runtime, backend=require_backend(wanted, runtime.cpu_precision))
    plan_workers(chosen, workers)
    if runtime.backend == "auto":
        log(f"backend: {chosen.backend}")
    return chosen


def open_source(
    bundle: BundlePlace | None, asked: DecodeOptions, rows: int | None, runtime: Runtime, workers: Workers, log: Log
) -> AbstractContextManager[Source]:
    """Load what captions a run; `log` gets notes of its workers. Raises an EngineError of the kind that fits."""
    if workers.address is not None:
        return open_cluster(bundle, asked, rows, runtime, workers, log)
    if shares := plan_workers(runtime, workers):
        return open_processes(bundle, asked, rows, runtime, shares, log)
    return nullcontext(LocalSource(Captioner.open(bundle, runtime), rows))


class LocalSource:
    """A captioner in this process."""

    def __init__(self, captioner: Captioner, rows: int | None = None) -> None:
        self._captioner, self._rows = captioner, rows
        self.bundle = captioner.bundle
        self.backend_name = captioner.backend.name
        self.environment = environment(self.backend_name)
        self.notes: list[ImageNote] = []

    def resolve(self, asked: DecodeOptions, prompts: Mapping[str, str] | None = None) -> DecodeOptions:
        options = asked.over(self.bundle.generation)
        self._captioner.searches(options, prompts)
        return options

    def captions(self, options: DecodeOptions, pending: PendingImages, log: Log) -> Iterator[Caption]:
        return caption_within_memory(
            self._captioner,
            options,
            pending.remaining,
            prompts=pending.prompts,
            on_error=pending.fail,
            on_note=self.notes.append,
            rows=self._rows,
            log=log,
        )


FIRST_WAVE = 2.0
"""Times the seconds of the first image: by then the first wave is over. Captions of 20 tokens may follow one of 8."""
WAVE_END = 0.25
"""Part of these seconds in which the last images of that wave finish."""


class Pace:
    """Measures the speed of a run by when its images finish; `done` of `length` have.

    Many images are decoded in parallel and finish in waves: none at first, then many at about the same time. Divided by
    the time since the start, their number gives a speed that is too low by as much as the number of images in parallel.
    So the speed is counted from the end of the first wave, and known once it spans two more.
    """

    def __init__(self, length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.length, self.done = length, 0
        self._clock, self._start = clock, clock()
        self._first_s: float | None = None
        self._since: tuple[float, int] | None = None
        self._latest_s = 0.0

    def tell(self, done: int) -> None:
        """Note that so many images are done."""
        if done == self.done:
            return
        self.done, self._latest_s = done, self._clock() - self._start
        if self._first_s is None:
            self._first_s = self._latest_s
        waves = self._latest_s / max(self._first_s, 1e-9)
        if waves >= FIRST_WAVE and (self._since is None or waves < FIRST_WAVE + WAVE_END):
            self._since = self._latest_s, done

    @property
    def images_per_s(self) -> float | None:
        """Images a second, None before it is known."""
        if self._first_s is None or self._since is None:
            return None
        seconds = self._latest_s - self._since[0]
        return (self.done - self._since[1]) / seconds if seconds > FIRST_WAVE * self._first_s else None

    @property
    def left_s(self) -> float | None:
        """Seconds until all images are done, None before that is known."""
        if (speed := self.images_per_s) is None:
            return None
        return max(0.0, (self.length - self.done) / speed - (self._clock() - self._start - self._latest_s))

    def __str__(self) -> str:
        """Return speed and time left in words, empty before they are known."""
        speed, left = self.images_per_s, self.left_s
        return "" if speed is None or left is None else f"{speed:.2f} images/s, about {in_words(left)} left"


def in_words(seconds: float) -> str:
    """Return a duration as people say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]
"""Given the number of images, a context whose value is told how many of them are done."""


@dataclass(frozen=True)
class RunSummary:
    """How a run went. `resumed` of the captions come from an earlier run that was cut off, `empty` ones have no word;
    `left_aside` are entries of the inputs that were not taken for images.

    `seconds` is captioning; without loading the bundle in this process, but with starting workers elsewhere.
    """

    images: int
    captions: int
    resumed: int
    unreadable: int
    empty: int
    seconds: float
    images_per_s: float
    out: str
    signature: str
    left_aside: list[str]


def caption_directory(
    inputs: Inputs,
    outputs: Outputs,
    bundle: BundlePlace | None = None,
    asked: DecodeOptions = DecodeOptions(),
    *,
    rows: int | None = None,
    runtime: Runtime = Runtime(),
    workers: Workers = Workers(),
    log: Log,
    progress: Progress,
) -> RunSummary:
    """Caption every image of the inputs into `outputs.out`; that file appears only when the whole run has succeeded.

    `asked` lies over the settings of `bundle` (the embedded demo when None). `rows` is how many beams are decoded side
    by side, None for what suits device and memory. Until the end every caption is kept in a journal next to the output,
    and the same call resumes where it was cut off.

    `log` gets notes for the user, one line each. Raises an EngineError of the kind that fits.
    """
    runtime = choose_runtime(runtime, workers, log)  # before a large folder is listed: what is missing is said at once
    images, left_aside = find(inputs, outputs, bundle, log)
    prompts = _prompts(inputs, images)
    with (
        lock(outputs, log),
        open_source(bundle, asked, rows, runtime, workers, log) as source,
        open_record(
            images, source, options := source.resolve(asked, prompts), outputs, log, runtime=runtime, prompts=prompts
        ) as record,
    ):
        for note in notes_on(asked, options, rows):
            log(f"note: {note}")
        stream = RowStream(record, outputs) if outputs.is_stream else None
        seconds = keep(source.captions(options, record, log), record, progress, stream)
        for line in note_lines(source.notes):
            log(line)
        write(record, outputs, options, log)
    return RunSummary(
        images=len(images),
        captions=len(record.captions),
        resumed=record.resumed,
        unreadable=len(record.failures),
        empty=sum(not caption.text for caption in record.captions.values()),
        seconds=seconds,
        images_per_s=(len(record.captions) - record.resumed) / seconds,
        out=str(outputs.out),
        signature=run_signature(
            source.bundle, source.backend_name, options, inputs.high_bit_depth, runtime.cpu_precision
        ),
        left_aside=left_aside,
    )


def _prompts(inputs: Inputs, images: list[ImageFile]) -> dict[str, str] | None:
    """Return the prompt of each image, None without a table of prompts; refuse columns that no table has."""
    columns, ids = inputs.columns, [image.id for image in images]
    prompts = read_prompts(inputs.prompts, ids, columns) if inputs.prompts else None
    columns.require_found()
    return prompts


def find(inputs: Inputs, outputs: Outputs, bundle: BundlePlace | None, log: Log) -> tuple[list[ImageFile], list[str]]:
    """Return the images to caption, in order, and the names of what was left aside.

    Raises UsageError where there are no images, or an output would harm them.
    """
    found = find_inputs(
        inputs.places,
        recursive=inputs.recursive,
        dicom_frame=inputs.dicom_frame,
        ids=inputs.ids,
        depth=inputs.high_bit_depth,
    )
    images = found.images
    if inputs.manifest:
        images = order_by_manifest(images, inputs.manifest, inputs.columns)
    tables = [table for table in (inputs.manifest, inputs.prompts) if table]
    kept = [image.path for image in found.images if image.folder is None] + found.lists + tables
    check(outputs, images, kept, bundle)
    for place, names in found.left_aside.items():
        log(f"skipped in {place}: {describe_ignored(names, found.imageless)}")
    return images, [name for names in found.left_aside.values() for name in names]


def check(outputs: Outputs, images: list[ImageFile], kept: list[Path], bundle: BundlePlace | None) -> None:
    """Raise UsageError where an output cannot be written or would harm a file that is `kept`, or the bundle."""
    outputs.check(kept)
    folders = {f"{flag} {path}": path.parent for flag, path in outputs.files().items()}
    if outputs.sidecar_dir is not None:
        folders[f"--sidecar-dir {outputs.sidecar_dir}"] = outputs.sidecar_dir
    for what, folder in folders.items():
        if folder.resolve() in [one.resolve() for one in folders_of(bundle)]:
            raise UsageError(f"{what} would lie inside the bundle: choose another place")
    if outputs.sidecar is not None:
        own = outputs.files() | ({} if outputs.journal is None else {"the journal": outputs.journal})
        taken = {path: f"the input {path}" for path in kept} | {path: f"{flag} {path}" for flag, path in own.items()}
        paths = sidecar_paths(images, outputs.sidecar_dir)
        check_sidecars(paths, outputs.sidecar, outputs.sidecar_dir, taken)


@contextmanager
def lock(outputs: Outputs, log: Log) -> Iterator[None]:
    """Hold the outputs for this run alone. Raises UsageError while another run writes one of them."""
    with ExitStack() as held:
        for path in outputs.files().values():
            one = held.enter_context(OutputLock(path))
            if one.note:
                log(one.note)
        yield


@contextmanager
def open_record(
    images: list[ImageFile],
    source: Source,
    options: DecodeOptions,
    outputs: Outputs,
    log: Log,
    *,
    runtime: Runtime = Runtime(),
    prompts: Mapping[str, str] | None = None,
) -> Iterator[RunRecord]:
    """Open the record of a run; say what an earlier run left, and what this one leaves if it is stopped."""
    settings = settings_line(source.bundle, source.backend_name, options, runtime.cpu_precision)
    made_with = f"{settings}|{source.environment}"
    out = None if outputs.is_stream else outputs.out
    with (
        watched(source.bundle) as watch,
        RunRecord(
            images,
            out,
            made_with,
            prompts=prompts,
            resume=outputs.resume,
            update=outputs.update,
            check_bundle=watch.check,
        ) as record,
    ):
        if record.set_aside:
            log(
                "the journal of an earlier run with another bundle, other options or packages, or one that is damaged "
                f"or not wanted, was moved to {record.set_aside}: starting afresh"
            )
        if record.resumed:
            log(f"{record.resumed} captions of an earlier run are taken from {record.journal_path}")
        if record.update:
            if record.earlier:
                left = len(images) - record.resumed
                log(f"{left} of {len(images)} images are to be captioned: new, changed, or not reached before")
        elif record.not_reused:
            log(
                f"{record.not_reused} more of its captions are not used: their image has changed or is not among the "
                "inputs any more, or they are damaged"
            )
        try:
            yield record
        except BaseException:
            if record.captions and record.journal_path is not None:
                kept = f"{len(record.captions)} captions are kept in {record.journal_path}"
                log(f"{kept}: {record.same_command} resumes from there")
            raise


def keep(captions: Iterable[Caption], record: RunRecord, progress: Progress, stream: RowStream | None = None) -> float:
    """Note every caption as it is made, in `stream`, too; return the seconds that all of them took."""
    start = time.perf_counter()
    with progress(len(record.images) - record.resumed) as tell:
        for caption in captions:
            record.add(caption)
            if stream is not None:
                stream.advance()
            tell(record.done)
        if stream is not None:  # images that failed behind the last caption
            stream.advance()
        tell(record.done)
    return time.perf_counter() - start


def write(record: RunRecord, outputs: Outputs, options: DecodeOptions, log: Log) -> None:
    """Write the files of a run. Raises EngineError where images failed or changed, and writes nothing then."""
    for failure in record.failures:
        log(f"unreadable: {failure}")
    record.check_complete(allow_missing=outputs.allow_missing)
    record.check_unchanged()
    if outputs.sidecar is not None:
        captioned = [image for image in record.images if image.id in record.captions]
        texts = {image.id: text_of(record.captions[image.id], outputs) for image in captioned}
        paths = sidecar_paths(captioned, outputs.sidecar_dir)
        written, left = write_sidecars(texts, paths, outputs.sidecar, outputs.sidecar_dir)
        log(f"sidecars: {written} written, {left} left as they were")
    record.write(outputs, rows_of(record, outputs), drawn=options.do_sample)

"""Run `engine caption`: find the images, resume, caption the remaining ones, write the outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from engine.backends import resolve_runtime
from engine.backends.attention import layers_of, require_attention
from engine.bundle.manifest import Bundle, watched
from engine.bundle.open import BundleRef
from engine.bundle.signature import environment, run_signature, settings_line
from engine.bundle.tokenizer import CaptionTokenizer
from engine.calibration import Calibration
from engine.captioner import Captioner, Decoding, PendingImages, caption_within_memory, resolve
from engine.captions import Caption
from engine.checkpoints.cache import ModelRef
from engine.errors import UsageError, counted
from engine.files.lock import OutputLock
from engine.inputs.images import ImageFile, describe_ignored, order_by_manifest
from engine.inputs.paths import find_inputs
from engine.inputs.pixels import ImageNote, note_lines
from engine.inputs.tables import read_prompts
from engine.options import DecodeOptions, notes_on
from engine.run.job import Inputs, Outputs, Shard
from engine.run.outputs import AttentionFiles, check_attention, check_sidecars, sidecar_paths, write_sidecars
from engine.run.record import RowStream, RunRecord, lines_written, rows_of, text_of
from engine.runtime import Runtime, Workers
from engine.workers.messages import WorkOrder
from engine.workers.processes import open_processes, plan_workers

Log = Callable[[str], None]


class Source(Protocol):
    """Where captions come from: this process, worker processes or a cluster.

    bundle        the loaded bundle
    decoding      options, search and prompts
    backend_name  the backend in use
    environment   versions of the packages that decide captions
    notes         one entry per image of which something was dropped (engine/inputs/pixels.py); grows during the run
    """

    bundle: Bundle
    decoding: Decoding
    backend_name: str
    environment: str
    notes: list[ImageNote]

    def captions(self, pending: PendingImages, log: Log, *, more: bool = False) -> Iterator[Caption]:
        """Yield one caption per remaining image, in any order; pass unreadable images to `pending.fail`.

        With `more`, further calls follow, so that workers are kept.
        """
        ...


def choose_runtime(runtime: Runtime, workers: Workers, log: Log) -> Runtime:
    """Return the runtime with the backend that `auto` stands for on this machine; log the choice.

    With a cluster `auto` stays, because a node resolves it (engine/workers/cluster.py). Raises an EngineError if a
    library or device is missing here.
    """
    if workers.address is not None:
        from engine.workers.cluster import require_ray

        require_ray()
        if runtime.backend == "torch" and runtime.device is None:
            raise UsageError("--backend torch on a Ray cluster needs a --device that all workers have, such as cuda")
        return runtime
    wanted = runtime
    if workers.devices is not None and runtime.backend == "auto":
        wanted = replace(runtime, backend="cuda")
    elif workers.devices is not None and runtime.backend == "torch" and runtime.device is None:
        wanted = replace(runtime, device="cuda")
    chosen = resolve_runtime(wanted)
    plan_workers(chosen, workers)  # only for its errors: too many workers are refused before images are listed
    if runtime.backend == "auto":
        log(f"backend: {chosen.backend}")
    if runtime.device != chosen.device:
        log(f"device: {chosen.device}")
    return chosen


def open_source(bundle: Bundle, order: WorkOrder, workers: Workers, log: Log) -> AbstractContextManager[Source]:
    """Open the source of a run's captions; `bundle` was opened for the order. Raises an EngineError."""
    if workers.address is not None:
        from engine.workers.cluster import open_cluster  # only here, because few runs need it

        return open_cluster(bundle, order, workers, log)
    if team := plan_workers(order.runtime, workers):
        return open_processes(bundle, order, team, log)
    captioner = Captioner.of(bundle, order.runtime, many_images=True)
    return nullcontext(LocalSource(captioner, order.decoding, order.rows))


class LocalSource:
    """Captions made in this process, see Source."""

    def __init__(self, captioner: Captioner, decoding: Decoding, rows: int | None = None) -> None:
        self._captioner, self._rows = captioner, rows
        self.bundle, self.decoding = captioner.bundle, decoding
        self.backend_name = captioner.backend.name
        self.environment = environment(self.backend_name)
        self.notes: list[ImageNote] = []

    def captions(self, pending: PendingImages, log: Log, *, more: bool = False) -> Iterator[Caption]:  # noqa: ARG002
        slots = self._captioner.scheduler(self.decoding.search, self._rows).concurrency
        log(f"detail: up to {counted(slots, 'image')} in parallel")
        return caption_within_memory(
            self._captioner,
            self.decoding,
            pending.remaining,
            on_error=pending.fail,
            on_note=self.notes.append,
            rows=self._rows,
            log=log,
        )


Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]
"""Takes the number of images; returns a context whose value is called with the number of finished ones."""


@dataclass(frozen=True)
class RunSummary:
    """The result of a run, printed by `--json`.

    images        number of images found
    captions      number of captions, of which `resumed` come from an earlier run that was interrupted
    unreadable    number of images that cannot be read
    empty         number of captions without text
    seconds       time of captioning, without loading the bundle in this process, but with starting other workers
    out           path of the output
    signature     how the captions were made
    left_aside    entries of the inputs that are not images and were skipped
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
    bundle: BundleRef | ModelRef = BundleRef(),
    requested: DecodeOptions = DecodeOptions(),
    *,
    rows: int | None = None,
    runtime: Runtime = Runtime(),
    workers: Workers = Workers(),
    log: Log,
    progress: Progress,
) -> RunSummary:
    """Caption every image of the inputs and write `outputs.out`, which appears only if the whole run succeeds.

    `requested` overrides the settings of `bundle` (default: the embedded demo). `rows` is the number of beams in flight
    (None: what suits device and memory). Until the end every caption is kept in a journal next to the output, from
    which the same call resumes after an interruption. `log` gets notes for the user, one line each.

    Raises an EngineError.
    """
    # before a large folder is listed, so that a missing library is reported at once
    runtime = choose_runtime(runtime, workers, log)
    if inputs.shard and outputs.is_stream:
        raise UsageError("--shard needs a file for --out, not -, because `engine merge` reads it")
    calibration = None if outputs.calibration is None else Calibration.read(outputs.calibration)
    # all images, also with --shard: ids must be unique, and outputs harmless, in the whole run
    all_images, left_aside = find(inputs, outputs, bundle, log)
    prompts = _prompts(inputs, all_images)
    shard = Shard.parse(inputs.shard) if inputs.shard else None
    images = all_images if shard is None else shard.part(all_images)
    with lock(outputs, log):  # first: a second run is refused before it loads a bundle or starts workers
        located = bundle.located(log)  # converts checkpoints, which may take minutes
        opened = located.open()
        # before workers start, so that a wrong option is reported at once
        decoding = resolve(opened, CaptionTokenizer(opened), requested, prompts)
        options = decoding.options
        attention = _attention_files(opened, outputs, runtime)
        if attention is not None:
            decoding = replace(decoding, attention=attention.layers)
        if calibration is not None:
            calibration.require(options.num_return_sequences)
        with (
            open_source(opened, WorkOrder(located, opened.digest, runtime, decoding, rows), workers, log) as source,
            open_record(
                images,
                source,
                outputs,
                log,
                runtime=runtime,
                prompts=prompts,
                calibration=calibration,
                attention=attention,
            ) as record,
        ):
            log(f"detail: {counted(len(images), 'image')} to caption, journal {record.journal_path}")
            log(f"detail: bundle {opened.path}, {opened.precision}, digest {opened.digest[:12]}")
            log(f"detail: options {options}")
            # before captioning, which may take hours
            log_notes(opened, requested, options, outputs, log, rows=rows, prompts=prompts)
            stream = RowStream(record, outputs) if outputs.is_stream else None
            seconds = keep(source.captions(record, log), record, progress, stream)
            # after captioning, because the notes grow while images are read
            for line in note_lines(source.notes):
                log(f"note: {line}")
            write(record, outputs, options, log, is_shard=shard is not None)
            signature = run_signature(source.bundle, source.backend_name, options, inputs.high_bit_depth, runtime)
            # last: without its note an output cannot be merged, so that a run killed before this is noticed
            if shard is not None:
                from engine.run.shards import write_notes

                ids = [image.id for image in all_images]
                settings = _text_settings(outputs, prompts, calibration)
                write_notes(shard, lines_written(record, outputs), ids, signature, settings)
            record.finish()
    return RunSummary(
        images=len(images),
        captions=len(record.captions),
        resumed=record.resumed,
        unreadable=len(record.failures),
        empty=sum(not caption.text for caption in record.captions.values()),
        seconds=seconds,
        # captions of an earlier run took no time in this one
        images_per_s=(len(record.captions) - record.resumed) / seconds,
        out=str(outputs.out),
        signature=signature,
        left_aside=left_aside,
    )


def _attention_files(bundle: Bundle, outputs: Outputs, runtime: Runtime) -> AttentionFiles | None:
    """Return the files of --attention, None without. Raises UsageError if bundle or backend do not support maps."""
    if outputs.attention is None:
        return None
    if runtime.backend != "auto":  # that of a cluster is chosen by its nodes, which check it as well
        require_attention(bundle, runtime.backend)
    return AttentionFiles(outputs.attention, layers_of(bundle, outputs.layers()))


def _text_settings(outputs: Outputs, prompts: object, calibration: Calibration | None) -> list[object]:
    """Return what decides the text of outputs, apart from the signature: shards that differ in it cannot be merged."""
    settings: list[object] = [outputs.text_settings, prompts]
    if calibration is not None:  # otherwise omitted: shards of earlier versions can be merged with new ones
        settings += [asdict(calibration), outputs.abstain_below]
    return settings


def log_notes(
    bundle: Bundle,
    requested: DecodeOptions,
    options: DecodeOptions,
    outputs: Outputs,
    log: Log,
    *,
    rows: int | None,
    prompts: Mapping[str, str] | None = None,
) -> None:
    """Log what a user should know of the bundle and the `requested` options, given the `options` in force."""
    for note in (*bundle.notes, *notes_on(requested, options, rows)):
        log(f"note: {note}")
    if outputs.without_prompt and not options.prompt and prompts is None:
        log("note: --without-prompt has no effect without --prompt or --prompts")


def _prompts(inputs: Inputs, images: list[ImageFile]) -> dict[str, str] | None:
    """Return the prompt of each image, or None without a table of prompts. Raises UsageError for unknown columns."""
    columns, ids = inputs.columns, [image.id for image in images]
    prompts = read_prompts(inputs.prompts, ids, columns) if inputs.prompts else None
    columns.require_found()  # here, because --id-column may be in the manifest or in the prompts, both read by now
    return prompts


def find(inputs: Inputs, outputs: Outputs, bundle: BundleRef | ModelRef, log: Log) -> tuple[list[ImageFile], list[str]]:
    """Return the images to caption, in order, and the names of the entries that were skipped.

    Raises UsageError if there are no images, or if an output would overwrite one.
    """
    found = find_inputs(inputs.places, inputs.find_options)
    images = found.images
    if inputs.manifest:
        images = order_by_manifest(images, inputs.manifest, inputs.columns)
    tables = [table for table in (inputs.manifest, inputs.prompts, outputs.calibration) if table]
    # all images found, not only those of the manifest: no output may overwrite any of them; those at a URI, which
    # have a folder, cannot be overwritten
    protected = [image.path for image in found.images if image.folder is None] + found.lists + tables
    check(outputs, images, protected, bundle)
    for folder, names in found.left_aside.items():
        skipped = describe_ignored(names, found.imageless)
        hint = " (--recursive looks into folders)" if "folder" in skipped and not inputs.recursive else ""
        log(f"skipped in {folder}: {skipped}{hint}")
    return images, [name for names in found.left_aside.values() for name in names]


def check(outputs: Outputs, images: list[ImageFile], protected: list[Path], bundle: BundleRef | ModelRef) -> None:
    """Raise UsageError if an output cannot be written, is inside the bundle or would overwrite a `protected` file."""
    outputs.check(protected)
    folders = {f"{flag} {path}": path.parent for flag, path in outputs.files().items()}
    if outputs.sidecar_dir is not None:
        folders[f"--sidecar-dir {outputs.sidecar_dir}"] = outputs.sidecar_dir
    if outputs.attention is not None:
        check_attention(outputs.attention, [image.id for image in images])
        folders[f"--attention {outputs.attention}"] = outputs.attention
    bundle_folders = [folder.resolve() for folder in bundle.folders()]
    for output, folder in folders.items():
        if folder.resolve() in bundle_folders:
            raise UsageError(f"{output} would be inside the bundle: choose another folder")
    if outputs.sidecar is not None:
        written = outputs.files() | ({} if outputs.journal is None else {"the journal": outputs.journal})
        reserved = {path: f"the input {path}" for path in protected}
        reserved |= {path: f"{flag} {path}" for flag, path in written.items()}
        paths = sidecar_paths(images, outputs.sidecar_dir)
        check_sidecars(paths, outputs.sidecar, outputs.sidecar_dir, reserved)


@contextmanager
def lock(outputs: Outputs, log: Log) -> Iterator[None]:
    """Lock the outputs for this run. Raises UsageError if another run is writing one of them."""
    with ExitStack() as stack:
        for path in outputs.files().values():
            output_lock = stack.enter_context(OutputLock(path))
            if output_lock.note:
                log(f"note: {output_lock.note}")
        yield


@contextmanager
def open_record(
    images: list[ImageFile],
    source: Source,
    outputs: Outputs,
    log: Log,
    *,
    runtime: Runtime = Runtime(),
    prompts: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
    attention: AttentionFiles | None = None,
) -> Iterator[RunRecord]:
    """Open the record of a run; log what is taken from an earlier run, and on errors what this one keeps."""
    options = source.decoding.options
    settings = settings_line(source.bundle, source.backend_name, options, runtime)
    # the key of the journal: captions of another bundle, other options or other packages are never mixed in
    made_with = f"{settings}|{source.environment}"
    out = None if outputs.is_stream else outputs.out
    with (
        # no caption may come from a bundle that is overwritten during the run
        watched(source.bundle) as watch,
        RunRecord(
            images,
            out,
            made_with,
            prompts=prompts,
            prompt=options.prompt,
            resume=outputs.resume,
            update=outputs.update,
            check_bundle=watch.check,
            calibration=calibration,
            attention=attention,
        ) as record,
    ):
        if record.set_aside:
            log(
                "note: the journal of an earlier run cannot be resumed (another bundle, other options or packages, "
                f"damaged, or --no-resume): it was moved to {record.set_aside}, starting over"
            )
        if record.without_attention:
            log(
                f"{counted(record.without_attention, 'image is', 'images are')} captioned again, because "
                f"{outputs.attention} lacks their attention"
            )
        if record.resumed:
            log(
                f"{counted(record.resumed, 'caption of an earlier run is', 'captions of an earlier run are')} taken "
                f"from {record.journal_path}"
            )
        if record.update:
            if record.earlier:
                left = len(images) - record.resumed
                log(
                    f"{left} of {counted(len(images), 'image')} to caption: new, changed, or not reached by the last "
                    "run"
                )
        elif record.not_reused:
            log(
                f"{counted(record.not_reused, 'caption of it is', 'captions of it are')} not used: damaged, or the "
                "image has changed or is no longer among the inputs"
            )
        try:
            yield record
        except BaseException:  # Ctrl-C as well
            if record.captions and record.journal_path is not None and record.journal_path.exists():
                count = len(record.captions)
                log(
                    f"note: {counted(count, 'caption is', 'captions are')} kept in {record.journal_path}: "
                    f"{record.same_command} resumes from there"
                )
            raise


def keep(captions: Iterable[Caption], record: RunRecord, progress: Progress, stream: RowStream | None = None) -> float:
    """Record every caption as it is finished, and write it to `stream`; return the seconds that all of them took."""
    start = time.perf_counter()
    with progress(record.to_do) as update:
        for caption in captions:
            record.add(caption)
            if stream is not None:
                stream.advance()
            update(record.done)
        if stream is not None:  # images that failed after the last caption
            stream.advance()
        update(record.done)
    return time.perf_counter() - start


def write(record: RunRecord, outputs: Outputs, options: DecodeOptions, log: Log, *, is_shard: bool = False) -> None:
    """Write the files of a run. Raises EngineError, and writes nothing, if images failed or changed."""
    # all of them, before check_complete raises one error with their number
    for failure in record.failures:
        log(f"unreadable: {failure}")
    record.check_complete(allow_missing=outputs.allow_missing, is_shard=is_shard)
    record.check_unchanged()  # after captioning: an image may have changed since it was read
    if outputs.sidecar is not None:
        captioned = [image for image in record.images if image.id in record.captions]
        texts = {image.id: text_of(record.captions[image.id], outputs, record.prompt_of(image)) for image in captioned}
        paths = sidecar_paths(captioned, outputs.sidecar_dir)
        written, unchanged = write_sidecars(texts, paths, outputs.sidecar, outputs.sidecar_dir)
        log(f"sidecars: {written} written, {unchanged} unchanged")
    # --out comes last, so that it is only replaced by a complete run
    marked = record.write(outputs, rows_of(record, outputs), drawn=options.do_sample)
    if outputs.abstain_below is not None:
        log(f"{marked} of {counted(len(record.captions), 'caption')} marked for review (--abstain-below)")

"""From a directory of images to run.csv: the one file to read, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.bundle.ensemble import BundlePlace, folders_of
from engine.bundle.signature import run_signature, settings_line
from engine.bundle.watch import watched
from engine.captions import Caption
from engine.errors import UsageError
from engine.files.lock import OutputLock
from engine.inputs.images import ImageFile, describe_ignored, order_by_manifest
from engine.inputs.notes import note_lines
from engine.inputs.paths import find_inputs
from engine.inputs.prompts import read_prompts
from engine.options import DecodeOptions, notes_on
from engine.run.job import Inputs, Outputs
from engine.run.record import RunRecord
from engine.run.rows import RowStream, rows_of, text_of
from engine.run.sidecars import check_sidecars, sidecar_paths, write_sidecars
from engine.run.source import Say, Source, choose_runtime, open_source
from engine.runtime import Runtime, Workers

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
    say: Say,
    progress: Progress,
) -> RunSummary:
    """Caption every image of the inputs into `outputs.out`; that file appears only when the whole run has succeeded.

    `asked` lies over the settings of `bundle` (the embedded demo when None). `rows` is how many beams are decoded side
    by side, None for what suits device and memory. Until the end every caption is kept in a journal next to the output,
    and the same call resumes where it was cut off.

    `say` gets notes for the user, one line each. Raises an EngineError of the kind that fits.
    """
    runtime = choose_runtime(runtime, workers, say)  # before a large folder is listed: what is missing is said at once
    images, left_aside = find(inputs, outputs, bundle, say)
    prompts = _prompts(inputs, images)
    with (
        lock(outputs, say),
        open_source(bundle, asked, rows, runtime, workers, say) as source,
        open_record(
            images, source, options := source.resolve(asked, prompts), outputs, say, runtime=runtime, prompts=prompts
        ) as record,
    ):
        for note in notes_on(asked, options, rows):
            say(f"note: {note}")
        stream = RowStream(record, outputs) if outputs.is_stream else None
        seconds = keep(source.captions(options, record, say), record, progress, stream)
        for line in note_lines(source.notes):
            say(line)
        write(record, outputs, options, say)
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


def find(inputs: Inputs, outputs: Outputs, bundle: BundlePlace | None, say: Say) -> tuple[list[ImageFile], list[str]]:
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
        say(f"skipped in {place}: {describe_ignored(names, found.imageless)}")
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
def lock(outputs: Outputs, say: Say) -> Iterator[None]:
    """Hold the outputs for this run alone. Raises UsageError while another run writes one of them."""
    with ExitStack() as held:
        for path in outputs.files().values():
            one = held.enter_context(OutputLock(path))
            if one.note:
                say(one.note)
        yield


@contextmanager
def open_record(
    images: list[ImageFile],
    source: Source,
    options: DecodeOptions,
    outputs: Outputs,
    say: Say,
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
            say(
                "the journal of an earlier run with another bundle, other options or packages, or one that is damaged "
                f"or not wanted, was moved to {record.set_aside}: starting afresh"
            )
        if record.resumed:
            say(f"{record.resumed} captions of an earlier run are taken from {record.journal_path}")
        if record.update:
            if record.earlier:
                left = len(images) - record.resumed
                say(f"{left} of {len(images)} images are to be captioned: new, changed, or not reached before")
        elif record.not_reused:
            say(
                f"{record.not_reused} more of its captions are not used: their image has changed or is not among the "
                "inputs any more, or they are damaged"
            )
        try:
            yield record
        except BaseException:
            if record.captions and record.journal_path is not None:
                kept = f"{len(record.captions)} captions are kept in {record.journal_path}"
                say(f"{kept}: {record.same_command} resumes from there")
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


def write(record: RunRecord, outputs: Outputs, options: DecodeOptions, say: Say) -> None:
    """Write the files of a run. Raises EngineError where images failed or changed, and writes nothing then."""
    for failure in record.failures:
        say(f"unreadable: {failure}")
    record.check_complete(allow_missing=outputs.allow_missing)
    record.check_unchanged()
    if outputs.sidecar is not None:
        captioned = [image for image in record.images if image.id in record.captions]
        texts = {image.id: text_of(record.captions[image.id], outputs) for image in captioned}
        paths = sidecar_paths(captioned, outputs.sidecar_dir)
        written, left = write_sidecars(texts, paths, outputs.sidecar, outputs.sidecar_dir)
        say(f"sidecars: {written} written, {left} left as they were")
    record.write(outputs, rows_of(record, outputs), drawn=options.do_sample)

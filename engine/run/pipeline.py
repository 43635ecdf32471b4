"""From a directory of images to run.csv: the one file to read, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.files.atomic import check_outputs
from engine.files.lock import OutputLock, lock_path
from engine.inputs.images import ImageFile, find_images, order_by_manifest
from engine.inputs.remote import Location
from engine.run.local import Source, open_source, require_source
from engine.run.record import RunRecord, journal_path
from engine.run.signature import run_signature

Progress = Callable[[int], AbstractContextManager[Callable[[], object]]]
"""Given the number of images, a context whose value is called after each."""


@dataclass(frozen=True)
class Job:
    """A run as it was asked for: `options` holds only what the caller gave (see Bundle.options).

    With `ray`, the address of a Ray cluster or `local`, captions come from `ray_actors` of its workers with `threads`
    CPUs each.
    """

    directory: Location
    out: Path
    recursive: bool = False
    dicom_frame: int = 0
    bundle: Location | None = None
    backend: str = "auto"
    threads: int | None = None
    plans: Path | None = None
    cuda_graphs: bool = False
    rows: int | None = None
    manifest: Path | None = None
    n_best_out: Path | None = None
    timings_out: Path | None = None
    raw_text: bool = False
    allow_missing: bool = False
    resume: bool = True
    ray: str | None = None
    ray_actors: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """How a run went. `resumed` of the captions come from an earlier run that was cut off, `empty` ones have no word.

    `seconds` is captioning; without loading the bundle in this process, but with starting the workers of a cluster.
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


def caption_directory(job: Job, *, say: Callable[[str], None], progress: Progress) -> Summary:
    """Caption every image of a directory into `job.out`; that file appears only when the whole run has succeeded.

    Until then every caption is kept in a journal beside it, and the same job goes on where it was cut off.

    `say` gets notes for the user, one line each. Raises an EngineError of the kind that fits.
    """
    require_source(job)  # before a large folder is listed: what is missing is said at once
    found = find_images(job.directory, recursive=job.recursive, dicom_frame=job.dicom_frame)
    images = order_by_manifest(found.images, job.manifest) if job.manifest else found.images
    _check_outputs(job, [image.path for image in found.images if image.folder is None])
    if found.ignored:
        say(f"{len(found.ignored)} other entries of {job.directory} are left aside")

    with ExitStack() as held:
        for out in filter(None, (job.out, job.n_best_out, job.timings_out)):
            lock = held.enter_context(OutputLock(out))
            if lock.note:
                say(lock.note)
        source = held.enter_context(open_source(job, say))
        return _caption_images(job, source, images, say, progress)


def _caption_images(
    job: Job, source: Source, images: list[ImageFile], say: Callable[[str], None], progress: Progress
) -> Summary:
    options = source.bundle.options(**job.options)
    source.check(options)
    signature = run_signature(source.bundle, source.backend_name, options)
    record = RunRecord(images, job.out, f"{signature}|{source.environment}", resume=job.resume)
    with record, _telling_how_to_go_on(record, say):
        start = time.perf_counter()
        with progress(len(images) - record.resumed) as advance:
            for caption in source.captions(options, record, say):
                record.add(caption)
                advance()
        seconds = time.perf_counter() - start

        for failure in record.failures:
            say(f"unreadable: {failure}")
        record.check_complete(allow_missing=job.allow_missing)
        record.check_unchanged()
        record.write(
            job.out,
            n_best_out=job.n_best_out,
            timings_out=job.timings_out,
            raw_text=job.raw_text,
            drawn=options.do_sample,
        )
    return Summary(
        images=len(images),
        captions=len(record.captions),
        resumed=record.resumed,
        unreadable=len(record.failures),
        empty=sum(not caption.text for caption in record.captions.values()),
        seconds=seconds,
        images_per_s=(len(record.captions) - record.resumed) / seconds,
        out=str(job.out),
        signature=signature,
    )


@contextmanager
def _telling_how_to_go_on(record: RunRecord, say: Callable[[str], None]) -> Iterator[None]:
    """Say what an earlier run left, and what this one leaves if it is stopped."""
    if record.set_aside:
        say(
            "the journal of an earlier run with another bundle, other options, images or packages, or one that is "
            f"damaged or unwanted, was moved to {record.set_aside}: starting afresh"
        )
    if record.resumed:
        say(f"{record.resumed} captions of an earlier run are taken from {record.journal_path}")
    if record.not_reused:
        say(f"{record.not_reused} more are there, but their image has changed or their record is damaged: once again")
    try:
        yield
    except BaseException:
        if record.captions:
            kept = f"{len(record.captions)} captions are kept in {record.journal_path}"
            say(f"{kept}: {record.same_command} goes on from there")
        raise


def _check_outputs(job: Job, inputs: list[Path]) -> None:
    given = {"--out": job.out, "--n-best-out": job.n_best_out, "--timings-out": job.timings_out}
    outputs = {option: path for option, path in given.items() if path is not None}
    outputs |= {"the journal of --out": journal_path(job.out)}
    outputs |= {f"the lock of {option}": lock_path(path) for option, path in list(outputs.items())[:-1]}
    check_outputs(outputs, inputs + ([job.manifest] if job.manifest else []))

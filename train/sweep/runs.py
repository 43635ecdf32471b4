"""Shared by the sweep over beams and by --tune: the job, its images, and runs that a later call can reuse.

A run is a file of captions of these images with one set of options.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.bundle.manifest import Bundle
from engine.bundle.open import open_bundle
from engine.bundle.signature import run_signature
from engine.bundle.tokenizer import detokenise
from engine.captioner import Captioner, Decoding, PendingImages
from engine.captions import Caption
from engine.checkpoints.settings import read_processor
from engine.errors import BundleError, DataError, UsageError, counted
from engine.files.atomic import file_sha256, write_atomically
from engine.files.lock import OutputLock
from engine.inputs.columns import USUAL, Columns
from engine.inputs.ids import join_some
from engine.inputs.images import ImageFile
from engine.options import DecodeOptions
from engine.run.job import Outputs
from engine.run.pipeline import LocalSource, Progress, keep, open_record, write
from engine.run.record import fingerprint, run_key
from engine.scoring.base import MetricInputs
from engine.scoring.neural import weights_folder
from engine.scoring.profiles import make_metric
from engine.scoring.score import ScoreRequest
from train.data.dataset import read_dataset
from train.data.examples import Split, references_by_id

Log = Callable[[str], None]


MAX_EXAMPLES = 50
"""A taller examples.png would come close to the limits of PNG."""
NO_REPEAT = DecodeOptions(no_repeat_ngram_size=3)
"""The decoding options of the MedBLIP paper."""


@dataclass(frozen=True)
class Sweep:
    """The options of a sweep.

    `checkpoint` or `bundle` is required. If both are given, the bundle must be exported from the checkpoint.
    `decoding` overrides the bundle's settings. `image_size` is in px. `limit` selects that many images, evenly spaced.
    `weights` are the folders of neural metrics.
    """

    checkpoint: Path | None
    data: Path
    out: Path
    beams: tuple[int, ...] = (1, 3, 4, 5, 10)
    split: str = "valid"
    decoding: DecodeOptions = NO_REPEAT
    image_size: int | None = None
    bundle: Path | None = None
    metrics: tuple[str, ...] = ("rouge1", "bertscore", "bleu1")
    weights: dict[str, Path] = field(default_factory=dict)
    limit: int | None = None
    examples: int = 6
    unpack_into: Path | None = None
    named: Columns = USUAL


@dataclass(frozen=True)
class Part:
    """Images of a split, their references {id: captions} and prompts {id: prompt}, and the folder for their files.

    `prompts` is None if no image has a prompt. `name` begins the names of the files, '' if the part is the whole split.
    """

    images: list[ImageFile]
    references: dict[str, tuple[str, ...]]
    prompts: dict[str, str] | None
    folder: Path
    name: str = ""

    def file(self, name: str) -> Path:
        """Return the path of a file of this part, such as out/tune/held_back_references.jsonl."""
        return self.folder / (f"{self.name}_{name}" if self.name else name)

    @property
    def references_file(self) -> Path:
        """The file of the references, in the format that `engine score` reads."""
        return self.file("references.jsonl")

    def select(self, ids: Sequence[str], folder: Path, name: str) -> Part:
        """Return the part with only these ids, in the same order."""
        kept = dict.fromkeys(ids)
        prompts = {image_id: (self.prompts or {}).get(image_id, "") for image_id in kept}
        return Part(
            [image for image in self.images if image.id in kept],
            {image_id: self.references[image_id] for image_id in kept},
            prompts if any(prompts.values()) else None,
            folder,
            name,
        )

    def write_references(self) -> None:
        """Write the file of the references as JSON lines."""
        lines = (json.dumps({"id": name, "captions": captions}) for name, captions in self.references.items())
        write_atomically(self.references_file, "\n".join(lines) + "\n")

    def score_request(self, run: Path, metrics: tuple[str, ...], inputs: MetricInputs) -> ScoreRequest:
        """Return the request that scores a run of these images as `engine score` does."""
        folders = {image.path.parent for image in self.images}
        # `engine score` finds images by their ids in one folder.
        is_one_folder = len(folders) == 1 and all(image.path.stem == image.id for image in self.images)
        needs_images = is_one_folder and {"clipscore", "refclipscore"} & set(metrics)
        folder, metrics = folders.pop() if needs_images else None, tuple(dict.fromkeys(metrics))
        return ScoreRequest(run, self.references_file, images=folder, metrics=metrics, setting=inputs)


def check_request(job: Sweep) -> MetricInputs:
    """Check the options before any work starts, and return the inputs of the metrics.

    Raises UsageError for options that would otherwise fail hours later.
    """
    if not job.beams or not job.metrics:
        raise UsageError("a sweep needs a number of beams and a metric: --beams 1,3,4,5,10 --metrics rouge1,bleu1")
    for beams in job.beams:
        job.decoding.replace(num_beams=beams)
    if not 0 <= job.examples <= MAX_EXAMPLES:
        raise UsageError(f"--examples must be between 0 and {MAX_EXAMPLES}, not {job.examples}")
    if job.limit is not None and job.limit < 1:
        raise UsageError(f"--limit must be at least 1, not {job.limit}")
    if job.out.exists() and not job.out.is_dir():
        raise UsageError(f"--out {job.out} is a file: choose a directory")
    inputs = MetricInputs(weights=job.weights)
    for name in job.metrics:
        make_metric(name, inputs, {})
    used = {*job.metrics, *(["clipscore"] if "refclipscore" in job.metrics else [])}
    for name in job.weights:
        if name not in used:
            raise UsageError(f"--weights {name}=... is not used by the metrics of this sweep: {', '.join(job.metrics)}")
        weights_folder(inputs, name, name)
    return inputs


def choose_split(job: Sweep, log: Log) -> Split:
    """Return the job's split, or `test` if `valid` is requested and missing. Raises DataError if it does not exist."""
    data, name = job.data, job.split
    splits = read_dataset(data, unpack_into=job.unpack_into, columns=job.named, log=log)
    if name == "valid" and name not in splits and "test" in splits:
        log(f"{data} has no split valid: using its split test")
        name = "test"
    if name not in splits:
        expected = "valid or test" if name == "valid" else name
        raise DataError(f"{data} has no split {expected}, only {', '.join(splits)}: choose one with --split")
    for line in splits[name].problems.lines():
        log(f"{name}: {line}")
    return splits[name]


def choose_images(split: Split, limit: int | None, folder: Path) -> Part:
    """Return the images of a split in its order, each once. With `limit`, only that many, evenly spaced.

    Raises DataError if files are missing or an id has two images.
    """
    files: dict[str, Path] = {}
    for example in split.examples:
        if files.setdefault(example.id, example.image) != example.image:
            raise DataError(
                f"{split.captions_file}: the id {example.id} has two images, {files[example.id].name} and "
                f"{example.image.name}: give each image a different id"
            )
    ids = [list(files)[index] for index in evenly_spaced(len(files), limit or len(files))]
    missing = [name for name in ids if not files[name].is_file()]
    if missing:
        raise DataError(
            f"{split.captions_file}: {len(missing)} of {len(ids)} images are missing ({join_some(missing, 3)}): "
            "add the files or remove their rows"
        )
    images = [ImageFile(name, path) for name, path in files.items()]
    prompts = {example.id: example.prompt for example in split.examples}
    return Part(images, references_by_id(split.examples), prompts, folder).select(ids, folder, "")


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` indices below `count`, evenly spaced, or all of them.

    The first images would not do: captions are often sorted by kind.
    """
    return list(range(count)) if wanted >= count else [i * count // wanted for i in range(wanted)]


@contextmanager
def lock_output(out: Path, log: Log) -> Iterator[None]:
    """Create the output directory of a sweep and lock it. Raises UsageError if another process is writing there."""
    out.mkdir(parents=True, exist_ok=True)
    with OutputLock(out / "table1.json") as lock:
        if lock.note:
            log(lock.note)
        yield


def prepare_bundle(job: Sweep, log: Log) -> Bundle:
    """Return the given bundle, or export the checkpoint into OUT/bundle.

    An existing OUT/bundle is reused if it was exported from this checkpoint with this image size.
    """
    if job.checkpoint is None:
        if job.bundle is None:
            raise UsageError("a sweep needs a model: add --checkpoint DIR or --bundle DIR")
        return _check_size(open_bundle(job.bundle), job.image_size)
    from export.bundle import checkpoint_sha256, export_bundle

    digest = checkpoint_sha256(job.checkpoint)
    if job.bundle is not None:
        bundle = _check_size(open_bundle(job.bundle), job.image_size)
        if bundle.checkpoint.get("sha256") != digest:
            raise UsageError(f"{job.bundle} was not exported from {job.checkpoint}: remove one of the two options")
        return bundle
    out = job.out / "bundle"
    if out.exists():
        processor = read_processor(job.checkpoint)
        default = None if processor.file is None else processor.size
        size = (job.image_size, job.image_size) if job.image_size else default
        try:
            bundle = Bundle.load(out)
            if bundle.checkpoint.get("sha256") == digest and size in (None, (bundle.image.height, bundle.image.width)):
                log(f"{out} was exported from this checkpoint: reusing it")
                return bundle
            log(f"{out} was exported from another checkpoint or for another image size: exporting again")
        except BundleError as error:
            log(f"{error}: exporting again")
    return export_bundle(job.checkpoint, out, log, image_size=job.image_size)


def _check_size(bundle: Bundle, size: int | None) -> Bundle:
    height, width = bundle.image.height, bundle.image.width
    if size is not None and (height, width) != (size, size):
        raise UsageError(f"{bundle.path} has an image size of {height} x {width} px: remove --image-size {size}")
    return bundle


def about(job: Sweep, bundle: Bundle, split: Split) -> dict[str, Any]:
    """Return what the JSON files of a sweep and of --tune begin with."""
    return {
        "checkpoint": dict(bundle.checkpoint),
        "bundle": bundle.digest,
        "image_size": [bundle.image.height, bundle.image.width],
        "data": str(job.data),
        "split": split.name,
    }


def prefixed(prefix: str, log: Log) -> Log:
    """Return a log function that puts a prefix before every line."""
    return lambda line: log(f"{prefix}: {line}")


class PromptedSource(LocalSource):
    """A captioner in this process that removes the prompts from its captions: references do not contain them."""

    def captions(self, pending: PendingImages, log: Log) -> Iterator[Caption]:
        """See Source.captions."""
        captions = super().captions(pending, log)
        if (starts := self.decoding.starts) is None:
            yield from captions
            return
        for caption in captions:
            prompt_length, alternatives = len(starts[caption.id].prompt), []
            for alternative in caption.alternatives:
                ids = alternative.ids[prompt_length:]
                raw = self._captioner.tokenizer.decode(ids)
                alternatives.append(replace(alternative, text=detokenise(raw), raw_text=raw, ids=ids))
            yield replace(caption, alternatives=tuple(alternatives))


LOG_EVERY_S = 30.0


def caption_run(captioner: Captioner, decoding: Decoding, part: Part, path: Path, log: Log) -> dict[str, Any]:
    """Caption the images into the CSV file `path` and return {beams, run, signature, images_per_s}.

    If the file already exists for the same bundle, options, prompts and images, it is reused. A JSON file of the same
    name holds the key that is compared. `images_per_s` includes reading the images. It is None if all captions come
    from the journal of an interrupted run.
    """
    images, prompts, options = part.images, part.prompts, decoding.options
    source = PromptedSource(captioner, decoding)
    signature = run_signature(source.bundle, source.backend_name, options)
    if prompts is not None:
        digest = hashlib.sha256(json.dumps(sorted(prompts.items())).encode()).hexdigest()
        signature += f"|prompts:{sum(map(bool, prompts.values()))}:{digest[:12]}"
    made_with = f"{signature}|{source.environment}"
    files = json.dumps([fingerprint(image.path) for image in images])
    key = hashlib.sha256((run_key(images, made_with) + files).encode()).hexdigest()
    try:
        known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        # The checksum finds a run file that was changed after it was written.
        if known["key"] == key and known["sha256"] == file_sha256(path):
            run = {name: known[name] for name in ("beams", "run", "signature", "images_per_s")}
            log(f"{path.name} exists for the same bundle, options and images: not captioned again")
            return run
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a missing or damaged file: caption again

    outputs = Outputs(path)
    with open_record(images, source, outputs, log, prompts=prompts) as record:
        seconds = keep(source.captions(record, log), record, periodic_progress(log))
        if failures := record.failures:
            named = "; ".join(str(error) for error in failures[:3])
            more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
            raise DataError(
                f"{len(failures)} of {len(images)} images cannot be read ({named}{more}): fix the files and run the "
                "same command again; it captions only these images"
            )
        write(record, outputs, options, log)
        record.finish()
    new = len(record.captions) - record.resumed
    log(f"{counted(new, 'image')} captioned in {seconds:.1f} s")
    speed = new / seconds if new else None
    run = {"beams": options.num_beams, "run": path.name, "signature": signature, "images_per_s": speed}
    with_key = run | {"key": key, "sha256": file_sha256(path)}
    write_atomically(path.with_suffix(".json"), json.dumps(with_key, indent=1) + "\n")
    return run


def periodic_progress(log: Log) -> Progress:
    """Return a progress that logs a line every LOG_EVERY_S seconds.

    A progress bar would not do: a sweep may run for days with its output in a file.
    """

    @contextmanager
    def progress(length: int) -> Iterator[Callable[[int], None]]:
        logged_at = time.perf_counter()

        def advance(done: int) -> None:
            nonlocal logged_at
            if time.perf_counter() - logged_at > LOG_EVERY_S:
                logged_at = time.perf_counter()
                log(f"{done} of {counted(length, 'image')}")

        yield advance

    return progress

"""The MedBLIP paper's Table 1 for any checkpoint: captions and scores of one split by number of beams.

    OUT/bundle/            the exported checkpoint, unless a bundle is given
    OUT/run_beams_K.csv    captions with K beams; run_beams_K.json says what they were made with
    OUT/references.jsonl   what they are scored against, by `engine score` too
    OUT/table1.md, .csv, .json and examples.png

Knows nothing of decoding and metrics, which are the engine's, and of layouts of data sets (train/data/dataset.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.bundle.fetch import open_bundle
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import BundleError, UsageError
from engine.files.atomic import write_atomically
from engine.files.lock import OutputLock
from engine.inputs.columns import USUAL, Columns
from engine.inputs.images import ImageFile
from engine.options import DecodeOptions
from engine.scoring.base import MetricInputs
from engine.scoring.neural import weights_folder
from engine.scoring.profiles import make_metric
from engine.scoring.score import ScoreReport, ScoreRequest, score_run
from train.sweep.images import choose_images, choose_split, prompts_of, spaced
from train.sweep.prompted import PromptedSource
from train.sweep.runs import caption_run
from train.sweep.table1 import PAPER, REFERENCES, as_csv, as_markdown, draw_examples

Say = Callable[[str], None]

MOST_EXAMPLES = 50
"""A taller picture nears what a PNG is good for."""


NO_REPEAT = DecodeOptions(no_repeat_ngram_size=3)
"""The paper's decoding."""


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was asked for. `decoding` lies over the bundle's settings. One of `checkpoint` and `bundle` is
    needed; both must be of the same weights.

    `image_size` is in px. `limit` takes that many images, evenly spaced. `weights` are folders for neural metrics.
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


def sweep(job: Sweep, say: Say) -> dict[str, Any]:
    """Caption and score a split with every number of beams, write the tables and return what table1.json holds.

    Goes on where the same job was cut off. Raises UsageError, DataError (missing or unreadable images, too),
    BundleError, CheckpointError, ExportError or OutputError; a metric that is unavailable is reported, not raised.
    """
    setting = check_request(job)
    split = choose_split(job.data, job.split, job.unpack_into, say, job.named)
    images, references = choose_images(split, job.limit)
    prompts = prompts_of(split, images)
    if prompts is not None:
        say(f"{sum(map(bool, prompts.values()))} of {len(images)} images have a prompt: scored is what follows it")
    with hold(job.out, say):
        bundle = prepare_bundle(job, say)
        runs = caption_runs(job, bundle, images, prompts, say)
        write_references(job.out / REFERENCES, references)
        rows = [score_row(job, run, images, setting, say) for run in runs]
        table = {
            "checkpoint": dict(bundle.checkpoint),
            "bundle": bundle.digest,
            "image_size": [bundle.image.height, bundle.image.width],
            "data": str(job.data),
            "split": split.name,
            "images": len(images),
            "references": sum(map(len, references.values())),
            "metrics": list(dict.fromkeys(job.metrics)),
            "rows": rows,
            "paper_not_comparable": PAPER,
        }
        write_atomically(job.out / "table1.md", as_markdown(table))
        write_atomically(job.out / "table1.csv", as_csv(table))
        if job.examples:
            shown = [images[place] for place in spaced(len(images), job.examples)]
            draw_examples(shown, references, {row["beams"]: job.out / row["run"] for row in rows}, job.out)
        write_atomically(job.out / "table1.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    return table


@contextmanager
def hold(out: Path, say: Say) -> Iterator[None]:
    """Make the directory of a sweep, and hold it for this one alone. Raises UsageError while another works there."""
    out.mkdir(parents=True, exist_ok=True)
    with OutputLock(out / "table1.json") as lock:
        if lock.note:
            say(lock.note)
        yield


def write_references(path: Path, references: Mapping[str, tuple[str, ...]]) -> None:
    """Write references as JSON lines, as `engine score` reads them."""
    lines = (json.dumps({"id": name, "captions": several}) for name, several in references.items())
    write_atomically(path, "\n".join(lines) + "\n")


def check_request(job: Sweep) -> MetricInputs:
    """Refuse, before any work is spent, what would fail hours later; return what the metrics need."""
    if not job.beams or not job.metrics:
        raise UsageError("a sweep needs a number of beams and a metric: --beams 1,3,4,5,10 --metrics rouge1,bleu1")
    for beams in job.beams:
        job.decoding.replace(num_beams=beams)
    if not 0 <= job.examples <= MOST_EXAMPLES:
        raise UsageError(f"examples.png shows 0 to {MOST_EXAMPLES} images, not {job.examples}: change --examples")
    if job.limit is not None and job.limit < 1:
        raise UsageError(f"--limit takes at least one image, not {job.limit}")
    if job.out.exists() and not job.out.is_dir():
        raise UsageError(f"--out {job.out} is a file: name a directory")
    setting = MetricInputs(weights=job.weights)
    for name in job.metrics:
        make_metric(name, setting, {})
    taken = {*job.metrics, *(["clipscore"] if "refclipscore" in job.metrics else [])}
    for name in job.weights:
        if name not in taken:
            raise UsageError(f"--weights {name}=... is for no metric of this sweep: {', '.join(job.metrics)}")
        weights_folder(setting, name, name)
    return setting


def prepare_bundle(job: Sweep, say: Say) -> Bundle:
    """Return the bundle given, or the one exported into `out` before if it is of this checkpoint, or export it."""
    if job.checkpoint is None:
        if job.bundle is None:
            raise UsageError("a sweep needs a model: --checkpoint DIR, or --bundle DIR")
        return _of_size(open_bundle(job.bundle), job.image_size)
    from export.bundle import export_bundle
    from export.checkpoints.processor import read_processor
    from export.manifest import checkpoint_sha256

    digest = checkpoint_sha256(job.checkpoint)
    if job.bundle is not None:
        bundle = _of_size(open_bundle(job.bundle), job.image_size)
        if bundle.checkpoint.get("sha256") != digest:
            raise UsageError(f"{job.bundle} was not exported from {job.checkpoint}: leave one of the two out")
        return bundle
    out = job.out / "bundle"
    if out.exists():
        processor = read_processor(job.checkpoint)
        own = None if processor.file is None else processor.size
        size = (job.image_size, job.image_size) if job.image_size else own
        try:
            bundle = Bundle.load(out)
            if bundle.checkpoint.get("sha256") == digest and size in (None, (bundle.image.height, bundle.image.width)):
                say(f"{out} is of this checkpoint: taken as it is")
                return bundle
            say(f"{out} is of another checkpoint or image size: exporting again")
        except BundleError as error:
            say(f"{error}: exporting again")
    return export_bundle(job.checkpoint, out, say, image_size=job.image_size)


def _of_size(bundle: Bundle, size: int | None) -> Bundle:
    found = (bundle.image.height, bundle.image.width)
    if size is not None and found != (size, size):
        raise UsageError(f"{bundle.path} takes images of {found[0]} x {found[1]} px: leave --image-size {size} out")
    return bundle


def caption_runs(
    job: Sweep, bundle: Bundle, images: list[ImageFile], prompts: dict[str, str] | None, say: Say
) -> list[dict[str, Any]]:
    """Caption the images with every number of beams, in the order given; return what is known of each run."""
    captioner = Captioner.load(bundle.path)
    asked = [job.decoding.replace(num_beams=k, num_return_sequences=1) for k in dict.fromkeys(job.beams)]
    options = [one.over(bundle.generation) for one in asked]
    for one in options:
        captioner.searches(one, prompts)  # what does not fit is refused before hours are spent on what does
    runs = []
    for one in options:
        path = job.out / f"run_beams_{one.num_beams}.csv"
        tell = prefixed(f"beams {one.num_beams}", say)
        runs.append(caption_run(PromptedSource(captioner), one, images, prompts, path, tell))
    return runs


def prefixed(what: str, say: Say) -> Say:
    """Return a `say` whose lines begin with what they are about."""
    return lambda line: say(f"{what}: {line}")


def score_request(
    run: Path, references: Path, images: list[ImageFile], metrics: tuple[str, ...], setting: MetricInputs
) -> ScoreRequest:
    """Return what `engine score` would be asked for a run of these images."""
    folders = {image.path.parent for image in images}
    is_listed = len(folders) == 1 and all(image.path.stem == image.id for image in images)
    wants_images = is_listed and {"clipscore", "refclipscore"} & set(metrics)
    folder = folders.pop() if wants_images else None
    return ScoreRequest(run, references, images=folder, metrics=tuple(dict.fromkeys(metrics)), setting=setting)


def score_row(
    job: Sweep, run: dict[str, Any], images: list[ImageFile], setting: MetricInputs, say: Say
) -> dict[str, Any]:
    """Score one run as `engine score` does; return its row of the table."""
    request = score_request(job.out / run["run"], job.out / REFERENCES, images, job.metrics, setting)
    report = score_run(request, prefixed(f"beams {run['beams']}", say))
    return run | {"scores": _scores(report), "distinct_captions": len(set(report.items.candidates))}


def _scores(report: ScoreReport) -> dict[str, dict[str, Any]]:
    return {
        score.name: {"unavailable": score.unavailable}
        if score.unavailable
        else {"value": score.value, "low": score.low, "high": score.high, "signature": score.signature}
        for score in report.scores
    }

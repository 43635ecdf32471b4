"""Sweep over numbers of beams: caption and score a split with each of them, and write Table 1 of the MedBLIP paper.

The table is written as Markdown, CSV and JSON, next to the paper's figures. Examples are drawn into a PNG.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.bundle.manifest import Bundle
from engine.bundle.open import open_bundle
from engine.captioner import Captioner
from engine.errors import BundleError, UsageError
from engine.files.atomic import replace_file, write_atomically
from engine.files.lock import OutputLock
from engine.inputs.columns import USUAL, Columns
from engine.inputs.images import ImageFile
from engine.inputs.pixels import decode_image
from engine.inputs.tables import read_table
from engine.options import DecodeOptions
from engine.run.outputs import CONTROL
from engine.scoring.base import MetricInputs
from engine.scoring.neural import weights_folder
from engine.scoring.profiles import make_metric
from engine.scoring.score import ScoreReport, ScoreRequest, score_run
from train.sweep.runs import PromptedSource, caption_run, choose_images, choose_split, evenly_spaced, prompts_of

PAPER: dict[str, dict[int, tuple[float, float, float | None]]] = {
    "base": {
        1: (0.2632, 0.6593, 0.2919),
        3: (0.2640, 0.6589, 0.3009),
        4: (0.2647, 0.6595, 0.2999),
        5: (0.2647, 0.6596, None),
    },
    "large": {
        1: (0.2695, 0.6661, 0.2853),
        3: (0.2744, 0.6677, 0.2955),
        4: (0.2745, 0.6680, 0.2955),
        5: (0.2722, 0.6673, 0.2921),
    },
}
"""MedBLIP's Table 1: {model: {beams: (ROUGE, BERTScore, BLEU)}}, None for a figure that we do not know. The rows of 10
beams are left out: for both models they repeat the greedy rows to six digits, a copying error.
"""
TITLES = {"rouge1": "ROUGE-1", "bertscore": "BERTScore", "bleu1": "BLEU-1"}
REFERENCES = "references.jsonl"
WIDTH_IN, IMAGE_IN, LINE_IN, GAP_IN = 9.0, 1.8, 0.155, 0.25
"""Sizes in examples.png, in inches: its width, the side of an image, the height of a line, the gap between examples."""
LINE_CHARS, MAX_CHARS = 98, 600
"""Characters per line and per caption in examples.png. run_beams_K.csv holds the full captions."""


def as_markdown(table: dict[str, Any]) -> str:
    """Return the table as Markdown: our results with their signatures, then the paper's table in a separate section."""
    metrics, rows = table["metrics"], table["rows"]
    titles = [TITLES.get(name, name) for name in metrics]
    name, (height, width) = table["checkpoint"].get("name", "a bundle"), table["image_size"]
    lines = [f"# {name}, split {table['split']}, by number of beams", ""]
    lines += markdown_rows(
        ["Beam size", *titles, "images/s", "distinct captions"],
        [
            [
                str(row["beams"]),
                *(_cell(row["scores"][metric]) for metric in metrics),
                "-" if row["images_per_s"] is None else f"{row['images_per_s']:.2f}",
                f"{row['distinct_captions']} of {table['images']}",
            ]
            for row in rows
        ],
    )
    lines += [
        "",
        "95 % intervals in brackets (bootstrap over images). All rows use the same images, so do not compare two rows",
        "by these intervals. Use",
        f"`engine score compare {rows[0]['run']} {rows[-1]['run']} --references {REFERENCES}`.",
        "",
        f"* data: {table['data']}, split {table['split']}: {table['images']} images, resized to {height} x {width} px, "
        f"{table['references']} references",
        f"* checkpoint: {name}, sha256 {table['checkpoint'].get('sha256', 'unknown')}",
    ]
    for metric, title in zip(metrics, titles, strict=True):
        score = rows[0]["scores"][metric]
        how = f"unavailable: {score['unavailable']}" if "unavailable" in score else f"`{score['signature']}`"
        lines.append(f"* {title}: {how}")
    signature = rows[0]["signature"].replace(f"num_beams:{rows[0]['beams']}|", "num_beams:K|")
    return "\n".join([*lines, f"* run: `{signature}`", "", *_paper_lines()]) + "\n"


def _cell(score: dict[str, Any]) -> str:
    if "unavailable" in score:
        return "unavailable"
    return f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]"


def _paper_lines() -> list[str]:
    rows = [
        [model, str(beams), *("-" if value is None else f"{value:.4f}" for value in values)]
        for model, by_beams in PAPER.items()
        for beams, values in by_beams.items()
    ]
    return [
        "## NOT comparable: MedBLIP's own Table 1",
        "",
        "The paper's figures, for the shape of the curve only: another task (ROCOv2 / ImageCLEF test data), another",
        "model, other data. `-` marks figures that we do not know. The paper's rows of 10 beams are left out: for both",
        "models they repeat the greedy rows to six digits, a copying error.",
        "",
        *markdown_rows(["Model (paper)", "Beam size", "ROUGE", "BERTScore", "BLEU"], rows),
    ]


def markdown_rows(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def as_csv(table: dict[str, Any]) -> str:
    """Return the table as CSV, one row per number of beams. Cells of unavailable metrics are empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    parts = ("value", "low", "high", "unavailable")
    columns = [name if part == "value" else f"{name}_{part}" for name in table["metrics"] for part in parts]
    other_columns = ("images_per_s", "distinct_captions", "signature")
    writer.writerow(["beams", *columns, "images", *other_columns])
    for row in table["rows"]:
        scores = [row["scores"][name].get(part, "") for name in table["metrics"] for part in parts]
        writer.writerow([row["beams"], *scores, table["images"], *(row[name] for name in other_columns)])
    return stream.getvalue()


def draw_examples(
    images: Sequence[ImageFile], references: dict[str, tuple[str, ...]], runs: dict[int, Path], out: Path
) -> None:
    """Draw OUT/examples.png: images, their references, and their captions in `runs` {beams: run file}."""
    from matplotlib.figure import Figure

    captions = {beams: read_table(path).single() for beams, path in runs.items()}
    blocks = [
        example_lines(image.id, references[image.id], {beams: by_id[image.id] for beams, by_id in captions.items()})
        for image in images
    ]
    heights = [max(IMAGE_IN, LINE_IN * len(block)) + GAP_IN for block in blocks]
    top = total = sum(heights)
    figure = Figure(figsize=(WIDTH_IN, total))
    for image, block, height in zip(images, blocks, heights, strict=True):
        box = (0, (top - IMAGE_IN) / total, IMAGE_IN / WIDTH_IN, IMAGE_IN / total)
        axes = figure.add_axes(box)
        pixels = decode_image(image.path)
        pixels.thumbnail((400, 400))
        axes.imshow(pixels)
        axes.axis("off")
        axes.set_anchor("N")
        for i, (text, colour) in enumerate(block):
            position = (IMAGE_IN + 0.15) / WIDTH_IN, (top - i * LINE_IN) / total
            # Captions are data: a dollar sign must not start a formula.
            figure.text(*position, text, color=colour, size=8, va="top", parse_math=False, usetex=False)
        top -= height
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # missing glyphs are drawn as boxes
        figure.savefig(stream, format="png", dpi=110, bbox_inches="tight")
    replace_file(out / "examples.png", stream.getvalue())


def example_lines(name: str, references: Sequence[str], captions: dict[int, str]) -> list[tuple[str, str]]:
    """Return the lines (text, colour) next to an image. Numbers of beams with the same caption share a line."""
    by_text: dict[str, list[str]] = {}
    for beams, caption in captions.items():
        by_text.setdefault(caption, []).append(str(beams))
    parts = [(name, "grey"), *((f"reference: {text}", "darkgreen") for text in references)]
    parts += [
        (f"{', '.join(beams)} beam{'s' * (beams != ['1'])}: {text or '(empty)'}", "black")
        for text, beams in by_text.items()
    ]
    return [(line, colour) for text, colour in parts for line in _wrap(text)]


def _wrap(text: str) -> list[str]:
    plain = CONTROL.sub(" ", text.encode("utf-8", "replace").decode())
    shown = plain if len(plain) <= MAX_CHARS else plain[:MAX_CHARS] + " ..."
    return textwrap.wrap(shown, LINE_CHARS, subsequent_indent="    ")


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


def sweep(job: Sweep, log: Log) -> dict[str, Any]:
    """Caption and score a split with every number of beams, write the tables and return the content of table1.json.

    An interrupted sweep resumes when it is called again with the same job. Raises UsageError, DataError (also for
    missing or unreadable images), BundleError, CheckpointError, ExportError or OutputError. An unavailable metric is
    reported in the tables and does not raise an error.
    """
    inputs = check_request(job)
    split = choose_split(job.data, job.split, job.unpack_into, log, job.named)
    images, references = choose_images(split, job.limit)
    prompts = prompts_of(split, images)
    if prompts is not None:
        log(f"{sum(map(bool, prompts.values()))} of {len(images)} images have a prompt, which is not scored")
    with lock_output(job.out, log):
        bundle = prepare_bundle(job, log)
        runs = caption_runs(job, bundle, images, prompts, log)
        write_references(job.out / REFERENCES, references)
        rows = [score_row(job, run, images, inputs, log) for run in runs]
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
            shown = [images[index] for index in evenly_spaced(len(images), job.examples)]
            draw_examples(shown, references, {row["beams"]: job.out / row["run"] for row in rows}, job.out)
        write_atomically(job.out / "table1.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    return table


@contextmanager
def lock_output(out: Path, log: Log) -> Iterator[None]:
    """Create the output directory of a sweep and lock it. Raises UsageError if another process is writing there."""
    out.mkdir(parents=True, exist_ok=True)
    with OutputLock(out / "table1.json") as lock:
        if lock.note:
            log(lock.note)
        yield


def write_references(path: Path, references: Mapping[str, tuple[str, ...]]) -> None:
    """Write references as JSON lines, in the format that `engine score` reads."""
    lines = (json.dumps({"id": name, "captions": captions}) for name, captions in references.items())
    write_atomically(path, "\n".join(lines) + "\n")


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


def prepare_bundle(job: Sweep, log: Log) -> Bundle:
    """Return the given bundle, or export the checkpoint into OUT/bundle.

    An existing OUT/bundle is reused if it was exported from this checkpoint with this image size.
    """
    if job.checkpoint is None:
        if job.bundle is None:
            raise UsageError("a sweep needs a model: add --checkpoint DIR or --bundle DIR")
        return _check_size(open_bundle(job.bundle), job.image_size)
    from export.bundle import checkpoint_sha256, export_bundle
    from export.checkpoints.settings import read_processor

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


def caption_runs(
    job: Sweep, bundle: Bundle, images: list[ImageFile], prompts: dict[str, str] | None, log: Log
) -> list[dict[str, Any]]:
    """Caption the images with every number of beams, in the given order, and return one dict per run (caption_run)."""
    captioner = Captioner.load(bundle.path)
    requested = [job.decoding.replace(num_beams=k, num_return_sequences=1) for k in dict.fromkeys(job.beams)]
    # all of them first, because each run may take hours, and one of them may be refused
    by_beams = [captioner.decoding(options, prompts) for options in requested]
    runs = []
    for decoding in by_beams:
        path = job.out / f"run_beams_{decoding.options.num_beams}.csv"
        run_log = prefixed(f"beams {decoding.options.num_beams}", log)
        runs.append(caption_run(PromptedSource(captioner, decoding), images, prompts, path, run_log))
    return runs


def prefixed(prefix: str, log: Log) -> Log:
    """Return a log function that puts a prefix before every line."""
    return lambda line: log(f"{prefix}: {line}")


def score_request(
    run: Path, references: Path, images: list[ImageFile], metrics: tuple[str, ...], inputs: MetricInputs
) -> ScoreRequest:
    """Return the request that scores a run of these images as `engine score` does."""
    folders = {image.path.parent for image in images}
    # `engine score` finds images by their ids in one folder.
    is_one_folder = len(folders) == 1 and all(image.path.stem == image.id for image in images)
    needs_images = is_one_folder and {"clipscore", "refclipscore"} & set(metrics)
    folder = folders.pop() if needs_images else None
    return ScoreRequest(run, references, images=folder, metrics=tuple(dict.fromkeys(metrics)), setting=inputs)


def score_row(
    job: Sweep, run: dict[str, Any], images: list[ImageFile], inputs: MetricInputs, log: Log
) -> dict[str, Any]:
    """Score one run as `engine score` does and return its row of the table."""
    request = score_request(job.out / run["run"], job.out / REFERENCES, images, job.metrics, inputs)
    report = score_run(request, prefixed(f"beams {run['beams']}", log))
    return run | {"scores": _scores(report), "distinct_captions": len(set(report.items.candidates))}


def _scores(report: ScoreReport) -> dict[str, dict[str, Any]]:
    return {
        score.name: {"unavailable": score.unavailable}
        if score.unavailable
        else {"value": score.value, "low": score.low, "high": score.high, "signature": score.signature}
        for score in report.scores
    }

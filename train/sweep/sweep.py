"""Write down a sweep: the table as Markdown and CSV, beside the paper's own, and examples as a picture.

Knows nothing of how captions and scores are made.
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
from train.sweep.runs import PromptedSource, caption_run, choose_images, choose_split, prompts_of, spaced

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
"""MedBLIP's Table 1: {model: {beams: (ROUGE, BERTScore, BLEU)}}, None where we do not know the figure. Its rows of 10
beams repeat the greedy ones to six digits for both models: a copying slip, left out.
"""
TITLES = {"rouge1": "ROUGE-1", "bertscore": "BERTScore", "bleu1": "BLEU-1"}
REFERENCES = "references.jsonl"
WIDTH_IN, PICTURE_IN, LINE_IN, GAP_IN = 9.0, 1.8, 0.155, 0.25
"""Inches of examples.png: its width, the side of a picture, the height of a line, the space between examples."""
LINE_CHARS, MOST_CHARS = 98, 600
"""Characters of a line, and of a caption in examples.png; run_beams_K.csv has all of it."""


def as_markdown(table: dict[str, Any]) -> str:
    """Return the table for people: ours with its signatures, and the paper's below, set apart."""
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
        "In brackets 95 % intervals (bootstrap over images). Rows share their images, so whether two differ is told by",
        f"`engine score compare {rows[0]['run']} {rows[-1]['run']} --references {REFERENCES}` and not by these.",
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
        "model, other data. `-` is not known to us. The paper's rows of 10 beams repeat the greedy ones to six digits",
        "for both models, a copying slip, and are left out.",
        "",
        *markdown_rows(["Model (paper)", "Beam size", "ROUGE", "BERTScore", "BLEU"], rows),
    ]


def markdown_rows(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def as_csv(table: dict[str, Any]) -> str:
    """Return the table for programs: a row a number of beams, empty cells where a metric is unavailable."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    parts = ("value", "low", "high", "unavailable")
    columns = [name if part == "value" else f"{name}_{part}" for name in table["metrics"] for part in parts]
    further = ("images_per_s", "distinct_captions", "signature")
    writer.writerow(["beams", *columns, "images", *further])
    for row in table["rows"]:
        scores = [row["scores"][name].get(part, "") for name in table["metrics"] for part in parts]
        writer.writerow([row["beams"], *scores, table["images"], *(row[name] for name in further)])
    return stream.getvalue()


def draw_examples(
    images: Sequence[ImageFile], references: dict[str, tuple[str, ...]], runs: dict[int, Path], out: Path
) -> None:
    """Draw OUT/examples.png: pictures, their references, and what `runs` {beams: run file} say of them."""
    from matplotlib.figure import Figure

    captions = {beams: read_table(path).single() for beams, path in runs.items()}
    blocks = [
        example_lines(image.id, references[image.id], {beams: said[image.id] for beams, said in captions.items()})
        for image in images
    ]
    heights = [max(PICTURE_IN, LINE_IN * len(block)) + GAP_IN for block in blocks]
    top = total = sum(heights)
    figure = Figure(figsize=(WIDTH_IN, total))
    for image, block, height in zip(images, blocks, heights, strict=True):
        side = (0, (top - PICTURE_IN) / total, PICTURE_IN / WIDTH_IN, PICTURE_IN / total)
        axes = figure.add_axes(side)
        picture = decode_image(image.path)
        picture.thumbnail((400, 400))
        axes.imshow(picture)
        axes.axis("off")
        axes.set_anchor("N")
        for i, (text, colour) in enumerate(block):
            place = (PICTURE_IN + 0.15) / WIDTH_IN, (top - i * LINE_IN) / total
            # captions are data: a dollar sign begins no formula
            figure.text(*place, text, color=colour, size=8, va="top", parse_math=False, usetex=False)
        top -= height
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # what the font lacks is drawn as a box
        figure.savefig(stream, format="png", dpi=110, bbox_inches="tight")
    replace_file(out / "examples.png", stream.getvalue())


def example_lines(name: str, references: Sequence[str], said: dict[int, str]) -> list[tuple[str, str]]:
    """Return the lines (text, colour) beside a picture; numbers of beams that say the same share theirs."""
    by_text: dict[str, list[str]] = {}
    for beams, caption in said.items():
        by_text.setdefault(caption, []).append(str(beams))
    parts = [(name, "grey"), *((f"reference: {text}", "darkgreen") for text in references)]
    parts += [
        (f"{', '.join(beams)} beam{'s' * (beams != ['1'])}: {text or '(empty)'}", "black")
        for text, beams in by_text.items()
    ]
    return [(line, colour) for text, colour in parts for line in _wrap(text)]


def _wrap(text: str) -> list[str]:
    plain = CONTROL.sub(" ", text.encode("utf-8", "replace").decode())
    shown = plain if len(plain) <= MOST_CHARS else plain[:MOST_CHARS] + " ..."
    return textwrap.wrap(shown, LINE_CHARS, subsequent_indent="    ")


Log = Callable[[str], None]

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


def sweep(job: Sweep, log: Log) -> dict[str, Any]:
    """Caption and score a split with every number of beams, write the tables and return what table1.json holds.

    Goes on where the same job was cut off. Raises UsageError, DataError (missing or unreadable images, too),
    BundleError, CheckpointError, ExportError or OutputError; a metric that is unavailable is reported, not raised.
    """
    setting = check_request(job)
    split = choose_split(job.data, job.split, job.unpack_into, log, job.named)
    images, references = choose_images(split, job.limit)
    prompts = prompts_of(split, images)
    if prompts is not None:
        log(f"{sum(map(bool, prompts.values()))} of {len(images)} images have a prompt: scored is what follows it")
    with hold(job.out, log):
        bundle = prepare_bundle(job, log)
        runs = caption_runs(job, bundle, images, prompts, log)
        write_references(job.out / REFERENCES, references)
        rows = [score_row(job, run, images, setting, log) for run in runs]
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
def hold(out: Path, log: Log) -> Iterator[None]:
    """Make the directory of a sweep, and hold it for this one alone. Raises UsageError while another works there."""
    out.mkdir(parents=True, exist_ok=True)
    with OutputLock(out / "table1.json") as lock:
        if lock.note:
            log(lock.note)
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


def prepare_bundle(job: Sweep, log: Log) -> Bundle:
    """Return the bundle given, or the one exported into `out` before if it is of this checkpoint, or export it."""
    if job.checkpoint is None:
        if job.bundle is None:
            raise UsageError("a sweep needs a model: --checkpoint DIR, or --bundle DIR")
        return _of_size(open_bundle(job.bundle), job.image_size)
    from export.bundle import checkpoint_sha256, export_bundle
    from export.checkpoints.settings import read_processor

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
                log(f"{out} is of this checkpoint: taken as it is")
                return bundle
            log(f"{out} is of another checkpoint or image size: exporting again")
        except BundleError as error:
            log(f"{error}: exporting again")
    return export_bundle(job.checkpoint, out, log, image_size=job.image_size)


def _of_size(bundle: Bundle, size: int | None) -> Bundle:
    found = (bundle.image.height, bundle.image.width)
    if size is not None and found != (size, size):
        raise UsageError(f"{bundle.path} takes images of {found[0]} x {found[1]} px: leave --image-size {size} out")
    return bundle


def caption_runs(
    job: Sweep, bundle: Bundle, images: list[ImageFile], prompts: dict[str, str] | None, log: Log
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
        tell = prefixed(f"beams {one.num_beams}", log)
        runs.append(caption_run(PromptedSource(captioner), one, images, prompts, path, tell))
    return runs


def prefixed(what: str, log: Log) -> Log:
    """Return a `log` whose lines begin with what they are about."""
    return lambda line: log(f"{what}: {line}")


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
    job: Sweep, run: dict[str, Any], images: list[ImageFile], setting: MetricInputs, log: Log
) -> dict[str, Any]:
    """Score one run as `engine score` does; return its row of the table."""
    request = score_request(job.out / run["run"], job.out / REFERENCES, images, job.metrics, setting)
    report = score_run(request, prefixed(f"beams {run['beams']}", log))
    return run | {"scores": _scores(report), "distinct_captions": len(set(report.items.candidates))}


def _scores(report: ScoreReport) -> dict[str, dict[str, Any]]:
    return {
        score.name: {"unavailable": score.unavailable}
        if score.unavailable
        else {"value": score.value, "low": score.low, "high": score.high, "signature": score.signature}
        for score in report.scores
    }

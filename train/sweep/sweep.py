"""Sweep over numbers of beams: caption and score a split with each of them, and write Table 1 of the MedBLIP paper.

The table is written as Markdown, CSV and JSON, next to the paper's figures. Examples are drawn into a PNG.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.captioner import Captioner
from engine.files.atomic import replace_file, write_atomically
from engine.inputs.images import ImageFile
from engine.inputs.pixels import decode_image
from engine.inputs.tables import read_table
from engine.run.outputs import CONTROL
from engine.scoring.score import score_run
from train.sweep.runs import (
    Log,
    Sweep,
    about,
    caption_run,
    check_request,
    choose_images,
    choose_split,
    evenly_spaced,
    lock_output,
    prefixed,
    prepare_bundle,
)

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
WIDTH_IN, IMAGE_IN, LINE_IN, GAP_IN = 9.0, 1.8, 0.155, 0.25
"""Sizes in examples.png, in inches: its width, the side of an image, the height of a line, the gap between examples."""
LINE_CHARS, MAX_CHARS = 98, 600
"""Characters per line and per caption in examples.png. run_beams_K.csv holds the full captions."""


def as_markdown(table: dict[str, Any]) -> str:
    """Return the table as Markdown: our results with their signatures, then the paper's table in a separate section."""
    metrics, rows = table["metrics"], table["rows"]
    titles = [TITLES.get(name, name) for name in metrics]

    def cell(score: dict[str, Any]) -> str:
        if "unavailable" in score:
            return "unavailable"
        return f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]"

    name, (height, width) = table["checkpoint"].get("name", "a bundle"), table["image_size"]
    lines = [f"# {name}, split {table['split']}, by number of beams", ""]
    lines += markdown_rows(
        ["Beam size", *titles, "images/s", "distinct captions"],
        [
            [
                str(row["beams"]),
                *(cell(row["scores"][metric]) for metric in metrics),
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
        f"`engine score compare {rows[0]['run']} {rows[-1]['run']} --references references.jsonl`.",
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
    paper = [
        [model, str(beams), *("-" if value is None else f"{value:.4f}" for value in values)]
        for model, by_beams in PAPER.items()
        for beams, values in by_beams.items()
    ]
    lines += [
        f"* run: `{signature}`",
        "",
        "## NOT comparable: MedBLIP's own Table 1",
        "",
        "The paper's figures, for the shape of the curve only: another task (ROCOv2 / ImageCLEF test data), another",
        "model, other data. `-` marks figures that we do not know. The paper's rows of 10 beams are left out: for both",
        "models they repeat the greedy rows to six digits, a copying error.",
        "",
        *markdown_rows(["Model (paper)", "Beam size", "ROUGE", "BERTScore", "BLEU"], paper),
    ]
    return "\n".join(lines) + "\n"


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
    lines = []
    for text, colour in parts:
        plain = CONTROL.sub(" ", text.encode("utf-8", "replace").decode())
        shown = plain if len(plain) <= MAX_CHARS else plain[:MAX_CHARS] + " ..."
        lines += [(line, colour) for line in textwrap.wrap(shown, LINE_CHARS, subsequent_indent="    ")]
    return lines


def sweep(job: Sweep, log: Log) -> dict[str, Any]:
    """Caption and score a split with every number of beams, write the tables and return the content of table1.json.

    An interrupted sweep resumes when it is called again with the same job. Raises UsageError, DataError (also for
    missing or unreadable images), BundleError, CheckpointError, ExportError or OutputError. An unavailable metric is
    reported in the tables and does not raise an error.
    """
    inputs = check_request(job)
    split = choose_split(job, log)
    part = choose_images(split, job.limit, job.out)
    if part.prompts is not None:
        log(f"{sum(map(bool, part.prompts.values()))} of {len(part.images)} images have a prompt, which is not scored")
    with lock_output(job.out, log):
        bundle = prepare_bundle(job, log)
        captioner = Captioner.load(bundle.path)
        requested = [job.decoding.replace(num_beams=k, num_return_sequences=1) for k in dict.fromkeys(job.beams)]
        # all of them first, because each run may take hours, and one of them may be refused
        by_beams = {options.num_beams: captioner.decoding(options, part.prompts) for options in requested}
        logs = {beams: prefixed(f"beams {beams}", log) for beams in by_beams}
        runs = [
            caption_run(captioner, decoding, part, part.file(f"run_beams_{beams}.csv"), logs[beams])
            for beams, decoding in by_beams.items()
        ]
        part.write_references()
        rows = []
        for run in runs:
            report = score_run(part.score_request(job.out / run["run"], job.metrics, inputs), logs[run["beams"]])
            scores = {
                score.name: {"unavailable": score.unavailable}
                if score.unavailable
                else {"value": score.value, "low": score.low, "high": score.high, "signature": score.signature}
                for score in report.scores
            }
            rows.append(run | {"scores": scores, "distinct_captions": len(set(report.items.candidates))})
        table = about(job, bundle, split) | {
            "images": len(part.images),
            "references": sum(map(len, part.references.values())),
            "metrics": list(dict.fromkeys(job.metrics)),
            "rows": rows,
            "paper_not_comparable": PAPER,
        }
        write_atomically(job.out / "table1.md", as_markdown(table))
        write_atomically(job.out / "table1.csv", as_csv(table))
        if job.examples:
            shown = [part.images[index] for index in evenly_spaced(len(part.images), job.examples)]
            draw_examples(shown, part.references, {row["beams"]: job.out / row["run"] for row in rows}, job.out)
        write_atomically(job.out / "table1.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    return table

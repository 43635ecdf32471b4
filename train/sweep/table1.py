"""Write down a sweep: the table as Markdown and CSV, beside the paper's own, and examples as a picture.

Knows nothing of how captions and scores are made.
"""

from __future__ import annotations

import csv
import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.files.atomic import replace_file
from engine.files.run_files import CONTROL
from engine.inputs.images import ImageFile
from engine.inputs.pixels import decode_image
from engine.inputs.tables import read_table

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

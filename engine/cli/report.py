"""The command that makes a page to look at a run; see app.py for the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from engine.cli.shared import PATH, column_options, say
from engine.inputs.depth import CLIP
from engine.inputs.depth import HELP as DEPTH_HELP


@click.command()
@click.option("--run", type=PATH, required=True, help="run.csv, or captions in another layout.")
@click.option("--images", type=PATH, required=True, help="Folder of the images.")
@click.option("--out", type=PATH, required=True, help="Folder for the page: a new one, or an earlier report.")
@click.option("--references", type=PATH, help="Reference captions, in any layout that `score` reads.")
@click.option("--scores", type=PATH, help="Scores of every image, from `score --per-image`.")
@click.option("--n-best", type=PATH, help="Candidates, from `caption --n-best-out`.")
@click.option("--against", type=PATH, help="Another run of the same images, to compare with.")
@click.option("--against-scores", type=PATH, help="Scores of every image of the other run: who wins where.")
@click.option(
    "--columns", type=PATH, multiple=True, help="CSV of anything else by ID: `caption --timings-out`, labels; several."
)
@click.option("--signature", "signatures", multiple=True, help="A line of `caption` or `score` to show; several.")
@click.option("--recursive", is_flag=True, help="Look for images in the folders of the directory, too.")
@click.option("--dicom-frame", type=click.IntRange(0), default=0, help="Frame of DICOM files, counted from 0.")
@click.option("--high-bit-depth", default=CLIP, show_default=True, help=DEPTH_HELP)
@click.option("--thumbnail-px", type=click.IntRange(32, 2048), default=320, show_default=True)
@column_options("caption")
def report(**given: Any) -> None:
    """Make a page to look at a run: open index.html of --out in any browser, no server needed.

    Pictures, captions, references with the words that differ, scores, candidates and a second run, to search, sort,
    filter and step through.
    """
    from engine.report.build import build_report
    from engine.report.gather import ReportRequest

    summary = build_report(ReportRequest(**given), say=say, progress=_progress_bar)
    say(summary.signature)
    say(f"{summary.images} images, {summary.thumbnails_made} new thumbnails -> {summary.page}")


@contextmanager
def _progress_bar(length: int) -> Iterator[Callable[[], None]]:
    with click.progressbar(length=length, label="thumbnails", file=sys.stderr, show_pos=True) as bar:
        yield lambda: bar.update(1)

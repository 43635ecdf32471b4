"""`engine score compare`: the difference of two runs, and the captions that changed most."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli.results import (
    further_inputs,
    matching_options,
    measured_report,
    metric_inputs,
    metric_options,
    options_given,
    parse_names,
)
from engine.cli.shared import PATH, column_options, log, printable
from engine.errors import DataError, UsageError

if TYPE_CHECKING:  # for a quick --help
    from engine.inputs.columns import Columns

MEASURING = (
    *("metrics", "weights", "plugin", "device", "batch-size", "bertscore-layer"),
    *("id-column", "caption-column", "prompt-column"),
)
"""Options of the metrics. They have no effect on files of --per-image, which hold computed scores."""
MATCHING = ("prompt", "prompts", "keep-prompt", "only-common")
"""Options that match a run with references. They have no effect on files of --per-image either."""


@click.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.option(
    "--references",
    type=PATH,
    help="Reference captions, to score FIRST and SECOND if they are runs, not files of --per-image.",
)
@click.option(
    "--metrics",
    callback=parse_names,
    help="Comma-separated metrics to score the runs with; default: rouge1,bleu1,cider.",
)
@click.option(
    "--resamples", type=click.IntRange(100), default=1000, show_default=True, help="Number of bootstrap resamples."
)
@click.option(
    "--changed",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Number of captions to list that changed most; of images if there are only scores.",
)
@click.option(
    "--changes-out", type=PATH, help="Write all captions that changed to this CSV file, the most changed first."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the results as one JSON line on stdout; the text goes to stderr."
)
@matching_options
@metric_options
@column_options("caption", "prompt")
def compare(
    first: Path,
    second: Path,
    resamples: int,
    changed: int,
    changes_out: Path | None,
    as_json: bool,
    named: Columns,
    **given: Any,
) -> None:
    """Compare two runs with a paired bootstrap, and list the captions that changed most.

    Prints SECOND minus FIRST with a 95 % interval (fixed seed) for every metric. FIRST and SECOND are runs, or files of
    `score --per-image`. Two runs without --references are not scored: only their captions are compared.
    """
    from engine.files.atomic import check_outputs
    from engine.scoring.files import is_per_image

    idle = set(options_given(click.get_current_context())) & {f"--{name}" for name in MEASURING + MATCHING}
    runs = given["references"] is not None or not (is_per_image(first) or is_per_image(second))
    if runs and given["references"] is None:
        idle -= {"--id-column", "--caption-column"}
    if idle and given["references"] is None:
        raise UsageError(f"{', '.join(sorted(idle))}: only with --references, to score two runs")
    if changes_out is not None:
        if not runs:
            raise UsageError("--changes-out needs two runs: files of --per-image have no captions")
        check_outputs({"--changes-out": changes_out}, [first, second, *further_inputs(given)])
    changes = _changes(first, second, given["references"], named, only_common=given["only_common"]) if runs else []
    results: dict[str, Any] = {}
    scores: tuple[Any, Any] = ({}, {})
    ids: list[str] = []
    if given["references"] is not None or not runs:
        ids, scores, results = _compared(first, second, resamples, named=named, **given)
    for name, result in results.items():
        click.echo(
            f"{name.partition('@')[0]:14} {scores[0][name].value:.4f} -> {scores[1][name].value:.4f}  "
            f"{result.difference:+.4f} [{result.low:+.4f}, {result.high:+.4f}]  p={result.p:.3f}  "
            f"{result.wins} better, {result.losses} worse, {result.ties} equal",
            err=as_json,
        )
    lines = _changed_captions(changes, changed, ids, scores, results) if runs else []
    if not runs and changed:
        lines = _changed_scores(changed, ids, scores, next(iter(results)))
    for line in lines:
        click.echo(printable(line), err=as_json)
    if changes_out is not None:
        _write_changes(changes_out, changes)
    if as_json:
        click.echo(_as_json(changes, results))


def _compared(
    first: Path, second: Path, resamples: int, **given: Any
) -> tuple[list[str], tuple[Any, Any], dict[str, Any]]:
    """Return the ids, the scores of both files and the comparison of each metric that they share, by its signature."""
    from engine.scoring import base

    (ids, first_scores), (second_ids, second_scores) = (_measured(path, **given) for path in (first, second))
    scores = (first_scores, second_scores)
    if ids != second_ids:
        raise UsageError(f"{first} and {second} do not cover the same images")
    shared = [name for name in first_scores if name in second_scores]
    if not shared:
        names = [", ".join(sorted(name.partition("@")[0] for name in side)) for side in scores]
        raise UsageError(
            f"{first} ({names[0]}) and {second} ({names[1]}) share no metric with the same signature and the same "
            "references: score both in the same way"
        )
    return ids, scores, {name: base.compare(first_scores[name], second_scores[name], resamples) for name in shared}


def _write_changes(path: Path, changes: Sequence[Change]) -> None:
    import csv  # here, so that --help starts fast
    from io import StringIO

    from engine.files.atomic import write_atomically

    stream = StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["ID", "change", "first", "second"])
    writer.writerows([name, f"{change:.4f}", *texts] for name, change, *texts in changes if texts[0] != texts[1])
    write_atomically(path, stream.getvalue())
    log(f"-> {path}")


def _as_json(changes: Sequence[Change], results: Mapping[str, Any]) -> str:
    """Return the comparison of each metric as JSON, or without metrics a summary of the changes."""
    from dataclasses import asdict

    if results:
        return json.dumps({name.partition("@")[0]: asdict(result) for name, result in results.items()})
    differ = sum(ours != theirs for _, _, ours, theirs in changes)
    mean = sum(change for _, change, *_ in changes) / len(changes)
    return json.dumps({"captions": {"images": len(changes), "differ": differ, "mean_change": mean}})


Change = tuple[str, float, str, str]
"""Id, change 0 to 1, first and second caption."""


def _changes(first: Path, second: Path, references: Path | None, named: Columns, *, only_common: bool) -> list[Change]:
    """Return the changes of all captions, the largest first. Raises DataError if the runs are of different images."""
    from engine.captions import changed_words
    from engine.inputs.ids import join_some
    from engine.inputs.tables import own_by_reference_id, read_table

    tables = [read_table(path, named) for path in (first, second)]
    known = tables[0] if references is None else read_table(references, named)
    ours, theirs = (own_by_reference_id(known, table) for table in tables)
    if references is None:
        named.require_found()
    alone = sorted(set(ours) ^ set(theirs))
    if alone and not (only_common and set(ours) & set(theirs)):
        raise DataError(
            f"{first} and {second} do not cover the same images: only in one of them: {join_some(alone, 3)}"
        )
    changes = [
        (name, changed_words(ours[name], theirs[name]), ours[name], theirs[name]) for name in ours if name in theirs
    ]
    return sorted(changes, key=lambda change: (-change[1], change[2] == change[3]))


def _changed_captions(
    changes: Sequence[Change],
    count: int,
    ids: Sequence[str],
    scores: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
) -> list[str]:
    """Return the lines about the captions that changed most, with the scores of each."""
    differing = [change for change in changes if change[2] != change[3]]
    lines = [f"{len(differing)} of {len(changes)} captions differ"]
    if differing and count:
        mean = sum(change for _, change, *_ in changes) / len(changes)
        lines[0] += f", mean change {mean:.3f} (1 - F1 of the words); the most changed:"
    row_of = {name: row for row, name in enumerate(ids)}
    for name, change, ours, theirs in differing[:count]:
        values = [
            f"{metric.partition('@')[0]} {scores[0][metric].per_image[row_of[name]]:.3f} -> "
            f"{scores[1][metric].per_image[row_of[name]]:.3f}"
            for metric in shared
            if name in row_of
        ]
        lines += ["  ".join([f"  {name}  change {change:.3f}", *values]), f"    - {ours}", f"    + {theirs}"]
    return lines


def _changed_scores(count: int, ids: Sequence[str], scores: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Return the lines about the images whose score by a metric changed most."""
    ours, theirs = (side[metric].per_image.tolist() for side in scores)
    rows = sorted(range(len(ids)), key=lambda row: -abs(theirs[row] - ours[row]))
    rows = [row for row in rows if theirs[row] != ours[row]][:count]
    if not rows:
        return []
    lines = [f"the images whose {metric.partition('@')[0]} changed most (for captions, compare the runs themselves):"]
    return lines + [f"  {ids[r]}  {ours[r]:.3f} -> {theirs[r]:.3f}  {theirs[r] - ours[r]:+.3f}" for r in rows]


def _measured(
    path: Path,
    references: Path | None,
    weights: dict[str, str],
    plugins: dict[str, str],
    device: str | None,
    batch_size: int,
    named: Columns,
    **given: Any,
) -> tuple[list[str], dict[str, Any]]:
    """Return the sorted ids and {metric@how: scores} of `path`.

    With `references`, `path` is a run, which is scored here. Without, it is a file of --per-image.
    """
    from engine.scoring.files import how_measured, in_order_of_ids, read_per_image
    from engine.scoring.score import ScoreRequest

    if references is None:
        return in_order_of_ids(*read_per_image(path))
    inputs = metric_inputs(weights, plugins, device, batch_size)
    report = measured_report(ScoreRequest(path, references, setting=inputs, columns=named, **given))
    how = {score.name: how_measured(score.signature, report.items) for score in report.scores}
    scores = {f"{name}@{how[name]}": measured for name, measured in report.measured.items()}
    return in_order_of_ids(report.items.ids, scores)

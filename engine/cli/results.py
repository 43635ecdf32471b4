"""The commands that work on a finished run: score, compare, rerank, submit, check, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from engine.cli.shared import PATH, Group, column_options, log
from engine.errors import EngineError, UsageError
from engine.inputs.columns import Columns
from engine.inputs.pixels import CLIP
from engine.inputs.pixels import HELP as DEPTH_HELP

COMMANDLINE = click.core.ParameterSource.COMMANDLINE
PROFILE_NAMES = ("imageclef2024", "imageclef2025", "imageclef2026")


def _parse_pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:  # noqa: ARG001
    pairs = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not name or not equals or not content:
            raise UsageError(f"{parameter.opts[0]} takes NAME=..., not {value!r}")
        pairs[name] = content
    return pairs


def _parse_names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:  # noqa: ARG001
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


MEASURING = (
    *("metrics", "weights", "plugin", "device", "batch-size", "bertscore-layer"),
    *("id-column", "caption-column", "prompt-column"),
)
"""Options of measuring, which values of --per-image need no more."""
MATCHING = ("prompt", "prompts", "keep-prompt", "only-common")
"""Options of bringing a run and references together, which they do not need either."""


def metric_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that measures."""
    for option in (
        click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Of neural metrics."),
        click.option("--device", help="torch device of neural metrics; a GPU where there is one when absent."),
        click.option("--bertscore-layer", type=click.IntRange(1), help="40 for deberta-xlarge-mnli, else the last."),
        click.option(
            "--plugin",
            "plugins",
            multiple=True,
            callback=_parse_pairs,
            metavar="NAME=COMMAND",
            help="A metric computed by a command of yours.",
        ),
        click.option(
            "--weights",
            multiple=True,
            callback=_parse_pairs,
            metavar="NAME=DIR",
            help="Folder of a metric's weights; nothing is downloaded.",
        ),
    ):
        command = option(command)
    return command


def matching_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that brings a run and references together."""
    for option in (
        click.option("--only-common", is_flag=True, help="Score the ids that run and references both have."),
        click.option("--keep-prompt", is_flag=True, help="Score captions with the prompt that they begin with."),
        click.option(
            "--prompts",
            type=PATH,
            help="Table with ID and prompt: score what follows the prompt. The column `prompt` of the run or of the "
            "references when absent.",
        ),
        click.option("--prompt", help="The prompt of all captions: score what follows it."),
    ):
        command = option(command)
    return command


def _setting(weights: dict[str, str], plugins: dict[str, str], device: str | None, batch_size: int) -> Any:
    from engine.scoring.base import MetricInputs

    folders = {name: Path(folder) for name, folder in weights.items()}
    return MetricInputs(weights=folders, plugins=plugins, device=device, batch_size=batch_size)


@click.group(cls=Group, invoke_without_command=True)
@click.option("--run", type=PATH, help="run.csv, or captions in another layout.")
@click.option("--references", type=PATH, help="Reference captions: CSV, TSV, JSON, JSONL, parquet or a folder.")
@click.option("--profile", type=click.Choice(PROFILE_NAMES), help="The metrics of a challenge, under its names.")
@click.option("--metrics", callback=_parse_names, help="Metrics by name, separated by commas, instead of a profile's.")
@click.option("--images", type=PATH, help="Folder of the images, for metrics that look at them.")
@click.option("--recursive", is_flag=True, help="Look for images in the folders of --images, too.")
@click.option("--dicom-frame", type=click.IntRange(0), default=0, help="Frame of DICOM files, counted from 0.")
@click.option("--high-bit-depth", default=CLIP, show_default=True, help=DEPTH_HELP)
@click.option("--labels", type=PATH, help="Table of labels by ID, for --by.")
@click.option("--by", "group_by", help="Column of --labels, or of the references, to break the scores down by.")
@click.option("--out", type=PATH, help="JSON file for the scores; they are printed in any case.")
@click.option("--per-image", type=PATH, help="CSV file for the values of every image.")
@matching_options
@metric_options
@column_options("caption", "prompt")
def score(
    run: Path | None,
    references: Path | None,
    out: Path | None,
    per_image: Path | None,
    weights: dict[str, str],
    plugins: dict[str, str],
    device: str | None,
    batch_size: int,
    named: Columns,
    **given: Any,
) -> None:
    """Score a run against references; `score compare` compares two.

    Every number comes with its signature. A metric that lacks weights, a plug-in or a library is reported as
    unavailable.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        idle = _options_given(context)
        if idle:
            raise UsageError(
                f"{', '.join(idle)}: give what is for `score {context.invoked_subcommand}` behind that word"
            )
        return
    if run is None or references is None:
        raise UsageError("score needs --run and --references")
    from engine.files.atomic import check_outputs
    from engine.scoring.files import write_report
    from engine.scoring.score import ScoreRequest

    outputs = {name: path for name, path in (("--out", out), ("--per-image", per_image)) if path is not None}
    check_outputs(outputs, [run, references, *filter(None, (given["labels"], given["prompts"]))])
    if given["labels"] and not given["group_by"]:
        raise UsageError("--labels needs --by, the column to break the scores down by")
    _refuse_pixels_without_images(context, given["images"])
    setting = _setting(weights, plugins, device, batch_size)
    report = _score(ScoreRequest(run, references, setting=setting, columns=named, **given))
    write_report(report, out, per_image)
    for line in _summary(report):
        click.echo(line)


def _score(request: Any) -> Any:
    """Score a run. Raises EngineError where not one metric has a value."""
    from engine.scoring.score import score_run

    report = score_run(request, log)
    if not report.measured:
        names = ", ".join(score.name for score in report.scores)
        raise EngineError(f"nothing was scored, for none of the metrics is available ({names}): see the lines above")
    return report


def _refuse_pixels_without_images(context: click.Context, images: Path | None) -> None:
    idle = [name for name in _options_given(context) if name in ("--dicom-frame", "--high-bit-depth")]
    if idle and images is None:
        raise UsageError(f"{', '.join(idle)}: only with --images, for metrics that look at them")


def _options_given(context: click.Context) -> list[str]:
    """Return the options that stand on the command line."""
    given = [p for p in context.command.params if p.name and context.get_parameter_source(p.name) is COMMANDLINE]
    return [parameter.opts[0] for parameter in given if isinstance(parameter, click.Option)]


def _summary(report: Any) -> list[str]:
    lines = []
    for one in report.scores:
        if one.unavailable:
            lines.append(f"{one.name:14} unavailable: {one.unavailable}")
            continue
        lines.append(f"{one.name:14} {one.value:.4f}  95% [{one.low:.4f}, {one.high:.4f}]  {one.signature}")
        if one.note:
            lines.append(f"{'':14} {one.note}")
    seen, words, base = report.description, report.description["words"], report.baseline
    known = ", ".join(f"{name} {value:.4f}" for name, value in base.items() if name != "caption")
    if known:
        lines.append(f"a constant caption ({len(base['caption'].split())} frequent words) reaches {known}")
    lines.append(
        f"{seen['images']} images, {seen['empty_captions']} empty captions, {seen['unique_ratio']:.1%} distinct "
        f"(references {seen['unique_ratio_of_references']:.1%}); words: median {words['median']:.0f}, "
        f"p95 {words['p95']:.0f} (references {seen['words_of_references']['median']:.0f}, "
        f"{seen['words_of_references']['p95']:.0f})"
    )
    for value, row in report.groups.items():
        lines.append(f"  {value}: " + ", ".join(f"{name} {number}" for name, number in row.items()))
    return lines + list(report.notes)


@score.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.option("--references", type=PATH, help="Needed when FIRST and SECOND are runs and not files of --per-image.")
@click.option("--metrics", callback=_parse_names, help="Metrics to score runs with; the quick ones when absent.")
@click.option("--resamples", type=click.IntRange(100), default=1000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
@matching_options
@metric_options
@column_options("caption", "prompt")
def compare(first: Path, second: Path, resamples: int, as_json: bool, **given: Any) -> None:
    """Compare two runs by the paired bootstrap: SECOND minus FIRST, with 95 % intervals (fixed seed)."""
    idle = set(_options_given(click.get_current_context())) & {f"--{name}" for name in MEASURING + MATCHING}
    if idle and given["references"] is None:
        raise UsageError(f"{', '.join(sorted(idle))}: only with --references, where runs are scored first")
    from dataclasses import asdict

    from engine.scoring import base

    one, other = (_measured(path, **given) for path in (first, second))
    if one[0] != other[0]:
        raise UsageError(f"{first} and {second} are not of the same images")
    shared = [name for name in one[1] if name in other[1]]
    if not shared:
        names = [", ".join(sorted(name.partition("@")[0] for name in found)) for _, found in (one, other)]
        raise UsageError(
            f"{first} ({names[0]}) and {second} ({names[1]}) have no metric measured in one way, against the same "
            "references, in common"
        )
    results = {name: base.compare(one[1][name], other[1][name], resamples) for name in shared}
    for name, found in results.items():
        click.echo(
            f"{name.partition('@')[0]:14} {one[1][name].value:.4f} -> {other[1][name].value:.4f}  "
            f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]  p={found.p:.3f}  "
            f"{found.wins} better, {found.losses} worse, {found.ties} equal",
            err=as_json,
        )
    if as_json:
        click.echo(json.dumps({name.partition("@")[0]: asdict(found) for name, found in results.items()}))


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
    """Return sorted ids and what was measured: of a file of --per-image, or of a run that is scored now."""
    from engine.scoring.files import how_measured, in_order_of_ids, read_per_image
    from engine.scoring.score import ScoreRequest

    if references is None:
        return in_order_of_ids(*read_per_image(path))
    setting = _setting(weights, plugins, device, batch_size)
    report = _score(ScoreRequest(path, references, setting=setting, columns=named, **given))
    how = {score.name: how_measured(score.signature, report.items) for score in report.scores}
    return in_order_of_ids(report.items.ids, {f"{name}@{how[name]}": found for name, found in report.measured.items()})


@click.command()
@click.option("--n-best", "files", type=PATH, multiple=True, required=True, help="JSON lines of --n-best-out; several.")
@click.option("--out", type=PATH, required=True, help="CSV file to write: ID,Caption.")
@click.option("--utility", default="rouge1", show_default=True, help="Metric two captions are compared with.")
@click.option("--uniform", is_flag=True, help="Let all candidates count the same, not by their probability.")
@click.option(
    "--share",
    "shares",
    type=float,
    multiple=True,
    help="How much a file of --n-best counts: once for each, in their order. All alike when absent.",
)
@click.option(
    "--support", "support_file", type=PATH, help="Training captions: the nearest to the candidates vote, too."
)
@click.option("--nearest", type=click.IntRange(1), default=8, show_default=True, help="Of --support: how many vote.")
@click.option(
    "--support-share", type=float, default=0.5, show_default=True, help="Of --support: its share of the vote; 0 is off."
)
@metric_options
@column_options("caption")
def rerank(
    files: tuple[Path, ...],
    out: Path,
    utility: str,
    uniform: bool,
    shares: tuple[float, ...],
    support_file: Path | None,
    nearest: int,
    support_share: float,
    named: Columns,
    **given: Any,
) -> None:
    """Choose of each image's candidates the one the others agree with most (minimum Bayes risk)."""
    from engine.files.atomic import check_outputs
    from engine.run.outputs import write_run
    from engine.scoring.rerank import make_utility, read_n_best, rerank_candidates
    from engine.scoring.score import refuse_unused

    _refuse_idle(uniform, support_file)
    check_outputs({"--out": out}, [*files, *([support_file] if support_file else [])])
    options = {"bertscore_layer": given.pop("bertscore_layer")}
    setting = _setting(**given)
    refuse_unused(setting, [utility])
    candidates = read_n_best(files, shares)
    support, voted = None, ""
    if support_file is not None:
        metric = make_utility(utility, setting, options)
        how = {"nearest": nearest, "share": support_share, "uniform": uniform}
        support, voted = _read_support(support_file, candidates, metric, named, **how)
    chosen = rerank_candidates(candidates, utility, setting, uniform=uniform, options=options, support=support)
    write_run(out, chosen.items())
    moved = sum(chosen[name] != several[0].text for name, several in candidates.items())
    log(f"{len(chosen)} captions, {moved} of them another than the first candidate{voted} -> {out}")


def _read_support(path: Path, candidates: Any, metric: Any, named: Columns, **how: Any) -> tuple[Any, str]:
    """Return the support that a file of captions gives to candidates, and that in words."""
    from engine.inputs.tables import read_table
    from engine.scoring.rerank import SupportCaptions

    captions = SupportCaptions(read_table(path, named))
    named.require_found()
    support = captions.near(candidates, metric, **how)
    if not support.share:
        return support, ""
    without = sum(not several for several in support.near.values())
    remark = f" (none of them near for {without} images)" if without else ""
    return support, f", with the support of {len(captions)} distinct captions{remark}"


def _refuse_idle(uniform: bool, support_file: Path | None) -> None:
    """Raise UsageError for options of rerank that would do nothing."""
    given = _options_given(click.get_current_context())
    if uniform and "--share" in given:
        raise UsageError("--share does nothing beside --uniform, by which all candidates count the same")
    idle = [name for name in given if name in ("--nearest", "--support-share", "--id-column", "--caption-column")]
    if idle and support_file is None:
        raise UsageError(f"{', '.join(idle)}: only with --support, a file of the captions that may vote")


FORMAT_NAMES = ("imageclef2022", "imageclef2023", "imageclef2024", "imageclef2025", "imageclef2026")


@click.command()
@click.option("--run", type=PATH, required=True, help="run.csv, or captions in another layout.")
@click.option("--manifest", type=PATH, required=True, help="File of the ids, in the order wanted.")
@click.option("--format", "form", type=click.Choice(FORMAT_NAMES), required=True)
@click.option("--out", type=PATH, required=True, help="submission.csv, or submission.zip for 2025 and 2026.")
@column_options("caption")
def submit(run: Path, manifest: Path, form: str, out: Path, named: Columns) -> None:
    """Write a run as a submission, then read the file back and check it."""
    from engine.files.atomic import check_outputs
    from engine.inputs.tables import read_table
    from engine.submission import manifest_ids, write_submission

    check_outputs({"--out": out}, [run, manifest])
    ids, notes = manifest_ids(manifest, named)
    captions = read_table(run, named).single()
    named.require_found()
    for note in notes:
        log(f"note: {note}")
    for note in write_submission(captions, ids, form, out):
        log(note)
    log(f"{len(ids)} captions -> {out}, read back and checked as {form}")


@click.command()
@click.argument("file", type=PATH)
@click.option("--manifest", type=PATH, required=True, help="File of the ids, in the order wanted.")
@click.option("--format", "form", type=click.Choice(FORMAT_NAMES), required=True)
@column_options()
def check(file: Path, manifest: Path, form: str, named: Columns) -> None:
    """Check any submission file as the organisers' checker does; exit 1 when it would be refused."""
    from engine.submission import MOST_PROBLEMS, check_submission, manifest_ids

    if not file.is_file():
        raise UsageError(f"{file} is not a file")
    ids, notes = manifest_ids(manifest, named)
    named.require_found()
    for note in notes:
        log(f"note: {note}")
    verdict = check_submission(file, ids, form)
    for line in verdict.warnings[:10]:
        log(f"allowed, but unwise: {line}")
    if len(verdict.warnings) > 10:
        least = "" if len(verdict.warnings) < MOST_PROBLEMS else "at least "
        log(f"allowed, but unwise: {least}{len(verdict.warnings) - 10} more like these")
    if verdict.errors:
        more = f"{len(verdict.errors) - 1} more" if len(verdict.errors) > 1 else ""
        more += "" if verdict.is_whole else f"{', ' if more else ''}not checked to the end"
        raise EngineError(f"{file} is no {form} submission: {verdict.errors[0]}{f' ({more})' if more else ''}")
    log(f"{file}: {len(ids)} captions, a correct {form} submission")


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

    summary = build_report(ReportRequest(**given), log=log, progress=_progress_bar)
    log(summary.signature)
    log(f"{summary.images} images, {summary.thumbnails_made} new thumbnails -> {summary.page}")


@contextmanager
def _progress_bar(length: int) -> Iterator[Callable[[], None]]:
    with click.progressbar(length=length, label="thumbnails", file=sys.stderr, show_pos=True) as bar:
        yield lambda: bar.update(1)

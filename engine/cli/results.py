"""Commands for finished runs: score, rerank, submit, check, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli.shared import PATH, Group, column_options, flag_of, log, printable, verbosity
from engine.errors import EngineError, UsageError, counted
from engine.options import CLIP, DEPTH_HELP

if TYPE_CHECKING:  # for a quick --help
    from engine.inputs.columns import Columns

COMMANDLINE = click.core.ParameterSource.COMMANDLINE
PROFILE_NAMES = ("imageclef2024", "imageclef2025", "imageclef2026")


def _parse_pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:  # noqa: ARG001
    pairs = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not name or not equals or not content:
            raise UsageError(f"{flag_of(parameter)} takes NAME=..., not {value!r}")
        pairs[name] = content
    return pairs


def parse_names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:  # noqa: ARG001
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


def further_inputs(given: Mapping[str, Any]) -> list[Path]:
    """Return the files that options of `score` and `compare` name besides the run, so that no output replaces them."""
    names = ("references", "labels", "prompts", "training_captions", "exclude_duplicates")
    return [given[name] for name in names if given.get(name) is not None]


def metric_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that computes metrics."""
    for option in (
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            default=64,
            show_default=True,
            help="Batch size of the neural metrics.",
        ),
        click.option("--device", help="torch device of the neural metrics; default: a GPU if available, else the CPU."),
        click.option(
            "--bertscore-layer",
            type=click.IntRange(1),
            help="Model layer that BERTScore uses; default: 40 for deberta-xlarge-mnli, else the last layer.",
        ),
        click.option(
            "--plugin",
            "plugins",
            multiple=True,
            callback=_parse_pairs,
            metavar="NAME=COMMAND",
            help="Compute the metric NAME with your own COMMAND (examples/plugins/); repeatable.",
        ),
        click.option(
            "--weights",
            multiple=True,
            callback=_parse_pairs,
            metavar="NAME=DIR",
            help="Folder with the model weights of the metric NAME; repeatable. Nothing is downloaded.",
        ),
    ):
        command = option(command)
    return command


def matching_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that matches a run with references."""
    for option in (
        click.option("--only-common", is_flag=True, help="Score only the ids that the run and the references share."),
        click.option("--keep-prompt", is_flag=True, help="Score whole captions, including the prompt they begin with."),
        click.option(
            "--prompts",
            type=PATH,
            help="Table with the columns ID and prompt; only the text after the prompt is scored. Default: the column "
            "`prompt` of the run or the references.",
        ),
        click.option("--prompt", help="Prompt of all captions; only the text after it is scored."),
    ):
        command = option(command)
    return command


def metric_inputs(weights: dict[str, str], plugins: dict[str, str], device: str | None, batch_size: int) -> Any:
    from engine.scoring.base import MetricInputs

    folders = {name: Path(folder) for name, folder in weights.items()}
    return MetricInputs(weights=folders, plugins=plugins, device=device, batch_size=batch_size)


@click.group(cls=Group, invoke_without_command=True)
@click.option("--run", type=PATH, help="Captions to score: run.csv or another table of captions.")
@click.option("--references", type=PATH, help="Reference captions: CSV, TSV, JSON, JSONL, parquet or a folder.")
@click.option(
    "--profile",
    type=click.Choice(PROFILE_NAMES),
    help="Compute the metrics of a challenge and report them under its names.",
)
@click.option("--metrics", callback=parse_names, help="Comma-separated metrics; overrides those of --profile.")
@click.option("--images", type=PATH, help="Folder of the images, for metrics that need them, such as clipscore.")
@click.option("--recursive", is_flag=True, help="Search the subfolders of --images as well.")
@click.option(
    "--dicom-frame", type=click.IntRange(0), default=0, show_default=True, help="Frame of DICOM files, counted from 0."
)
@click.option("--high-bit-depth", default=CLIP, show_default=True, help=DEPTH_HELP)
@click.option("--labels", type=PATH, help="Table with a column ID and label columns, for --by.")
@click.option(
    "--by",
    "group_by",
    help="Report the scores per value of this column of --labels, or of the references without --labels.",
)
@click.option(
    "--training-captions",
    type=PATH,
    help="Table of training captions: also compute `novelty`, the part of a caption outside its longest n-gram there.",
)
@click.option(
    "--exclude-duplicates",
    type=PATH,
    help="File of `duplicates --out`: also report the scores without the images that have a twin.",
)
@click.option("--out", type=PATH, help="Also write the scores to this JSON file.")
@click.option(
    "--per-image", type=PATH, help="Write the scores of each image to this CSV file, the input of `score compare`."
)
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
    """Score a run against references, with confidence intervals.

    Prints a signature with every score. A metric whose weights, plug-in or library are missing is reported as
    unavailable. To compare two runs, use `score compare`.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        idle = options_given(context)
        if idle:
            raise UsageError(
                f"{', '.join(idle)}: give the options of `score {context.invoked_subcommand}` after that word"
            )
        return
    if run is None or references is None:
        raise UsageError("score needs --run and --references")
    from engine.files.atomic import check_outputs
    from engine.scoring.files import write_report
    from engine.scoring.score import ScoreRequest

    outputs = {name: path for name, path in (("--out", out), ("--per-image", per_image)) if path is not None}
    check_outputs(outputs, [run, references, *further_inputs(given)])
    if given["labels"] and not given["group_by"]:
        raise UsageError("--labels needs --by, the column to group the scores by")
    _refuse_pixels_without_images(context, given["images"])
    inputs = metric_inputs(weights, plugins, device, batch_size)
    report = measured_report(ScoreRequest(run, references, setting=inputs, columns=named, **given))
    write_report(report, out, per_image)
    for line in _summary(report):
        click.echo(printable(line))


def measured_report(request: Any) -> Any:
    """Score a run. Raises EngineError if no metric is available."""
    from engine.scoring.score import score_run

    report = score_run(request, log)
    if not report.measured:
        names = ", ".join(score.name for score in report.scores)
        raise EngineError(f"nothing was scored: none of the metrics ({names}) is available, see the lines above")
    return report


def _refuse_pixels_without_images(context: click.Context, images: Path | None) -> None:
    idle = [name for name in options_given(context) if name in ("--dicom-frame", "--high-bit-depth")]
    if idle and images is None:
        raise UsageError(f"{', '.join(idle)}: only with --images, for metrics that need the images")


def options_given(context: click.Context) -> list[str]:
    """Return the options that were given on the command line."""
    given = [p for p in context.command.params if p.name and context.get_parameter_source(p.name) is COMMANDLINE]
    return [flag_of(parameter) for parameter in given if isinstance(parameter, click.Option)]


def _summary(report: Any) -> list[str]:
    from engine.scoring.score import LEAST_GROUP

    lines = [f"{'metric':14}  score  95% interval"]
    for score in report.scores:
        value = (
            f"unavailable: {score.unavailable}"
            if score.unavailable
            else f"{score.value:.4f}  [{score.low:.4f}, {score.high:.4f}]"
        )
        lines.append(f"{score.name:14} {value}")
    if report.without_twins is not None:
        lines += _without_twins(report.without_twins)
    lines += ["", *(f"{score.name}: {score.note}" for score in report.scores if score.note)]
    stats, words, baseline = report.description, report.description["words"], report.baseline
    reached = ", ".join(f"{name} {value:.4f}" for name, value in baseline.items() if name != "caption")
    if reached:
        lines.append(
            f"a constant caption ({counted(len(baseline['caption'].split()), 'frequent word')}) reaches {reached}"
        )
    lines.append(
        f"{counted(stats['images'], 'image')}, {counted(stats['empty_captions'], 'empty caption')}, "
        f"{stats['unique_ratio']:.1%} distinct (references {stats['unique_ratio_of_references']:.1%}); "
        f"words: median {words['median']:.0f}, p95 {words['p95']:.0f} "
        f"(references {stats['words_of_references']['median']:.0f}, {stats['words_of_references']['p95']:.0f})"
    )
    for value, row in report.groups.items():
        if (small := row.get("groups")) is not None:
            lines.append(f"  {counted(small, 'group')} of fewer than {LEAST_GROUP} images not shown")
            continue
        scores = ", ".join(f"{name} {number:.4f}" for name, number in row.items() if name != "images")
        lines.append(f"  {value} ({counted(row['images'], 'image')}): {scores}")
    lines += [*report.notes, "", "signatures:"]
    return lines + [f"  {score.signature}" for score in report.scores if not score.unavailable]


def _without_twins(without: Any) -> list[str]:
    near = f" ({without.near} with only near images are among them)" if without.near else ""
    lines = [f"without the {counted(without.twins, 'image')} with a twin, {counted(without.images, 'image')}{near}:"]
    return lines + [
        f"  {name:12} {value:.4f}  [{low:.4f}, {high:.4f}]" for name, (value, low, high) in without.scores.items()
    ]


@click.command()
@click.option(
    "--n-best",
    "files",
    type=PATH,
    multiple=True,
    required=True,
    help="Candidates: a file of `caption --n-best-out`; repeat it to combine several.",
)
@click.option("--out", type=PATH, required=True, help="CSV file to write, with the columns ID,Caption.")
@click.option("--utility", default="rouge1", show_default=True, help="Metric that scores a candidate against another.")
@click.option("--uniform", is_flag=True, help="Weight all candidates equally instead of by probability.")
@click.option(
    "--share",
    "shares",
    type=float,
    multiple=True,
    help="Weight of an --n-best file: once for each file, in the same order; default: equal weights.",
)
@click.option(
    "--support",
    "support_file",
    type=PATH,
    help="Table of training captions; those nearest to the candidates vote as well, but are never chosen.",
)
@click.option(
    "--nearest",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Number of captions of --support that vote for an image.",
)
@click.option(
    "--support-share",
    type=float,
    default=0.5,
    show_default=True,
    help="Weight of the --support captions in the vote, from 0 (off) to below 1.",
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
    """Choose the best of several candidate captions for each image (minimum Bayes risk).

    The chosen caption has the highest expected score (--utility) with the other candidates as references.
    """
    from engine.files.atomic import check_outputs
    from engine.run.outputs import write_run
    from engine.scoring.rerank import make_utility, read_n_best, rerank_candidates
    from engine.scoring.score import refuse_unused

    _refuse_idle(uniform, support_file)
    check_outputs({"--out": out}, [*files, *([support_file] if support_file else [])])
    options = {"bertscore_layer": given.pop("bertscore_layer")}
    inputs = metric_inputs(**given)
    refuse_unused(inputs, [utility])
    candidates = read_n_best(files, shares)
    support, remark = None, ""
    if support_file is not None:
        metric = make_utility(utility, inputs, options)
        how = {"nearest": nearest, "share": support_share, "uniform": uniform}
        support, remark = _read_support(support_file, candidates, metric, named, **how)
    chosen = rerank_candidates(candidates, utility, inputs, uniform=uniform, options=options, support=support)
    write_run(out, chosen.items())
    changed = sum(chosen[name] != listed[0].text for name, listed in candidates.items())
    log(
        f"{counted(len(chosen), 'caption')}, {counted(changed, 'differs', 'differ')} from the first candidate"
        f"{remark} -> {out}"
    )


def _read_support(path: Path, candidates: Any, metric: Any, named: Columns, **how: Any) -> tuple[Any, str]:
    """Return the support captions of each image from a file, and a remark for the last line of output."""
    from engine.inputs.tables import read_table
    from engine.scoring.rerank import SupportCaptions

    captions = SupportCaptions(read_table(path, named))
    named.require_found()
    support = captions.near(candidates, metric, **how)
    if not support.share:
        return support, ""
    without = sum(not near for near in support.near.values())
    remark = f" ({counted(without, 'image has', 'images have')} no near caption)" if without else ""
    return support, f", supported by {counted(len(captions), 'distinct caption')}{remark}"


def _refuse_idle(uniform: bool, support_file: Path | None) -> None:
    """Raise UsageError for options of rerank that would have no effect."""
    given = options_given(click.get_current_context())
    if uniform and "--share" in given:
        raise UsageError("--share has no effect with --uniform, which weights all candidates equally: remove one")
    idle = [name for name in given if name in ("--nearest", "--support-share", "--id-column", "--caption-column")]
    if idle and support_file is None:
        raise UsageError(f"{', '.join(idle)}: only with --support, the captions that may vote")


FORMAT_NAMES = ("imageclef2022", "imageclef2023", "imageclef2024", "imageclef2025", "imageclef2026")


@click.command()
@click.option("--run", type=PATH, required=True, help="Captions to submit: run.csv or another table of captions.")
@click.option("--manifest", type=PATH, required=True, help="File with the image ids, in the order of the submission.")
@click.option("--format", "form", type=click.Choice(FORMAT_NAMES), required=True, help="Challenge and year.")
@click.option(
    "--out", type=PATH, required=True, help="File to write: submission.csv, or submission.zip for 2025 and 2026."
)
@column_options("caption")
def submit(run: Path, manifest: Path, form: str, out: Path, named: Columns) -> None:
    """Write a run as a submission file, then read the file back and check it."""
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
        log(f"note: {note}")
    log(f"{counted(len(ids), 'caption')} -> {out}, read back and checked as {form}")


@click.command()
@click.argument("file", type=PATH)
@click.option("--manifest", type=PATH, required=True, help="File with the image ids, in the order of the submission.")
@click.option("--format", "form", type=click.Choice(FORMAT_NAMES), required=True, help="Challenge and year.")
@column_options()
def check(file: Path, manifest: Path, form: str, named: Columns) -> None:
    """Check a submission file by the rules of the organisers' checker; exits with 1 if it would be rejected."""
    from engine.submission import MOST_PROBLEMS, check_submission, manifest_ids

    if not file.is_file():
        raise UsageError(f"{file} is not a file")
    ids, notes = manifest_ids(manifest, named)
    named.require_found()
    for note in notes:
        log(f"note: {note}")
    verdict = check_submission(file, ids, form)
    for note in verdict.notes:
        log(f"note: {note}")
    for line in verdict.warnings[:10]:
        log(f"warning: {line}")
    if len(verdict.warnings) > 10:
        least = "" if len(verdict.warnings) < MOST_PROBLEMS else "at least "
        log(f"warning: {least}{len(verdict.warnings) - 10} more warnings like these")
    if verdict.errors:
        more = f"{len(verdict.errors) - 1} more" if len(verdict.errors) > 1 else ""
        more += "" if verdict.is_whole else f"{', ' if more else ''}not checked to the end"
        raise EngineError(f"{file} is not a valid {form} submission: {verdict.errors[0]}{f' ({more})' if more else ''}")
    log(f"{file}: {counted(len(ids), 'caption')}, a valid {form} submission")


@click.command()
@click.option("--run", type=PATH, required=True, help="Captions to show: run.csv or another table of captions.")
@click.option("--images", type=PATH, required=True, help="Folder of the images.")
@click.option("--out", type=PATH, required=True, help="Folder to write: a new or empty one, or an earlier report.")
@click.option("--references", type=PATH, help="Reference captions, in any format that `score` reads.")
@click.option("--scores", type=PATH, help="Scores of each image, from `score --per-image`.")
@click.option("--n-best", type=PATH, help="Candidates, from `caption --n-best-out`.")
@click.option("--attention", type=PATH, help="Folder of `caption --attention`: shows where each word of --run looks.")
@click.option("--against", type=PATH, help="Second run of the same images, to compare with.")
@click.option(
    "--against-scores", type=PATH, help="Scores of each image of the --against run, from `score --per-image`."
)
@click.option(
    "--columns",
    type=PATH,
    multiple=True,
    help="CSV file with a column ID and columns to show, such as `caption --timings-out` or labels; repeatable.",
)
@click.option("--signature", "signatures", multiple=True, help="Signature of `caption` or `score` to show; repeatable.")
@click.option("--recursive", is_flag=True, help="Search the subfolders of --images as well.")
@click.option(
    "--dicom-frame", type=click.IntRange(0), default=0, show_default=True, help="Frame of DICOM files, counted from 0."
)
@click.option("--high-bit-depth", default=CLIP, show_default=True, help=DEPTH_HELP)
@click.option(
    "--thumbnail-px",
    type=click.IntRange(32, 2048),
    default=320,
    show_default=True,
    help="Largest width and height of the thumbnails, in pixels.",
)
@column_options("caption")
def report(**given: Any) -> None:
    """Write an HTML page to browse a run: open index.html of --out in a browser, no server needed.

    The page shows images, captions, references with the differing words marked, scores, candidates and a second run.
    Search, sort, filter or step through the images.
    """
    from engine.report.build import build_report
    from engine.report.gather import ReportRequest

    summary = build_report(ReportRequest(**given), log=log, progress=_progress_bar)
    log(summary.signature)
    log(f"{counted(summary.images, 'image')}, {counted(summary.thumbnails_made, 'new thumbnail')} -> {summary.page}")


@contextmanager
def _progress_bar(length: int) -> Iterator[Callable[[], None]]:
    if verbosity.quiet:
        yield lambda: None
        return
    with click.progressbar(length=length, label="thumbnails", file=sys.stderr, show_pos=True) as bar:
        yield lambda: bar.update(1)

"""`engine calibrate`: fit the map from how sure the model is of a caption to its expected score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli.results import matching_options, measured_report, metric_inputs, metric_options
from engine.cli.shared import PATH, column_options, log
from engine.errors import DataError, UsageError, counted

if TYPE_CHECKING:  # for a quick --help
    from engine.inputs.columns import Columns

CONFIDENCE_NAMES = ("score", "margin", "agreement", "mean_token_prob", "min_token_prob")
"""As in engine/calibration.py, which loads numpy; a test compares the two."""
FEW = 100
"""Below so many images the map follows chance."""


@click.command()
@click.option(
    "--run", type=PATH, required=True, help="Captions that the model has not seen: a file of `caption --n-best-out`."
)
@click.option("--references", type=PATH, required=True, help="Reference captions, in any format that `score` reads.")
@click.option("--out", type=PATH, required=True, help="JSON file to write, for `caption --calibration`.")
@click.option("--metric", default="rouge1", show_default=True, help="Metric whose score per image is expected.")
@click.option(
    "--confidence",
    type=click.Choice(CONFIDENCE_NAMES),
    default="mean_token_prob",
    show_default=True,
    help="What the expected score is computed from; the command prints how well each one orders the captions.",
)
@matching_options
@metric_options
@column_options("caption", "prompt")
def calibrate(
    run: Path,
    references: Path,
    out: Path,
    metric: str,
    confidence: str,
    weights: dict[str, str],
    plugins: dict[str, str],
    device: str | None,
    batch_size: int,
    named: Columns,
    **given: Any,
) -> None:
    """Fit the map from the confidence of a caption to its expected score.

    The map is isotonic: a caption that the model is surer of never has a lower expected score. It holds for the same
    model, decoding options and kind of images.
    """
    from engine.calibration import Calibration, KnownConfidences, isotonic, rank_correlation
    from engine.files.atomic import check_outputs
    from engine.inputs.tables import by_reference_id, read_table
    from engine.scoring.score import ScoreRequest

    if run.suffix.lower() != ".jsonl":  # the references may have any layout, and `score` finds it by the suffix
        raise UsageError(f"{run} is not a file of `engine caption --n-best-out` with a name such as valid.jsonl")
    check_outputs({"--out": out}, [run, references, *filter(None, [given["prompts"]])])
    known = KnownConfidences.read(run)
    inputs = metric_inputs(weights, plugins, device, batch_size)
    report = measured_report(ScoreRequest(run, references, metrics=(metric,), setting=inputs, columns=named, **given))
    ids, scores = report.items.ids, report.measured[metric].per_image
    matched = KnownConfidences(by_reference_id(read_table(references, named), known.by_id, run), known.n_best)
    columns = {name: matched.column(name, ids) for name in CONFIDENCE_NAMES}
    if (chosen := columns[confidence]) is None:
        raise UsageError(f"{run} lacks the {confidence} of some images: caption again, with --n-best 2 or more for it")
    knots, expected = isotonic(chosen, scores)
    if expected[0] == expected[-1]:
        raise DataError(
            f"{metric} does not increase with the {confidence} of {run}, so that it predicts nothing: give another "
            "--confidence, or more images"
        )
    (score,) = report.scores
    Calibration(confidence, known.n_best, metric, score.signature, len(ids), knots, expected).write(out)
    orders = {name: rank_correlation(values, scores) for name, values in columns.items() if values is not None}
    log(f"rank correlation with {metric}: {', '.join(f'{name} {value:.3f}' for name, value in orders.items())}")
    if len(ids) < FEW:
        log(f"note: the map of {counted(len(ids), 'image')} follows chance: fit it on {FEW} or more")
    log(
        f"{counted(len(ids), 'image')}, {metric} {scores.mean():.4f}: expected scores from {expected[0]:.4f} to "
        f"{expected[-1]:.4f} by {confidence} -> {out}"
    )

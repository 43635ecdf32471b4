"""Fine-tune a checkpoint on captioned images: from a recipe and a data set to a run directory. Start reading here.

OUT/run.json          recipe, data (hashes, counts, problems), checkpoint hash, versions
OUT/checkpoints/      the last two training states, from which an interrupted run resumes
OUT/models/epoch_NN/  the best epochs as plain Hugging Face directories, with their scores and captions
OUT/best              a link to the best of them: `python -m export --checkpoint OUT/best`
OUT/log.jsonl, curves.png, tensorboard/
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from engine.errors import DataError, UsageError
from engine.inputs.columns import USUAL, Columns
from engine.scoring.base import MetricInputs
from engine.scoring.profiles import make_metric
from export.bundle import checkpoint_sha256
from export.checkpoints.settings import assumed_settings
from export.reference.huggingface import Reference
from train.data.batches import check_fit, lost_in_tokens
from train.data.check import check_split, drop_unusable, fingerprint
from train.data.dataset import Example, Split, hold_out, read_dataset
from train.learning.evaluate import LOSS, Evaluator
from train.learning.processes import on_first_process, rank_and_world_size
from train.learning.run_dir import BestModels, locked, write_log, write_or_compare_record
from train.learning.setup import evaluation_options, load_reference, make_trainer
from train.learning.trainer import CaptionTrainer, has_complete_checkpoint, newest_complete_checkpoint
from train.recipe import Recipe

Log = Callable[[str], None]
Evaluate = Callable[[], tuple[dict[str, float], list[tuple[str, str]]]]
"""Returns what Evaluator.evaluate does."""
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class DataInputs:
    """A data set of captioned images and how to read it.

    With `allow_missing` unusable entries are skipped instead of stopping the run, with `decode_images` every image is
    decoded before the training. `unpack_into` is the folder for the images of parquet files, `columns` the names of the
    table's columns.
    """

    directory: Path
    allow_missing: bool = False
    decode_images: bool = True
    unpack_into: Path | None = None
    columns: Columns = USUAL


@dataclass(frozen=True)
class Job:
    """The inputs of a run. `metrics` holds what the metrics of the evaluation and the reward need."""

    checkpoint: Path
    data: DataInputs
    out: Path
    recipe: Recipe
    metrics: MetricInputs = field(default_factory=MetricInputs)


def finetune(job: Job, log: Log) -> dict[str, Any]:
    """Fine-tune, or resume the same job if it was interrupted; return a summary.

    Raises UsageError, CheckpointError, DataError (bad images without allow_missing), or ImageError if a file disappears
    during the training.
    """
    rank, world_size = rank_and_world_size()
    log = log if rank == 0 else (lambda _: None)
    recipe = job.recipe
    batches = recipe.micro_batches(world_size)
    set_seed(recipe.seed)
    measured_by = signatures(recipe, job.metrics)
    reference = load_reference(job.checkpoint, recipe)
    for line in assumed_settings(job.checkpoint):
        log(f"note: {line}")
    splits = on_first_process(lambda: prepare_data(job.data, recipe, reference, log))
    with locked(job.out, rank):
        resume_from = on_first_process(lambda: begin(job, splits, measured_by, log))
        best, evaluator = best_models(job.out, recipe), make_evaluator(job, reference, splits["valid"].examples)
        judge = make_judge(evaluator.evaluate, reference, best, rank, log)
        trainer = make_trainer(recipe, reference, splits, judge, batches, job.metrics, job.out, log)
        start = time.perf_counter()
        trainer.start_or_resume(resume_from)
        if rank:
            return {}
        write_log(job.out, trainer.state.log_history)
        return _summary(job, best, trainer, time.perf_counter() - start)


def prepare_data(data: DataInputs, recipe: Recipe, reference: Reference, log: Log) -> dict[str, Split]:
    """Read and check the splits `train` and `valid`. Raises DataError for bad entries unless they may be skipped."""
    splits = read_dataset(data.directory, unpack_into=data.unpack_into, columns=data.columns, log=log)
    if "train" not in splits:
        raise DataError(f"{data.directory} has no training split, only {', '.join(splits)}")
    if "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], recipe.valid_share, recipe.seed)
        log(f"no validation split: {len(splits['valid'].examples)} captions of the training split are held out")
    bad = []
    positions = reference.sizes.max_positions
    for name in SPLITS:
        check_fit(
            splits[name].examples, splits[name].captions_file, reference.tokenizer, min(recipe.max_tokens, positions)
        )
        problems = check_split(
            splits[name],
            decode=data.decode_images,
            depth=recipe.high_bit_depth,
            count_tokens=lambda text: len(reference.tokenizer(text)["input_ids"]),
            lost_in=lambda text: lost_in_tokens(reference.tokenizer, text),
            max_tokens=min(recipe.max_tokens, positions),
        )
        if recipe.max_tokens > positions and problems.cut:
            raise UsageError(
                f"max_tokens {recipe.max_tokens}: the checkpoint has {positions} positions, and {len(problems.cut)} "
                f"captions of {name} are longer: --set max_tokens={positions} truncates them"
            )
        for line in problems.lines():
            log(f"{name}: {line}")
        bad += [f"{name}: {line}" for line in problems.fatal.lines()]
        splits[name] = drop_unusable(splits[name], problems)
        if with_prompt := sum(bool(example.prompt) for example in splits[name].examples):
            log(f"{name}: {with_prompt} of {len(splits[name].examples)} captions start from a prompt of their image")
    if bad and not data.allow_missing:
        raise DataError(f"{data.directory}: {'; '.join(bad)}: fix the files, or skip these with --allow-missing")
    return splits


def signatures(recipe: Recipe, metrics: MetricInputs) -> dict[str, str]:
    """Return {metric: signature} of the evaluation and the reward. Raises EngineError if a metric is unavailable."""
    names = [*evaluation_metrics(recipe), *recipe.rewards()]
    return {name: make_metric(name, metrics, {}).signature() for name in names}


def begin(job: Job, splits: dict[str, Split], measured_by: dict[str, str], log: Log) -> Path | None:
    """Write or check the record of the run directory; return the training state to resume from, or None."""
    states = job.out / "checkpoints"
    is_begun = has_complete_checkpoint(states) or any((job.out / "models").glob("epoch_*"))
    record = run_identity(job, splits) | {"metrics": measured_by}
    write_or_compare_record(job.out, job.recipe, record, log, is_begun=is_begun)
    states.mkdir(parents=True, exist_ok=True)
    newest = newest_complete_checkpoint(states, log)
    if newest is not None:
        log(f"resuming from {newest}")
    return newest


def run_identity(job: Job, splits: dict[str, Split]) -> dict[str, Any]:
    """Return what identifies a run in addition to its recipe: hashes of the checkpoint and of the data."""
    data = {name: {"captions": len(splits[name].examples), "sha256": fingerprint(splits[name])} for name in SPLITS}
    return {"checkpoint": checkpoint_sha256(job.checkpoint), "data": data}


def make_judge(
    evaluate: Evaluate, reference: Reference, best: BestModels, rank: int, log: Log
) -> Callable[[int], dict[str, float]]:
    """Return the function called after each epoch: it evaluates the model; the first process keeps the best models."""

    def judge(epoch: int) -> dict[str, float]:
        metrics, captions = evaluate()
        if rank == 0:
            best.add(epoch, metrics, captions, reference)
            log(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            if tie := best.tie():
                log(tie)
        return metrics

    return judge


def best_models(out: Path, recipe: Recipe) -> BestModels:
    """Return the store of a run's best models."""
    return BestModels(out / "models", recipe, evaluation_options(recipe) if recipe.write_decoding else None)


def make_evaluator(job: Job, reference: Reference, examples: Sequence[Example]) -> Evaluator:
    """Return the evaluator of an epoch, on at most `eval_images` evenly spaced validation images."""
    recipe = job.recipe
    ids = list(dict.fromkeys(example.id for example in examples))
    if recipe.eval_images is not None and len(ids) > recipe.eval_images:
        step = len(ids) / recipe.eval_images
        chosen = {ids[int(i * step)] for i in range(recipe.eval_images)}
        examples = [example for example in examples if example.id in chosen]
    metrics, options = evaluation_metrics(recipe), evaluation_options(recipe)
    return Evaluator(
        reference,
        examples,
        metrics,
        options,
        recipe.max_tokens,
        recipe.device_batch,
        job.metrics,
        recipe.high_bit_depth,
    )


def evaluation_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Return the metrics of an epoch in addition to the loss: ROUGE-1, and the recipe's metric."""
    return tuple(dict.fromkeys(["rouge1", *([recipe.metric] if recipe.metric != LOSS else [])]))


def _summary(job: Job, kept: BestModels, trainer: CaptionTrainer, seconds: float) -> dict[str, Any]:
    ranked = kept.ranked()
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 3),
        "seconds": round(seconds, 1),
        "train_loss": next((e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e), None),
        "best": None if not ranked else {"epoch": ranked[0][0]} | ranked[0][2],
        "kept": [str(directory) for _, directory, _ in ranked],
        "checkpoint": str(job.out / "best") if ranked else None,
    }

"""Fine-tune a checkpoint on captioned images: from a recipe and a data set to a run directory. Start reading here.

OUT/run.json          recipe, data (hashes, counts, problems), checkpoint hash, versions
OUT/checkpoints/      the last two training states, from which an interrupted run resumes
OUT/models/epoch_NN/  the best epochs as plain Hugging Face directories, with their scores and captions
OUT/best              a link to the best of them: `python -m export --checkpoint OUT/best`
OUT/log.jsonl, curves.png, tensorboard/
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from engine.checkpoints.settings import assumed_settings
from engine.errors import DataError, UsageError, counted
from engine.files.lock import OutputLock
from engine.scoring.base import MetricInputs
from engine.scoring.profiles import make_metric
from export.bundle import checkpoint_sha256
from export.reference.huggingface import Reference
from train.data.batches import check_fit, lost_in_tokens
from train.data.dataset import DataInputs, hold_out, read_dataset
from train.data.examples import Split, check_split, drop_unusable, fingerprint
from train.learning.run_dir import BestModels, write_log, write_or_compare_record
from train.learning.setup import Log, Run, load_reference, make_trainer
from train.learning.trainer import (
    LOSS,
    Evaluation,
    Evaluator,
    Judge,
    is_complete,
    newest_complete_checkpoint,
    on_first_process,
    rank_and_world_size,
    sorted_checkpoints,
)
from train.recipe import Recipe

SPLITS = ("train", "valid")


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
    rank, _ = rank_and_world_size()
    set_seed(job.recipe.seed)
    run = prepare(job, log if rank == 0 else (lambda _: None))
    if rank == 0:
        job.out.mkdir(parents=True, exist_ok=True)
    # One run at a time works on a directory; the first process of a distributed run locks it for all.
    with OutputLock(job.out / "run.json") if rank == 0 else nullcontext() as lock:
        if lock is not None and lock.note:
            run.log(f"note: {lock.note}")
        resume_from = on_first_process(lambda: begin(job, run))
        trainer = make_trainer(run, make_judge(run, make_evaluator(run).evaluate))
        start = time.perf_counter()
        trainer.start_or_resume(resume_from)
        if rank:
            return {}
        history, ranked = trainer.state.log_history, best_models(run).ranked()
        write_log(job.out, history)
        return {
            "steps": trainer.state.global_step,
            "epochs": round(trainer.state.epoch or 0, 3),
            "seconds": round(time.perf_counter() - start, 1),
            "train_loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
            "best": None if not ranked else {"epoch": ranked[0][0]} | ranked[0][2],
            "kept": [str(directory) for _, directory, _ in ranked],
            "checkpoint": str(job.out / "best") if ranked else None,
        }


def prepare(job: Job, log: Log) -> Run:
    """Resolve a job: check recipe and metrics, load the checkpoint, read and check the data (in the first process)."""
    recipe = job.recipe
    batches = recipe.micro_batches(rank_and_world_size()[1])
    names = [*evaluation_metrics(recipe), *recipe.rewards()]
    if of_images := [name for name in names if name in ("clipscore", "refclipscore")]:
        raise UsageError(f"{of_images[0]} needs the images, which are not scored in training: choose another metric")
    signatures = {name: make_metric(name, job.metrics, {}).signature() for name in names}
    reference = load_reference(job.checkpoint, recipe)
    for line in assumed_settings(job.checkpoint):
        log(f"note: {line}")
    splits = on_first_process(lambda: prepare_data(job.data, recipe, reference, log))
    return Run(recipe, reference, splits, job.metrics, signatures, batches, job.out, log)


def prepare_data(data: DataInputs, recipe: Recipe, reference: Reference, log: Log) -> dict[str, Split]:
    """Read and check the splits `train` and `valid`. Raises DataError for bad entries unless they may be skipped."""
    splits = read_dataset(data.directory, unpack_into=data.unpack_into, columns=data.columns, log=log)
    if "train" not in splits:
        raise DataError(f"{data.directory} has no training split, only {', '.join(splits)}")
    if "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], recipe.valid_share, recipe.seed)
        log(f"no validation split: {counted(len(splits['valid'].examples), 'caption')} of the training split held out")
    bad = []
    tokenizer, positions = reference.tokenizer, reference.sizes.max_positions
    max_tokens = min(recipe.max_tokens, positions)
    for name in SPLITS:
        check_fit(splits[name].examples, splits[name].captions_file, tokenizer, max_tokens)
        problems = check_split(
            splits[name],
            decode=data.decode_images,
            depth=recipe.high_bit_depth,
            count_tokens=lambda text: len(tokenizer(text)["input_ids"]),
            lost_in=lambda text: lost_in_tokens(tokenizer, text),
            max_tokens=max_tokens,
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


def begin(job: Job, run: Run) -> Path | None:
    """Write or check the record of the run directory; return the training state to resume from, or None."""
    states = run.out / "checkpoints"
    is_begun = any(map(is_complete, sorted_checkpoints(states))) or any((run.out / "models").glob("epoch_*"))
    data = {
        name: {"captions": len(run.splits[name].examples), "sha256": fingerprint(run.splits[name])} for name in SPLITS
    }
    identity = {"checkpoint": checkpoint_sha256(job.checkpoint), "data": data, "metrics": run.signatures}
    write_or_compare_record(run.out, run.recipe, identity, run.log, is_begun=is_begun)
    states.mkdir(parents=True, exist_ok=True)
    for left in (run.out / "models").glob(".epoch_*"):  # by a kill while a model was written or deleted
        shutil.rmtree(left, ignore_errors=True)
    newest = newest_complete_checkpoint(states, run.log)
    if newest is not None:
        run.log(f"resuming from {newest}")
    return newest


def make_judge(run: Run, evaluate: Callable[[], Evaluation]) -> Judge:
    """Return the function called after each epoch: it evaluates the model; the first process keeps the best models."""

    def judge(epoch: int) -> dict[str, float]:
        metrics, captions = evaluate()
        if rank_and_world_size()[0] == 0:
            best = best_models(run)
            is_finite = math.isfinite(metrics[LOSS])  # otherwise the run ends with an error, and can be begun again
            if is_finite:
                best.add(epoch, metrics, captions, run.reference)
            run.log(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            if is_finite and (tie := best.tie()):
                run.log(tie)
        return metrics

    return judge


def best_models(run: Run) -> BestModels:
    """Return the store of a run's best models."""
    return BestModels(run.out / "models", run.recipe, run.recipe.eval_options() if run.recipe.write_decoding else None)


def make_evaluator(run: Run) -> Evaluator:
    """Return the evaluator of an epoch, on at most `eval_images` evenly spaced validation images."""
    recipe, examples = run.recipe, run.splits["valid"].examples
    ids = list(dict.fromkeys(example.id for example in examples))
    if recipe.eval_images is not None and len(ids) > recipe.eval_images:
        step = len(ids) / recipe.eval_images
        chosen = {ids[int(i * step)] for i in range(recipe.eval_images)}
        examples = [example for example in examples if example.id in chosen]
    return Evaluator(
        run.reference,
        examples,
        evaluation_metrics(recipe),
        recipe.eval_options(),
        recipe.max_tokens,
        recipe.device_batch,
        run.metrics,
        recipe.high_bit_depth,
    )


def evaluation_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Return the metrics of an epoch in addition to the loss: ROUGE-1, and the recipe's metric."""
    return tuple(dict.fromkeys(["rouge1", *([recipe.metric] if recipe.metric != LOSS else [])]))

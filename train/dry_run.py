"""What a run will be, before a day is spent on it: steps, learning rates, memory, disk, hours.

Two steps and a first validation really run, in a temporary directory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from engine.errors import UsageError
from export.reference.huggingface import Reference
from train.data.batches import PixelSpec
from train.data.dataset import Split
from train.estimates import GIB, disk, flop_of_step, memory, on_an_a100, rounded, tokens_of_batches
from train.finetune import Job, best_models, make_evaluator, make_judge, prepare_data, signatures
from train.learning.evaluate import LOSS, references_by_id
from train.learning.processes import rank_and_world_size
from train.learning.setup import load_reference, make_trainer
from train.recipe import Recipe

TRIAL_STEPS = 2
TRIAL_IMAGES = 8
"""Validation images that are captioned and scored in a trial."""


class StepClock(TrainerCallback):
    """Notes when each optimiser step ended, in seconds of time.perf_counter."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """See TrainerCallback."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def plan_run(job: Job, say: Callable[[str], None], *, trial: bool = True) -> dict[str, Any]:
    """Return what a run will be; with `trial`, take TRIAL_STEPS optimiser steps and validate (nothing is kept)."""
    recipe = job.recipe
    if rank_and_world_size()[1] > 1:
        raise UsageError("--dry-run looks at one process: run it without torchrun")
    signatures(recipe, job.metrics)
    reference = load_reference(job.checkpoint, recipe)
    splits = prepare_data(job.data, recipe, reference, say)
    batches = recipe.micro_batches(1)
    steps = -(-len(splits["train"].examples) // recipe.batch_size)
    parameters = list(reference.model.parameters())
    tokens = tokens_of_batches(reference, splits["train"].examples, recipe)
    plan = {
        "captions": {name: len(split.examples) for name, split in splits.items()},
        "steps_per_epoch": steps,
        "steps": steps * recipe.epochs,
        "batch": {"a_step": recipe.batch_size, "a_process_at_once": batches[0], "accumulated": batches[1]},
        "tokens_of_a_batch": rounded(tokens),
        "learning_rates": learning_rates(recipe, steps),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "image_size": reference.model.config.vision_config.image_size,
        "memory_gib": memory(reference.model, recipe, PixelSpec.of(reference.image_processor, recipe.high_bit_depth)),
        "disk_gib": {name: rounded(size / GIB) for name, size in disk(reference.model, recipe).items()},
        "a100_estimate": on_an_a100(flop_of_step(reference.model, recipe, round(tokens)), recipe, steps),
    }
    if trial:
        plan["trial"], later, seconds_an_image, images = _trial(job, reference, splits, batches, say)
        plan["this_machine"] = on_this_machine(recipe, steps, later, seconds_an_image, images)
        say(in_words(plan))
    return plan


def in_words(plan: dict[str, Any]) -> str:
    """Return the estimates of a plan in a line."""
    here = plan["this_machine"]
    return (
        f"on this machine: about {here['hours_an_epoch']:g} hours an epoch, {here['hours']:g} for all epochs (not "
        f"counted: {', '.join(here['not_counted'])}); on disk: {plan['disk_gib']['most']:g} GiB at most"
    )


def on_this_machine(
    recipe: Recipe, steps_per_epoch: int, seconds_a_step: float, seconds_an_image: float, images: int
) -> dict[str, Any]:
    """Return hours of an epoch and of a run, from measured seconds of a step and of a validation image."""
    learning, validation = steps_per_epoch * seconds_a_step / 3600, images * seconds_an_image / 3600
    encoding = ["encoding the images once"] if recipe.cache_features else []
    return {
        "seconds_a_step": rounded(seconds_a_step),
        "seconds_a_validation_image": rounded(seconds_an_image),
        "validation_images": images,
        "hours_an_epoch": rounded(learning + validation),
        "of_these_validation": rounded(validation),
        "hours": rounded((learning + validation) * recipe.epochs),
        "not_counted": ["checking the data", *encoding, "scoring validation captions", "writing to disk"],
    }


def learning_rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    """Return the learning rate at the first step of each epoch."""
    starts = (epoch * steps_per_epoch for epoch in range(recipe.epochs))
    return [
        float(f"{recipe.learning_rate * recipe.learning_rate_factor(step, steps_per_epoch):.6g}") for step in starts
    ]


def _trial(
    job: Job, reference: Reference, splits: dict[str, Split], batches: tuple[int, int], say: Callable[[str], None]
) -> tuple[dict[str, Any], float, float, int]:
    """Take two optimiser steps on the first images of the data, then do all of a first validation with TRIAL_IMAGES
    images: what would fail there fails here.

    Returns losses, scores and seconds, the seconds of the last step (the first ones pay for what happens once), the
    seconds to caption a validation image, and the number of images an epoch will be judged by.
    """
    evaluator = make_evaluator(job, reference, splits["valid"].examples)
    ids = list(references_by_id(evaluator.examples))
    some, spent = set(ids[:TRIAL_IMAGES]), []
    few = replace(evaluator, examples=[example for example in evaluator.examples if example.id in some])

    def evaluate() -> tuple[dict[str, float], list[tuple[str, str]]]:
        start = time.perf_counter()
        loss, captions = few.observe()
        spent.append(time.perf_counter() - start)
        return {LOSS: loss} | few.scores(captions), captions

    with _room_beside(job.out) as out:
        judge = make_judge(evaluate, reference, best_models(out, job.recipe), 0, lambda _: None)
        steps = {"max_steps": TRIAL_STEPS}
        trainer = make_trainer(job.recipe, reference, splits, judge, batches, job.metrics, out, say, **steps)
        trainer.args.logging_steps = trainer.state.logging_steps = 1
        clock = StepClock()
        trainer.add_callback(clock)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        scores = {name: value for name, value in trainer.evaluate().items() if name.startswith("eval_")}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"steps": trainer.state.global_step, "losses": losses, "seconds_a_step": round(seconds / TRIAL_STEPS, 2)}
    found["validation"] = {"images": len(some)} | {name.removeprefix("eval_"): one for name, one in scores.items()}
    return found, clock.ends[-1] - clock.ends[-2], spent[0] / len(some), len(ids)


@contextmanager
def _room_beside(out: Path) -> Iterator[Path]:
    """Make a temporary directory where the run's own will be: on the same disk, with the same rights."""
    parent = next(path for path in out.absolute().parents if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.dry-run.", dir=parent) as directory:
        yield Path(directory)

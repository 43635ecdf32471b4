"""Estimate what a run will need: steps, memory, disk, and hours on this machine from two trial steps.

The estimate of GPU memory has not been checked on a GPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback

from engine.cli.caption import in_words
from engine.errors import UsageError
from export.families import family_of
from export.reference.huggingface import Reference
from train.data.batches import EpochOrder, PixelSpec, collate_captions
from train.data.examples import Example, references_by_id
from train.finetune import Job, make_evaluator, make_judge, prepare
from train.learning.reward import repeating
from train.learning.setup import Run, make_trainer
from train.learning.trainer import KEPT_STATES, LOSS, Evaluation, rank_and_world_size, sum_of_losses
from train.recipe import Recipe

A100_GIB = 40.0
"""Memory of the smaller A100, to compare the estimate with."""
GIB = float(1 << 30)
MOST_BATCHES = 256
"""Number of batches whose length is measured: a sample of some thousand captions."""


def memory(run: Run) -> dict[str, float]:
    """Estimate the GPU memory of a process in mixed precision, in GiB, for captions of max_tokens tokens.

    It adds up float32 weights (4 bytes), their half-precision copies (2), gradients and AdamW's two moments (12 per
    trained parameter), and the tensors that autograd saves for the backward pass. Those are measured on this machine
    under bfloat16 autocast for one and two images; float16 takes the same number of bytes. Not included: the CUDA
    context, workspaces, and memory that the allocator holds but does not use.
    """
    model, recipe, spec = run.reference.model, run.recipe, run.spec
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    of_step = passes(recipe, recipe.max_tokens)
    one_image, two_images = (
        sum(_saved_for_backward(model, spec, tokens, count, copies) for tokens, copies in of_step) for count in (1, 2)
    )
    device_batch, _ = run.batches
    weights = (total * (4 + 2) + trained * 12) / GIB
    # The difference is what one more image adds: both measurements include the half-precision weights.
    activations = device_batch * (two_images - one_image) / GIB
    return {
        "weights_gradients_moments": round(weights, 2),
        f"activations_of_{device_batch}": round(activations, 2),
        "fp16_or_bf16": round(weights + activations, 2),
        "a100": A100_GIB,
    }


def passes(recipe: Recipe, tokens: int) -> list[tuple[int, int]]:
    """Return (tokens, captions per image) of each forward pass that a step learns from.

    Training captions have `tokens` tokens. Sampled captions are assumed to have the maximum length.
    """
    drawn = [(1 + recipe.eval_max_new_tokens, recipe.samples)] if recipe.reward else []
    learned = [(tokens, 1)] if recipe.likelihood_share or not recipe.reward else []
    return drawn + learned


def _saved_for_backward(model: PreTrainedModel, spec: PixelSpec, tokens: int, images: int, copies: int) -> int:
    """Return the bytes that autograd saves for a batch of `images` images with `copies` captions each.

    Parameters are not counted; storage that tensors share is counted once.
    """
    of_parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else a later tensor could get the same address and not be counted
        return tensor

    sizes = family_of(model).sizes(model.config)
    length = min(tokens, sizes.max_positions)
    ids = torch.arange(images * copies * length).reshape(images * copies, length) % sizes.vocab_size
    model.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, repeating(model.vision_model, [copies]), torch.autocast("cpu", torch.bfloat16):
        outputs = model(
            pixel_values=torch.zeros(images, 3, spec.size, spec.size),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
        )
        loss = sum_of_losses(outputs.logits, ids)
    del outputs, loss
    return sum(saved.values())


def disk(model: PreTrainedModel, recipe: Recipe) -> dict[str, int]:
    """Return the bytes on disk of the kept models, of the kept training states, and the most that a run ever takes.

    Weights are float32; a training state also has AdamW's two moments of the trained parameters. Not included: logs,
    captions and tokenizers, a few megabytes.
    """
    learning = model.text_decoder if recipe.cache_features else model
    one_model = 4 * sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in learning.parameters() if parameter.requires_grad)
    one_state = 4 * sum(parameter.numel() for parameter in learning.parameters()) + 8 * trained
    saves = recipe.epochs if recipe.save_steps is None else KEPT_STATES + 1
    models, states = min(recipe.keep, recipe.epochs) * one_model, min(KEPT_STATES, saves) * one_state
    # A new model or state is written before the one that it replaces is deleted.
    temporary = max(one_model * (recipe.epochs > recipe.keep), one_state * (saves > KEPT_STATES))
    return {"models": models, "states": states, "most": models + states + temporary}


def tokens_of_batches(reference: Reference, examples: Sequence[Example], recipe: Recipe) -> float:
    """Return the mean length of a process's batches in tokens; a batch is as long as its longest caption."""
    order = EpochOrder(len(examples), recipe.batch_size, recipe.seed)
    indices = [index for _, index in order]
    start_token = reference.sizes.tokens.bos
    device_batch, _ = recipe.micro_batches(1)
    lengths = []
    for start in islice(range(0, len(indices), device_batch), MOST_BATCHES):
        batch = [examples[i] for i in indices[start : start + device_batch] if i < len(examples)]
        texts, prompts = [example.caption for example in batch], [example.prompt for example in batch]
        if batch:
            collated = collate_captions(reference.tokenizer, texts, start_token, recipe.max_tokens, prompts)
            lengths.append(collated["input_ids"].shape[1])
    return float(np.mean(lengths))


def rounded(value: float) -> float:
    """Round a number to three significant digits."""
    return float(f"{value:.3g}")


TRIAL_STEPS = 2
TRIAL_IMAGES = 8
"""Number of validation images that a trial captions and scores."""


class StepClock(TrainerCallback):
    """Record when each optimiser step ended, in seconds of time.perf_counter."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """See TrainerCallback."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels run asynchronously: the step has ended when the GPU has
        self.ends.append(time.perf_counter())


def plan_run(job: Job, log: Callable[[str], None]) -> dict[str, Any]:
    """Return the plan of a run, with measurements from TRIAL_STEPS optimiser steps and a validation; keep nothing."""
    recipe = job.recipe
    if rank_and_world_size()[1] > 1:
        raise UsageError("--dry-run measures one process: run it without torchrun")
    run = prepare(job, log)
    examples, model = run.splits["train"].examples, run.reference.model
    steps = run.order.padded // recipe.batch_size
    starts = (epoch * steps for epoch in range(recipe.epochs))  # the first step of each epoch
    rates = [recipe.learning_rate * recipe.learning_rate_factor(step, steps) for step in starts]
    parameters = list(model.parameters())
    plan = {
        "captions": {name: len(split.examples) for name, split in run.splits.items()},
        "steps_per_epoch": steps,
        "steps": steps * recipe.epochs,
        "batch": {"a_step": recipe.batch_size, "a_process_at_once": run.batches[0], "accumulated": run.batches[1]},
        "tokens_of_a_batch": rounded(tokens_of_batches(run.reference, examples, recipe)),
        "learning_rates": [float(f"{rate:.6g}") for rate in rates],
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "image_size": run.reference.sizes.image_size,
        "memory_gib": memory(run),
        "disk_gib": {name: rounded(size / GIB) for name, size in disk(model, recipe).items()},
    }
    plan["trial"], last_step, seconds_an_image, images = _trial(run)
    plan["this_machine"] = here = on_this_machine(recipe, steps, last_step, seconds_an_image, images)
    log(
        f"on this machine: about {in_words(3600 * here['hours_an_epoch'])} per epoch, "
        f"{in_words(3600 * here['hours'])} for all epochs (not included: {', '.join(here['not_counted'])}); on disk: "
        f"{plan['disk_gib']['most']:g} GiB at most"
    )
    return plan


def on_this_machine(
    recipe: Recipe, steps_per_epoch: int, seconds_a_step: float, seconds_an_image: float, images: int
) -> dict[str, Any]:
    """Return the hours of an epoch and of a run from the measured seconds per step and per validation image."""
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


def _trial(run: Run) -> tuple[dict[str, Any], float, float, int]:
    """Take TRIAL_STEPS optimiser steps, then do a complete validation with TRIAL_IMAGES images.

    What would fail at the end of the first epoch fails here. Returns losses, scores and seconds; the seconds of the
    last step; the seconds per validation image; and the number of validation images of an epoch.
    """
    evaluator = make_evaluator(run)
    ids = list(references_by_id(evaluator.examples))
    chosen, spent = set(ids[:TRIAL_IMAGES]), []
    few = replace(evaluator, examples=[example for example in evaluator.examples if example.id in chosen])

    def evaluate() -> Evaluation:
        start = time.perf_counter()
        loss, captions = few.observe()
        spent.append(time.perf_counter() - start)
        return {LOSS: loss} | few.scores(captions), captions

    # Next to the run directory: on the same disk, with the same permissions.
    parent = next(path for path in run.out.absolute().parents if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{run.out.name}.dry-run.", dir=parent) as directory:
        trial = replace(run, out=Path(directory))
        judge = make_judge(replace(trial, log=lambda _: None), evaluate)
        trainer = make_trainer(trial, judge, max_steps=TRIAL_STEPS)
        trainer.args.logging_steps = trainer.state.logging_steps = 1
        clock = StepClock()
        trainer.add_callback(clock)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        scores = {name: value for name, value in trainer.evaluate().items() if name.startswith("eval_")}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = {"steps": trainer.state.global_step, "losses": losses, "seconds_a_step": round(seconds / TRIAL_STEPS, 2)}
    validation = {name.removeprefix("eval_"): value for name, value in scores.items()}
    report["validation"] = {"images": len(chosen)} | validation
    last_step = clock.ends[-1] - clock.ends[-2]  # the first step includes work that is done once
    return report, last_step, spent[0] / len(chosen), len(ids)

"""What a run will need, before it runs: memory, floating point operations, disk.

Nothing here has been checked on a GPU. Knows nothing of data sets on disk and of run directories.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipForConditionalGeneration, TrainerCallback

from engine.errors import UsageError
from export.checkpoints.load import encoder_positions
from export.reference.huggingface import Reference
from train.data.batches import EpochOrder, PixelSpec, collate_captions
from train.data.dataset import Example, Split
from train.finetune import Job, best_models, make_evaluator, make_judge, prepare_data, signatures
from train.learning.evaluate import LOSS, references_by_id, sum_of_losses
from train.learning.processes import rank_and_world_size
from train.learning.reward import repeating
from train.learning.setup import load_reference, make_trainer
from train.learning.trainer import KEPT_STATES
from train.recipe import Recipe

A100_GIB = 40.0
A100_TFLOPS = {"fp32": 19.5, "bf16": 312.0, "fp16": 312.0}
"""NVIDIA's data sheet, dense; torch multiplies float32 without TF32 unless it is told otherwise."""
SHARE_OF_PEAK = 0.3
"""A guess: what is left of the peak for reading images, small kernels and the optimiser to take their time."""
GIB = float(1 << 30)
MOST_BATCHES = 256
"""Batches whose length is looked at: a sample of some thousand captions."""


def memory(model: BlipForConditionalGeneration, recipe: Recipe, spec: PixelSpec) -> dict[str, float]:
    """Estimate what a process needs on a GPU in mixed precision, in GiB, for captions of max_tokens tokens.

    Weights in float32 with gradients and AdamW's two moments for those that are trained (16 bytes a trained
    parameter, 20 with a moving average), their half-precision copies (2 bytes), and what autograd keeps for the
    backward pass, measured here under bfloat16 autocast for one and two images; float16 keeps the same number of bytes.
    Not counted: the CUDA context, the allocator's slack and workspaces.
    """
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    each = passes(recipe, recipe.max_tokens)
    one, two = (
        sum(_kept_for_backward(model, spec, tokens, count, copies) for tokens, copies in each) for count in (1, 2)
    )
    device_batch, _ = recipe.micro_batches(1)
    weights = (total * (4 + 2) + trained * (16 if recipe.ema else 12)) / GIB
    activations = device_batch * (two - one) / GIB  # what one image adds: half-precision weights are in both
    return {
        "weights_gradients_moments": round(weights, 2),
        f"activations_of_{device_batch}": round(activations, 2),
        "fp16_or_bf16": round(weights + activations, 2),
        "a100": A100_GIB,
    }


def passes(recipe: Recipe, tokens: int) -> list[tuple[int, int]]:
    """Return (tokens, captions an image) of each pass that a step learns from. Training captions have `tokens` tokens;
    drawn ones are taken to be as long as they may be.
    """
    drawn = [(1 + recipe.eval_max_new_tokens, recipe.samples)] if recipe.reward else []
    learned = [(tokens, 1)] if recipe.likelihood_share or not recipe.reward else []
    return drawn + learned


def _kept_for_backward(
    model: BlipForConditionalGeneration, spec: PixelSpec, tokens: int, images: int, copies: int
) -> int:
    """Return the bytes autograd saves for a batch with `copies` captions an image, parameters left out, shared storage
    counted once.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # a freed tensor's address would be used again
        return tensor

    vocabulary = model.config.text_config.vocab_size
    length = min(tokens, model.config.text_config.max_position_embeddings)
    ids = torch.arange(images * copies * length).reshape(images * copies, length) % vocabulary
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
    return sum(kept.values())


def disk(model: BlipForConditionalGeneration, recipe: Recipe) -> dict[str, int]:
    """Return bytes on disk: of the models that a run keeps, of its states of training, and of both at the moment when
    there are most. Weights are float32; a state has AdamW's two moments for what is trained, and the moving average.

    Not counted: logs, captions, tokenizers; a few megabytes.
    """
    learning = model.text_decoder if recipe.cache_features else model
    one_model = 4 * sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in learning.parameters() if parameter.requires_grad)
    one_state = 4 * sum(parameter.numel() for parameter in learning.parameters()) + (12 if recipe.ema else 8) * trained
    saves = recipe.epochs if recipe.save_steps is None else KEPT_STATES + 1
    models, states = min(recipe.keep, recipe.epochs) * one_model, min(KEPT_STATES, saves) * one_state
    beside = max(one_model * (recipe.epochs > recipe.keep), one_state * (saves > KEPT_STATES))
    return {"models": models, "states": states, "most": models + states + beside}


def tokens_of_batches(reference: Reference, examples: Sequence[Example], recipe: Recipe) -> float:
    """Return the mean length, in tokens, of what a process takes at once: that of the longest caption of a batch."""
    order = EpochOrder(len(examples), recipe.batch_size, recipe.seed)
    places = [index for _, index in order]
    start_token = reference.model.config.text_config.bos_token_id
    device_batch, _ = recipe.micro_batches(1)
    lengths = []
    for start in islice(range(0, len(places), device_batch), MOST_BATCHES):
        batch = [examples[i] for i in places[start : start + device_batch] if i < len(examples)]
        texts, prompts = [one.caption for one in batch], [one.prompt for one in batch]
        if batch:
            made = collate_captions(reference.tokenizer, texts, start_token, recipe.max_tokens, prompts)
            lengths.append(made["input_ids"].shape[1])
    return float(np.mean(lengths))


def flop_of_step(model: BlipForConditionalGeneration, recipe: Recipe, tokens: int) -> int:
    """Count the floating point operations of the matrix products of one optimiser step, forward and backward, with
    captions of `tokens` tokens; what is frozen is passed forward alone. Nothing is computed: tensors are on torch's
    device "meta".

    Drawing captions for a reward and scoring them is not counted.
    """
    with torch.device("meta"):
        twin = BlipForConditionalGeneration(deepcopy(model.config))
    is_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(is_trained[name])
    twin.train()
    if recipe.gradient_checkpointing:
        twin.gradient_checkpointing_enable({"use_reentrant": False})
    with FlopCounterMode(display=False) as counter:
        for length, copies in passes(recipe, tokens):
            _learn(twin, recipe, min(length, model.config.text_config.max_position_embeddings), copies)
    return int(counter.get_total_flops())


def _learn(twin: BlipForConditionalGeneration, recipe: Recipe, tokens: int, copies: int) -> None:
    """Pass a batch without content through a model on "meta", forward and backward, with `copies` captions an image."""
    vision, images = twin.config.vision_config, recipe.batch_size
    ids = torch.zeros(images * copies, tokens, dtype=torch.int64, device="meta")
    if recipe.cache_features:
        features = torch.zeros(images, encoder_positions(vision), vision.hidden_size, device="meta")
    else:
        features = twin.vision_model(
            pixel_values=torch.zeros(images, 3, vision.image_size, vision.image_size, device="meta")
        )[0]
    logits = twin.text_decoder(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        encoder_hidden_states=features.repeat_interleave(copies, 0),
        use_cache=False,
    ).logits
    sum_of_losses(logits, ids).backward()


def on_an_a100(flop: int, recipe: Recipe, steps_per_epoch: int) -> dict[str, Any]:
    """Return what a step and a run of `flop` operations a step would take on one A100 that reaches SHARE_OF_PEAK."""
    seconds = flop / (A100_TFLOPS[recipe.precision] * 1e12 * SHARE_OF_PEAK)
    hours = seconds * steps_per_epoch / 3600
    generation = ["drawing captions and scoring them"] if recipe.reward else []
    return {
        "tflop_a_step": rounded(flop / 1e12),
        "peak_tflops": A100_TFLOPS[recipe.precision],
        "assumed_share_of_peak": SHARE_OF_PEAK,
        "seconds_a_step": rounded(seconds),
        "hours_an_epoch": rounded(hours),
        "hours": rounded(hours * recipe.epochs),
        "not_counted": [*generation, "validation", "writing to disk"],
        "checked": "never: this code has not run on a GPU",
    }


def rounded(value: float) -> float:
    """Return a number with three digits."""
    return float(f"{value:.3g}")


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


def plan_run(job: Job, log: Callable[[str], None], *, trial: bool = True) -> dict[str, Any]:
    """Return what a run will be; with `trial`, take TRIAL_STEPS optimiser steps and validate (nothing is kept)."""
    recipe = job.recipe
    if rank_and_world_size()[1] > 1:
        raise UsageError("--dry-run looks at one process: run it without torchrun")
    signatures(recipe, job.metrics)
    reference = load_reference(job.checkpoint, recipe)
    splits = prepare_data(job.data, recipe, reference, log)
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
        plan["trial"], later, seconds_an_image, images = _trial(job, reference, splits, batches, log)
        plan["this_machine"] = on_this_machine(recipe, steps, later, seconds_an_image, images)
        log(in_words(plan))
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
    job: Job, reference: Reference, splits: dict[str, Split], batches: tuple[int, int], log: Callable[[str], None]
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
        trainer = make_trainer(job.recipe, reference, splits, judge, batches, job.metrics, out, log, **steps)
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

"""What a run will be, before a day is spent on it: steps, learning rates, memory, and two steps that really run.

Knows nothing of run directories.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BlipForConditionalGeneration

from engine.errors import UsageError
from export.reference.huggingface import Reference
from train.data.batches import PixelSpec
from train.data.dataset import Split
from train.finetune import Job, prepare_data, signatures
from train.learning.evaluate import sum_of_losses
from train.learning.processes import rank_and_world_size
from train.learning.reward import repeating
from train.learning.setup import load_reference, make_trainer
from train.recipe import Recipe

A100_GIB = 40.0
TRIAL_STEPS = 2
GIB = float(1 << 30)


def plan_run(job: Job, say: Callable[[str], None], *, trial: bool = True) -> dict[str, Any]:
    """Return what a run will be; with `trial`, take TRIAL_STEPS optimiser steps (the model is thrown away)."""
    recipe = job.recipe
    if rank_and_world_size()[1] > 1:
        raise UsageError("--dry-run looks at one process: run it without torchrun")
    signatures(recipe, job.metrics)
    reference = load_reference(job.checkpoint, recipe)
    splits = prepare_data(job.data, recipe, reference, say)
    device_batch, accumulated = recipe.micro_batches(1)
    steps = -(-len(splits["train"].examples) // recipe.batch_size)
    parameters = list(reference.model.parameters())
    plan = {
        "captions": {name: len(split.examples) for name, split in splits.items()},
        "steps_per_epoch": steps,
        "steps": steps * recipe.epochs,
        "batch": {"a_step": recipe.batch_size, "a_process_at_once": device_batch, "accumulated": accumulated},
        "learning_rates": learning_rates(recipe, steps),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "image_size": reference.model.config.vision_config.image_size,
        "memory_gib": memory(reference.model, recipe, PixelSpec.of(reference.image_processor, recipe.high_bit_depth)),
    }
    if trial:
        plan["trial"] = _trial(job, reference, splits, (device_batch, accumulated), say)
    return plan


def learning_rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    """Return the learning rate at the first step of each epoch."""
    starts = (epoch * steps_per_epoch for epoch in range(recipe.epochs))
    return [
        float(f"{recipe.learning_rate * recipe.learning_rate_factor(step, steps_per_epoch):.6g}") for step in starts
    ]


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
    copies = recipe.samples if recipe.reward else 1
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    one, two = (_kept_for_backward(model, spec, recipe.max_tokens, count, copies) for count in (1, 2))
    device_batch, _ = recipe.micro_batches(1)
    weights = (total * (4 + 2) + trained * (16 if recipe.ema else 12)) / GIB
    activations = device_batch * (two - one) / GIB  # what one image adds: half-precision weights are in both
    return {
        "weights_gradients_moments": round(weights, 2),
        f"activations_of_{device_batch}": round(activations, 2),
        "fp16_or_bf16": round(weights + activations, 2),
        "a100": A100_GIB,
    }


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


def _trial(
    job: Job, reference: Reference, splits: dict[str, Split], batches: tuple[int, int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Take two optimiser steps on the first images of the data and report losses and seconds."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        trainer = make_trainer(
            job.recipe, reference, splits, lambda _: {}, batches, job.metrics, out, say, max_steps=TRIAL_STEPS
        )
        trainer.args.logging_steps = trainer.state.logging_steps = 1
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": trainer.state.global_step, "losses": losses, "seconds_a_step": round(seconds / TRIAL_STEPS, 2)}

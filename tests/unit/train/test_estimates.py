"""Estimates of a run: operations counted without computing, against those of real passes; bytes; hours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.tiny import IMAGE_SIZE
from train.data.dataset import Example
from train.dry_run import disk, flop_of_step, on_an_a100, on_this_machine, passes, tokens_of_batches
from train.learning.evaluate import sum_of_losses
from train.learning.setup import load_reference
from train.recipe import RECIPES, Recipe

SMALL = Recipe(batch_size=4, device_batch=2, image_size=None, eval_max_new_tokens=7, samples=3)


def really_counted(model, images: int, captions: int, tokens: int) -> int:
    """Operations of forward and backward passes that compute."""
    features = model.vision_model(pixel_values=torch.rand(images, 3, IMAGE_SIZE, IMAGE_SIZE))[0]
    ids = torch.randint(5, 20, (images * captions, tokens))
    with FlopCounterMode(display=False) as counter:
        features = model.vision_model(pixel_values=torch.rand(images, 3, IMAGE_SIZE, IMAGE_SIZE))[0]
        logits = model.text_decoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=features.repeat_interleave(captions, 0),
        ).logits
        sum_of_losses(logits, ids).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("changes", "captions", "tokens"),
    [
        ({}, 1, 11),
        ({"freeze": ("vision",)}, 1, 11),
        ({"freeze": ("all-but-cross",)}, 1, 11),
        ({"reward": ("rouge1=1",), "freeze": ("vision", "words")}, 3, 8),
    ],
)
def test_operations_are_those_of_real_passes(changes, captions, tokens, tiny_checkpoint):
    recipe = replace(SMALL, **changes)
    model = load_reference(tiny_checkpoint, recipe).model
    found = flop_of_step(model, recipe, 11)
    assert found == really_counted(model, 4, captions, tokens)
    assert found == 2 * flop_of_step(model, replace(recipe, batch_size=2), 11)
    assert found < flop_of_step(model, replace(recipe, gradient_checkpointing=True), 11)


def test_cached_features_leave_the_vision_tower_out(tiny_checkpoint):
    recipe = replace(SMALL, freeze=("vision",))
    model = load_reference(tiny_checkpoint, recipe).model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vision_model(pixel_values=torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE))
    cached = flop_of_step(model, replace(recipe, cache_features=True), 11)
    assert flop_of_step(model, recipe, 11) - cached == counter.get_total_flops() > 0


def test_a_reward_beside_likelihood_learns_from_both():
    reward = replace(RECIPES["scst"], eval_max_new_tokens=30)
    assert passes(RECIPES["medblip-base"], 120) == [(120, 1)]
    assert passes(reward, 120) == [(31, 5)]
    assert passes(replace(reward, likelihood_share=0.1), 120) == [(31, 5), (120, 1)]


def test_the_length_of_a_batch_is_that_of_its_longest_caption(tiny_reference, tmp_path):
    """[DEC] and [SEP] are counted; four captions, one of them long, make two batches of which one is long."""
    examples = [Example(str(i), tmp_path / "none", text) for i, text in enumerate(["a mass", "a", "mri", "the " * 9])]
    assert tokens_of_batches(tiny_reference, examples, replace(SMALL, device_batch=4)) == 11
    assert tokens_of_batches(tiny_reference, examples, SMALL) in ((11 + 4) / 2, (11 + 3) / 2)
    assert tokens_of_batches(tiny_reference, examples, replace(SMALL, device_batch=4, max_tokens=6)) == 6


def test_bytes_on_disk_follow_what_is_kept(tiny_checkpoint):
    model = load_reference(tiny_checkpoint, SMALL).model
    whole = sum(parameter.numel() for parameter in model.parameters())
    found = disk(model, replace(SMALL, epochs=5, keep=3))
    assert found == {"models": 12 * whole, "states": 24 * whole, "most": 48 * whole}
    cached = replace(SMALL, epochs=1, freeze=("vision",), cache_features=True)
    decoder = sum(parameter.numel() for parameter in model.text_decoder.parameters())
    assert disk(load_reference(tiny_checkpoint, cached).model, cached)["states"] == 12 * decoder


def test_hours_add_up():
    found = on_this_machine(replace(SMALL, epochs=3), 900, 2.0, 3.6, 500)
    assert (found["hours_an_epoch"], found["of_these_validation"], found["hours"]) == (1.0, 0.5, 3.0)
    a100 = on_an_a100(int(93.6e12), replace(SMALL, epochs=3, precision="bf16"), 3600)
    assert (a100["seconds_a_step"], a100["hours_an_epoch"], a100["hours"]) == (1.0, 1.0, 3.0)
    assert on_an_a100(int(93.6e12), SMALL, 3600)["hours_an_epoch"] == 16.0
    assert "never" in a100["checked"]

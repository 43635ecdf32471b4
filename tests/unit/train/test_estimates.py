"""Estimates of a run: passes, lengths of batches, bytes on disk and hours."""

from __future__ import annotations

from dataclasses import replace

from train.data.dataset import Example
from train.dry_run import disk, on_this_machine, passes, tokens_of_batches
from train.learning.setup import load_reference
from train.recipe import RECIPES, Recipe

SMALL = Recipe(batch_size=4, device_batch=2, image_size=None, eval_max_new_tokens=7, samples=3)


def test_passes_of_reward_and_likelihood():
    reward = replace(RECIPES["scst"], eval_max_new_tokens=30)
    assert passes(RECIPES["medblip-base"], 120) == [(120, 1)]
    assert passes(reward, 120) == [(31, 5)]
    assert passes(replace(reward, likelihood_share=0.1), 120) == [(31, 5), (120, 1)]


def test_tokens_of_batches_follow_longest_caption(tiny_reference, tmp_path):
    """[DEC] and [SEP] count. Four captions, one of them long, make two batches, one of them long."""
    examples = [Example(str(i), tmp_path / "none", text) for i, text in enumerate(["a mass", "a", "mri", "the " * 9])]
    assert tokens_of_batches(tiny_reference, examples, replace(SMALL, device_batch=4)) == 11
    assert tokens_of_batches(tiny_reference, examples, SMALL) in ((11 + 4) / 2, (11 + 3) / 2)
    assert tokens_of_batches(tiny_reference, examples, replace(SMALL, device_batch=4, max_tokens=6)) == 6


def test_disk_of_kept_models_and_states(tiny_checkpoint):
    model = load_reference(tiny_checkpoint, SMALL).model
    model_size = sum(parameter.numel() for parameter in model.parameters())
    estimate = disk(model, replace(SMALL, epochs=5, keep=3))
    assert estimate == {"models": 12 * model_size, "states": 24 * model_size, "most": 48 * model_size}
    cached = replace(SMALL, epochs=1, freeze=("vision",), cache_features=True)
    decoder = sum(parameter.numel() for parameter in model.text_decoder.parameters())
    assert disk(load_reference(tiny_checkpoint, cached).model, cached)["states"] == 12 * decoder


def test_hours_on_this_machine_add_up():
    hours = on_this_machine(replace(SMALL, epochs=3), 900, 2.0, 3.6, 500)
    assert (hours["hours_an_epoch"], hours["of_these_validation"], hours["hours"]) == (1.0, 0.5, 3.0)

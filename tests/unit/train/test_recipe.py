"""Recipes: learning rate schedules, settings from files and flags, and invalid settings."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import UsageError
from tests.helpers.tiny import make_checkpoint
from train.learning.run_dir import write_or_compare_record
from train.learning.setup import load_reference
from train.learning.trainer import stopped_falling
from train.recipe import RECIPES, Recipe, load_recipe, parse_changes


def rates_of_torch(scheduler_class, epochs, steps_per_epoch, each_step, rate, **settings):
    """Return the learning rate of every optimiser step, by a scheduler of torch."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = scheduler_class(optimizer, **settings)
    rates = []
    for _ in range(epochs):
        for _ in range(steps_per_epoch):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if each_step:
                scheduler.step()
        if not each_step:
            scheduler.step()
    return rates


def test_medblip_base_rates_match_torch_step_lr():
    recipe = RECIPES["medblip-base"]
    assert (recipe.epochs, recipe.learning_rate, recipe.image_size, recipe.max_tokens) == (15, 1e-5, 224, 200)
    expected = rates_of_torch(
        torch.optim.lr_scheduler.StepLR, recipe.epochs, 7, False, recipe.learning_rate, step_size=3, gamma=0.1
    )
    rates = [recipe.learning_rate * recipe.learning_rate_factor(step, 7) for step in range(7 * recipe.epochs)]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert len(set(expected)) == 5


def test_one_cycle_rates_match_torch():
    recipe = Recipe(schedule="one-cycle", learning_rate=3e-4, epochs=4)
    expected = rates_of_torch(
        torch.optim.lr_scheduler.OneCycleLR, 4, 25, True, 3e-4, max_lr=3e-4, total_steps=100, pct_start=0.1
    )
    rates = [3e-4 * recipe.learning_rate_factor(step, 25) for step in range(100)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_medblip_large_patience():
    recipe = RECIPES["medblip-large"]
    assert (recipe.epochs, recipe.patience) == (5, 1)
    assert not stopped_falling([3.0, 2.5, 2.4], recipe.patience)
    assert stopped_falling([3.0, 2.5, 2.5], recipe.patience)
    assert not stopped_falling([3.0, 2.0, 2.5], 2)
    assert stopped_falling([3.0, 2.0, 2.5, 2.1], 2)
    assert not stopped_falling([3.0], 1)


@pytest.mark.parametrize("size", ["base", "large"])
def test_384_recipes_differ_only_in_size_and_precision(size):
    paper, ours = RECIPES[f"medblip-{size}"].settings(), RECIPES[f"medblip-{size}-384"].settings()
    changed = {name: value for name, value in ours.items() if value != paper[name]}
    assert changed == {"name": f"medblip-{size}-384", "image_size": 384, "precision": "bf16"}


def test_position_table_is_not_resized_at_384_px(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", image_size=384, vision={"patch_size": 16})
    name = "vision_model.embeddings.position_embedding"
    published = load_file(checkpoint / "model.safetensors")[name]
    assert published.shape[1] == 577
    kept, resized = (
        load_reference(checkpoint, RECIPES[recipe]).model.state_dict()[name]
        for recipe in ("medblip-base-384", "medblip-base")
    )
    assert torch.equal(kept, published)
    assert resized.shape[1] == 197


@pytest.mark.parametrize(("name", "base"), [("medblip-2026", "medblip-base"), ("medblip-2026-scst", "scst")])
def test_2026_recipes_change_only_decoding(name, base):
    recipe, others = RECIPES[name], RECIPES[base].settings()
    assert {name: getattr(recipe.eval_options(), name) for name in recipe.eval_options().given} == {
        "num_beams": 3,
        "repetition_penalty": 2.5,
        "length_penalty": 2.0,
        "min_new_tokens": 8,
        "max_new_tokens": 64,
        "no_repeat_ngram_size": 0,
    }
    changed = {setting for setting, value in recipe.settings().items() if value != others[setting]}
    assert {setting for setting in changed if not setting.startswith("eval_")} == {"name", "write_decoding"}


@pytest.mark.parametrize(
    ("world_size", "device_batch", "expected"), [(1, 16, (16, 1)), (1, 4, (4, 4)), (8, 16, (2, 1)), (2, 4, (4, 2))]
)
def test_step_size_does_not_depend_on_number_of_devices(world_size, device_batch, expected):
    micro_batches = Recipe(batch_size=16, device_batch=device_batch).micro_batches(world_size)
    assert micro_batches == expected
    assert micro_batches[0] * micro_batches[1] * world_size == 16


@pytest.mark.parametrize(("batch_size", "device_batch", "world_size"), [(16, 16, 3), (4, 4, 8), (24, 16, 1)])
def test_batch_that_cannot_be_divided_evenly_is_refused(batch_size, device_batch, world_size):
    with pytest.raises(UsageError, match=f"batch_size {batch_size}"):
        Recipe(batch_size=batch_size, device_batch=device_batch).micro_batches(world_size)


def test_flags_override_file_which_overrides_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: medblip-large\nlearning_rate: 3e-5\nfreeze: [vision, words]\neval_images: null\n")
    recipe = load_recipe(
        str(path), parse_changes(("epochs=2", "gradient-checkpointing=true", "reward=rouge1=1 cider=0.1"))
    )
    assert (recipe.name, recipe.patience, recipe.learning_rate, recipe.epochs) == ("mine", 1, 3e-5, 2)
    assert recipe.freeze == ("vision", "words")
    assert recipe.eval_images is None
    assert recipe.gradient_checkpointing is True
    assert recipe.rewards() == {"rouge1": 1.0, "cider": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "unknown settings learning_rat"),
        ({"learning_rate": "fast"}, "learning_rate cannot be 'fast'"),
        ({"epochs": 1.5}, "epochs cannot be 1.5"),
        ({"epochs": True}, "epochs cannot be True"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"ema": 0.99}, "unknown settings ema"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        ({"freeze": "lungs"}, "freeze names 'lungs'"),
        ({"gradient_checkpointing": "maybe"}, "gradient_checkpointing cannot be 'maybe'"),
        ({"cache_features": True}, "cache_features needs a frozen vision tower"),
        ({"reward": "rouge1=much"}, "reward 'rouge1=much' is not METRIC=WEIGHT"),
        ({"augmentation": "flip"}, "augmentation is 'flip'"),
    ],
)
def test_invalid_setting_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        load_recipe("medblip-base", changes)


def test_run_with_removed_setting_is_refused(tmp_path):
    """run.json of an older version may name a setting that had an effect and no longer exists."""
    recipe, lines = Recipe(), []
    for value in (0.0, 0.99):
        (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe.settings() | {"ema": value}}))
        if not value:
            write_or_compare_record(tmp_path, recipe, {}, lines.append, is_begun=True)
    with pytest.raises(UsageError, match="differs in ema"):
        write_or_compare_record(tmp_path, recipe, {}, lines.append, is_begun=True)


@pytest.mark.parametrize("content", ["- a list\n", "{", "base: nothing\n"])
def test_invalid_recipe_file_is_refused(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"bad\.yaml(: base| cannot be read as YAML| must be a mapping of settings)"):
        load_recipe(str(path))
    with pytest.raises(UsageError, match="no recipe 'absent'"):
        load_recipe("absent")
    with pytest.raises(UsageError, match="give SETTING=VALUE"):
        parse_changes(("epochs",))

"""Named recipes, and YAML files and flags on top of them. Knows nothing of models or data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from engine.errors import UsageError
from train.recipe import Recipe

MEDBLIP_BASE = Recipe(name="medblip-base")
MEDBLIP_LARGE = Recipe(name="medblip-large", epochs=5, patience=1)
"""MedBLIP: AdamW, learning rate 1e-5, StepLR x0.1 every 3 epochs, 224 px, at most 200 tokens, 15 epochs (base), 5
epochs until the loss stops falling (large). The paper gives no batch size, weight decay (AdamW's own 0.01 is taken) or
gradient clipping (the Trainer's 1.0): these are ours.
"""

AS_PUBLISHED: dict[str, Any] = {"image_size": 384, "precision": "bf16"}
"""BLIP was published for 384 px: its position table of 577 rows stays as it is. bfloat16 is ours. In it 16 images at
once, as at 224 px, are estimated at 11 GiB for base and 22 GiB for large (train/estimates.py, captions of 200 tokens),
so that an A100 of 40 GiB needs neither accumulation nor gradient checkpointing.
"""

SCST = Recipe(
    name="scst",
    epochs=3,
    learning_rate=3e-6,
    schedule="constant",
    image_size=None,
    freeze=("vision", "words"),
    reward=("rouge1=1", "bertscore=1"),
)

WINNER_2026: dict[str, Any] = {
    "eval_beams": 3,
    "eval_repetition_penalty": 2.5,
    "eval_length_penalty": 2.0,
    "eval_min_new_tokens": 8,
    "eval_max_new_tokens": 64,
    "eval_no_repeat_ngram": 0,
    "write_decoding": True,
}
"""How the winner of ImageCLEFmedical Caption 2026 decodes. We know this, and that they trained in two stages, by
likelihood and then by SCST. We know nothing of their model, image size, learning rates, batches and rewards: those of
the recipes are MedBLIP's and our own. Nor do we know whether they ban n-grams; the recipes ban none.
"""

SMOKE = Recipe(
    name="smoke",
    epochs=4,
    learning_rate=5e-5,
    schedule="one-cycle",
    batch_size=8,
    device_batch=8,
    max_tokens=64,
    image_size=None,
    eval_max_new_tokens=40,
    valid_share=0.2,
    workers=0,
)

DEMO_DECODER = Recipe(
    name="demo-decoder",
    epochs=8,
    learning_rate=3e-4,
    schedule="one-cycle",
    batch_size=32,
    device_batch=32,
    max_tokens=64,
    image_size=None,
    freeze=("vision",),
    cache_features=True,
    metric="loss",
    eval_images=None,
    workers=0,
)
DEMO = Recipe(
    name="demo",
    epochs=1,
    learning_rate=5e-5,
    schedule="one-cycle",
    batch_size=32,
    device_batch=32,
    max_tokens=64,
    image_size=None,
    augmentation="radiology",
    metric="loss",
    eval_images=None,
    workers=0,
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        MEDBLIP_BASE,
        MEDBLIP_LARGE,
        replace(MEDBLIP_BASE, name="medblip-base-384", **AS_PUBLISHED),
        replace(MEDBLIP_LARGE, name="medblip-large-384", **AS_PUBLISHED),
        replace(MEDBLIP_BASE, name="medblip-2026", **WINNER_2026),
        SMOKE,
        SCST,
        replace(SCST, name="medblip-2026-scst", **WINNER_2026),
        DEMO_DECODER,
        DEMO,
    )
}


def load_recipe(source: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Return a named recipe, or the one of a YAML file (settings over `base`, medblip-base when it names none).

    `changes` come on top; text is read as YAML, so that flags and files mean the same. Raises UsageError naming the
    setting.
    """
    changes = dict(changes or {})
    if source in RECIPES:
        recipe, path = RECIPES[source], source
    elif Path(source).is_file():
        path = source
        content = _read_yaml(Path(source))
        base = content.pop("base", "medblip-base")
        if base not in RECIPES:
            raise UsageError(f"{source}: base {base!r} is not one of {', '.join(RECIPES)}")
        content.setdefault("name", Path(source).stem)
        recipe = _changed(RECIPES[base], content, path)
    else:
        raise UsageError(f"there is no recipe {source!r}: give one of {', '.join(RECIPES)}, or a YAML file")
    return _changed(recipe, changes, "flag")


def parse_changes(given: tuple[str, ...]) -> dict[str, Any]:
    """Return {setting: value} of texts like `learning_rate=3e-5`; values are YAML."""
    changes = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: give SETTING=VALUE")
        try:
            changes[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {text}: {' '.join(str(error).split())[:200]}") from error
    return changes


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must be a mapping of settings, such as `epochs: 3`")
    return {str(name): value for name, value in content.items()}


def _changed(recipe: Recipe, changes: Mapping[str, Any], origin: str) -> Recipe:
    known = {one.name: one for one in fields(Recipe)}
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise UsageError(f"{origin}: unknown settings {', '.join(unknown)}; there are {', '.join(known)}")
    values = {
        name: _converted(name, value, getattr(recipe, name), str(known[name].type)) for name, value in changes.items()
    }
    return replace(recipe, **values)


def _converted(name: str, value: Any, default: Any, kind: str) -> Any:
    """Return a value as the type the setting has; YAML reads 1e-5 as text, as it wants 1.0e-5."""
    if kind.startswith("tuple"):
        several = value.replace(",", " ").split() if isinstance(value, str) else value or []
        if isinstance(several, list | tuple) and all(isinstance(one, str) for one in several):
            return tuple(several)
    elif kind == "bool":
        if isinstance(value, bool):
            return value
    elif value is None and "None" in kind:
        return None
    elif kind == "str":
        if isinstance(value, str):
            return value
    elif not isinstance(value, bool):
        try:
            number = float(value)
            if kind.startswith("float"):
                return number
            if number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise UsageError(f"{name} cannot be {value!r}: it is of the kind {kind}, like {default!r}")

"""Recipes: every setting of a fine-tuning run with its default and limits, the named recipes, and YAML files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from engine.errors import UsageError
from engine.options import CLIP, DecodeOptions, window_of
from train.data.batches import AUGMENTATIONS

SCHEDULES = ("step", "constant", "one-cycle")
PRECISIONS = ("fp32", "bf16", "fp16")
BASELINES = ("others", "greedy")
PARTS = ("vision", "words", "all-but-cross")


@dataclass(frozen=True)
class Recipe:
    """Settings of one run. The defaults are MedBLIP's for BLIP-base if the paper gives a value.

    `batch_size` is the number of image-caption pairs per optimiser step, over all processes. Each process takes
    `device_batch` pairs per forward pass and accumulates gradients for the rest.
    `schedule`: `step` multiplies the learning rate by `step_factor` every `step_epochs` epochs (torch's StepLR);
    `one-cycle` is Smith's (2018), and rises during the first tenth of the steps; `constant` never changes it.
    `patience`: the run ends after this many epochs without a lower validation loss (0: never).
    `freeze` names parts that are not trained: `vision` (the tower), `words` (word and position embeddings), or
    `all-but-cross` (everything except cross-attention).
    `cache_features` encodes every image once. It needs a frozen vision tower and no augmentation.
    `metric` ranks the epochs: a metric of `engine score` on generated captions, or `loss`. Captions are generated with
    `eval_beams` beams and the other `eval_` settings.
    `write_decoding` writes these `eval_` settings into the kept models in place of the checkpoint's generation
    settings, so that `generate` and an exported bundle caption as the validation did.
    `high_bit_depth` is how images of more than 8 bits are read; give `engine caption` the same value
    (engine/inputs/pixels.py).
    `reward`, such as "rouge1=1 bertscore=1", selects self-critical sequence training, the second stage
    (learning/reward.py). It samples `samples` captions per image and compares them with the `baseline`: `others` (the
    other samples) or `greedy` (a caption decoded with the `eval_` settings). `likelihood_share` is the share of cross
    entropy in the loss.
    """

    name: str = "medblip-base"
    epochs: int = 15
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    schedule: str = "step"
    step_epochs: int = 3
    step_factor: float = 0.1
    max_grad_norm: float = 1.0
    batch_size: int = 16
    device_batch: int = 16
    max_tokens: int = 200
    image_size: int | None = 224
    high_bit_depth: str = CLIP
    label_smoothing: float = 0.0
    freeze: tuple[str, ...] = ()
    cache_features: bool = False
    augmentation: str = "none"
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    patience: int = 0
    metric: str = "rouge1"
    eval_images: int | None = 1000
    eval_beams: int = 1
    eval_max_new_tokens: int = 64
    eval_min_new_tokens: int = 0
    eval_length_penalty: float = 1.0
    eval_repetition_penalty: float = 1.0
    eval_no_repeat_ngram: int = 3
    write_decoding: bool = False
    keep: int = 3
    save_steps: int | None = None
    valid_share: float = 0.1
    workers: int = 2
    seed: int = 0
    reward: tuple[str, ...] = ()
    samples: int = 5
    baseline: str = "others"
    likelihood_share: float = 0.0

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise UsageError(f"recipe {self.name}: {message}")

        choices = (("schedule", SCHEDULES), ("precision", PRECISIONS), ("augmentation", tuple(AUGMENTATIONS)))
        for setting, known in (*choices, ("baseline", BASELINES)):
            value = getattr(self, setting)
            require(value in known, f"{setting} is {value!r}, not one of {', '.join(known)}")
        for part in self.freeze:
            require(part in PARTS, f"freeze names {part!r}, not one of {', '.join(PARTS)}")
        counts = ("epochs", "step_epochs", "batch_size", "device_batch", "keep", "eval_beams")
        for setting in (*counts, "image_size", "eval_images", "save_steps"):  # of which the last three may be None
            value = getattr(self, setting)
            require(value is None or value >= 1, f"{setting} must be at least 1")
        for setting in ("weight_decay", "patience", "workers", "seed"):
            require(getattr(self, setting) >= 0, f"{setting} must not be negative")
        require(0 < self.learning_rate < math.inf, "learning_rate must be above 0")
        require(0 < self.step_factor <= 1, "step_factor must be above 0 and at most 1")
        require(self.max_grad_norm > 0, "max_grad_norm must be above 0")
        require(0 <= self.label_smoothing < 1, "label_smoothing must be at least 0 and below 1")
        minimum = 2 if self.baseline == "others" else 1
        require(self.samples >= minimum, f"samples must be at least {minimum} with the baseline {self.baseline}")
        require(0 <= self.likelihood_share < 1, "likelihood_share must be at least 0 and below 1")
        require(not (self.reward and self.cache_features), "a reward needs the images: turn cache_features off")
        is_smoothed = self.reward and self.label_smoothing
        require(not is_smoothed, "a reward cannot be combined with label_smoothing: set it to 0")
        require(
            not (self.cache_features and self.gradient_checkpointing),
            "cache_features trains the decoder alone, without gradient_checkpointing: turn one of them off",
        )
        self.rewards()
        window_of(self.high_bit_depth)
        self.eval_options()
        require(0 < self.valid_share < 1, "valid_share must be between 0 and 1")
        require(self.max_tokens >= 3, "max_tokens must be at least 3, for [DEC], a word and [SEP]")
        require(
            not self.cache_features or ("vision" in self.freeze and self.augmentation == "none"),
            "cache_features needs a frozen vision tower and no augmentation: the features would be stale",
        )

    def eval_options(self) -> DecodeOptions:
        """Return the decoding options of validation captions and of a reward's greedy baseline."""
        return DecodeOptions(
            num_beams=self.eval_beams,
            max_new_tokens=self.eval_max_new_tokens,
            min_new_tokens=self.eval_min_new_tokens,
            length_penalty=self.eval_length_penalty,
            repetition_penalty=self.eval_repetition_penalty,
            no_repeat_ngram_size=self.eval_no_repeat_ngram,
        )

    def rewards(self) -> dict[str, float]:
        """Return {metric: weight} of the reward. Raises UsageError if an entry is not METRIC=WEIGHT."""
        weights = {}
        for text in self.reward:
            name, _, weight = text.partition("=")
            try:
                weights[name] = float(weight or 1)
            except ValueError:
                raise UsageError(f"recipe {self.name}: reward {text!r} is not METRIC=WEIGHT") from None
        return weights

    def settings(self) -> dict[str, Any]:
        """Return {setting: value} with types that JSON and YAML can store: tuples become lists."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Return (pairs per process and forward pass, forward passes per step).

        Their product with `world_size` is batch_size. Raises UsageError if there is no such split.
        """
        share, rest = divmod(self.batch_size, world_size)
        if rest or not share:
            raise UsageError(f"batch_size {self.batch_size} cannot be divided evenly among {world_size} processes")
        device_batch = min(share, self.device_batch)
        if share % device_batch:
            raise UsageError(
                f"batch_size {self.batch_size} divided among {world_size} processes is {share} each, which is not a "
                f"multiple of device_batch {device_batch}"
            )
        return device_batch, share // device_batch

    def learning_rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the factor of the learning rate in optimiser step `step`, counted from 0.

        step: torch.optim.lr_scheduler.StepLR, stepped after every epoch. one-cycle: OneCycleLR with cosine annealing
        and its defaults (start at 1/25, end at 1/250,000), except that it rises during the first tenth of the steps.
        """
        if self.schedule == "step":
            return float(self.step_factor ** (step // steps_per_epoch // self.step_epochs))
        if self.schedule == "constant":
            return 1.0
        last = max(1, self.epochs * steps_per_epoch - 1)
        top = max(1.0, 0.1 * (last + 1) - 1)
        if step <= top:
            low, high, share = 1 / 25, 1.0, step / top
        else:
            low, high, share = 1.0, 1 / 25e4, min(1.0, (step - top) / max(1.0, last - top))
        return float(high + (low - high) * (1 + math.cos(math.pi * share)) / 2)


MEDBLIP_BASE = Recipe(name="medblip-base")
MEDBLIP_LARGE = Recipe(name="medblip-large", epochs=5, patience=1)
"""MedBLIP: AdamW, learning rate 1e-5, StepLR x0.1 every 3 epochs, 224 px, at most 200 tokens; 15 epochs (base), or at
most 5 epochs, until the loss stops falling (large). The paper does not give the batch size, the weight decay (here
AdamW's default, 0.01) and the gradient clipping (here the Trainer's default, 1.0).
"""

AS_PUBLISHED: dict[str, Any] = {"image_size": 384, "precision": "bf16"}
"""BLIP was published at 384 px: its position table of 577 rows is not resized. bfloat16 is our choice. By the estimate
of train/dry_run.py, 16 images per forward pass, as at 224 px, take 11 GiB (base) or 22 GiB (large) with captions of 200
tokens. An A100 of 40 GiB then needs neither accumulation nor gradient checkpointing.
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
"""Decoding of the winner of ImageCLEFmedical Caption 2026. It is also known that they trained in two stages, likelihood
and then SCST. Their model, image size, learning rates, batches and rewards are not known: those of the recipes are
MedBLIP's or ours. It is not known whether they ban repeated n-grams; the recipes do not.
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
    """Return a recipe by its name or from a YAML file.

    A file's settings override those of the recipe that its `base` names, by default medblip-base. `changes` override
    both. Raises UsageError that names the setting.
    """
    if source in RECIPES:
        recipe = RECIPES[source]
    elif Path(source).is_file():
        try:
            content = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{source} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(content, dict):
            raise UsageError(f"{source} must be a mapping of settings, such as `epochs: 3`")
        settings = {"name": Path(source).stem} | {str(name): value for name, value in content.items()}
        base = settings.pop("base", "medblip-base")
        if base not in RECIPES:
            raise UsageError(f"{source}: base {base!r} is not one of {', '.join(RECIPES)}")
        recipe = _changed(RECIPES[base], settings, source)
    else:
        raise UsageError(f"there is no recipe {source!r}: use one of {', '.join(RECIPES)}, or a YAML file")
    return _changed(recipe, changes or {}, "flag")


def parse_changes(texts: tuple[str, ...]) -> dict[str, Any]:
    """Parse texts like `learning_rate=3e-5` into {setting: value}. Values are read as YAML, like those of files."""
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: give SETTING=VALUE")
        try:
            changes[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {text}: {' '.join(str(error).split())[:200]}") from error
    return changes


def _changed(recipe: Recipe, changes: Mapping[str, Any], origin: str) -> Recipe:
    known = {field.name: field for field in fields(Recipe)}
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise UsageError(f"{origin}: unknown settings {', '.join(unknown)}; the settings are {', '.join(known)}")
    # Annotations are text here, such as "int | None".
    values = {name: _converted(name, v, getattr(recipe, name), str(known[name].type)) for name, v in changes.items()}
    return replace(recipe, **values)


def _converted(name: str, value: Any, default: Any, kind: str) -> Any:
    """Return a value converted to the type of its setting. YAML reads 1e-5 as text, because it expects 1.0e-5."""
    if kind.startswith("tuple"):
        entries = value.replace(",", " ").split() if isinstance(value, str) else value or []
        if isinstance(entries, list | tuple) and all(isinstance(entry, str) for entry in entries):
            return tuple(entries)
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
    raise UsageError(f"{name} cannot be {value!r}: its type is {kind}, such as {default!r}")

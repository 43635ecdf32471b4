"""What a fine-tuning run does: every setting with its default and its limits. Knows nothing of models or data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from engine.errors import UsageError
from engine.inputs.pixels import CLIP, window_of
from engine.options import DecodeOptions
from train.data.batches import AUGMENTATIONS

SCHEDULES = ("step", "constant", "one-cycle")
PRECISIONS = ("fp32", "bf16", "fp16")
BASELINES = ("others", "greedy")
PARTS = ("vision", "words", "all-but-cross")


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; the defaults are MedBLIP's for BLIP-base where the paper gives a value.

    `batch_size` is the number of image-caption pairs an optimiser step learns from, whatever the number of
    processes; each of them takes `device_batch` at once and accumulates the rest. `schedule` step multiplies the
    learning rate by `step_factor` every `step_epochs` epochs (torch's StepLR), one-cycle is Smith's (2018), with the
    first tenth rising. `patience` epochs without a lower validation loss end the run (0: never). `freeze` names
    parts that stay as they are: vision (the tower), words (word and position embeddings), or all-but-cross (everything
    but cross-attention). With a frozen vision tower and no augmentation, `cache_features` encodes every image once.
    `metric` is what the best epoch is chosen by: a metric of `engine score` over captions generated
    with `eval_beams` beams and the other `eval_` settings, or loss. With `write_decoding` the kept models carry these
    settings in place of the checkpoint's own, so that `generate` and an exported bundle caption as the validation did.
    `high_bit_depth` is how pictures of more than 8 bits are read, and `engine caption` has to be told the same
    (engine/inputs/pixels.py).

    With a `reward`, such as "rouge1=1 bertscore=1", the run is the second stage, self-critical sequence training
    (learning/reward.py): `samples` captions an image are drawn and compared with the `baseline`, the `others` or the
    `greedy` caption, which is decoded by the `eval_` settings; `likelihood_share` of the loss stays what it was.
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
        def refuse(holds: bool, message: str) -> None:
            if not holds:
                raise UsageError(f"recipe {self.name}: {message}")

        choices = {"schedule": SCHEDULES, "precision": PRECISIONS, "augmentation": tuple(AUGMENTATIONS)}
        choices |= {"baseline": BASELINES}
        for setting, known in choices.items():
            value = getattr(self, setting)
            refuse(value in known, f"{setting} is {value!r}, not one of {', '.join(known)}")
        for part in self.freeze:
            refuse(part in PARTS, f"freeze names {part!r}: parts are {', '.join(PARTS)}")
        for setting in ("epochs", "step_epochs", "batch_size", "device_batch", "keep", "eval_beams"):
            refuse(getattr(self, setting) >= 1, f"{setting} must be at least 1")
        for setting in ("image_size", "eval_images", "save_steps"):
            refuse(getattr(self, setting) is None or getattr(self, setting) >= 1, f"{setting} must be at least 1")
        for setting in ("weight_decay", "patience", "workers", "seed"):
            refuse(getattr(self, setting) >= 0, f"{setting} must not be negative")
        refuse(0 < self.learning_rate < math.inf, "learning_rate must be above 0")
        refuse(0 < self.step_factor <= 1, "step_factor must be above 0 and at most 1")
        refuse(self.max_grad_norm > 0, "max_grad_norm must be above 0")
        refuse(0 <= self.label_smoothing < 1, "label_smoothing must be at least 0 and below 1")
        least = 2 if self.baseline == "others" else 1
        refuse(self.samples >= least, f"samples must be at least {least} with the baseline {self.baseline}")
        refuse(0 <= self.likelihood_share < 1, "likelihood_share must be at least 0 and below 1")
        refuse(not (self.reward and self.cache_features), "a reward needs the images: cache_features must be off")
        refuse(
            not (self.reward and self.label_smoothing),
            "a reward goes without label_smoothing",
        )
        refuse(
            not (self.cache_features and self.gradient_checkpointing),
            "cache_features trains the decoder alone, which knows no gradient_checkpointing",
        )
        self.rewards()
        window_of(self.high_bit_depth)
        DecodeOptions(**self.eval_decoding())
        refuse(0 < self.valid_share < 1, "valid_share must be between 0 and 1")
        refuse(self.max_tokens >= 3, "max_tokens must be at least 3: [DEC], a word and [SEP]")
        refuse(
            not self.cache_features or ("vision" in self.freeze and self.augmentation == "none"),
            "cache_features needs a frozen vision tower and no augmentation: the features would be stale",
        )

    def eval_decoding(self) -> dict[str, Any]:
        """Return the decoding options of validation captions by Hugging Face's names."""
        return {
            "num_beams": self.eval_beams,
            "max_new_tokens": self.eval_max_new_tokens,
            "min_new_tokens": self.eval_min_new_tokens,
            "length_penalty": self.eval_length_penalty,
            "repetition_penalty": self.eval_repetition_penalty,
            "no_repeat_ngram_size": self.eval_no_repeat_ngram,
        }

    def rewards(self) -> dict[str, float]:
        """Return {metric: weight} of the reward; raise UsageError where it is not made of NAME=WEIGHT."""
        found = {}
        for text in self.reward:
            name, _, weight = text.partition("=")
            try:
                found[name] = float(weight or 1)
            except ValueError:
                raise UsageError(f"recipe {self.name}: reward {text!r} is not METRIC=WEIGHT") from None
        return found

    def settings(self) -> dict[str, Any]:
        """Return every setting as JSON and YAML can hold it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Return (pairs a process takes at once, how often it does so in a step).

        Raises UsageError where batch_size cannot be split so among `world_size` processes.
        """
        share, rest = divmod(self.batch_size, world_size)
        if rest or not share:
            raise UsageError(f"batch_size {self.batch_size} cannot be shared by {world_size} processes evenly")
        device_batch = min(share, self.device_batch)
        if share % device_batch:
            raise UsageError(
                f"batch_size {self.batch_size} among {world_size} processes is {share} each, which is no multiple of "
                f"device_batch {device_batch}"
            )
        return device_batch, share // device_batch

    def learning_rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """Return what the learning rate is multiplied by in optimiser step `step`, counted from 0.

        step: torch.optim.lr_scheduler.StepLR, stepped after every epoch. one-cycle: OneCycleLR with cosine
        annealing and its own defaults (start at 1/25, end at 1/250,000), but the first tenth rising.
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
"""MedBLIP: AdamW, learning rate 1e-5, StepLR x0.1 every 3 epochs, 224 px, at most 200 tokens, 15 epochs (base), 5
epochs until the loss stops falling (large). The paper gives no batch size, weight decay (AdamW's own 0.01 is taken) or
gradient clipping (the Trainer's 1.0): these are ours.
"""

AS_PUBLISHED: dict[str, Any] = {"image_size": 384, "precision": "bf16"}
"""BLIP was published for 384 px: its position table of 577 rows stays as it is. bfloat16 is ours. In it 16 images at
once, as at 224 px, are estimated at 11 GiB for base and 22 GiB for large (train/dry_run.py, captions of 200 tokens),
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

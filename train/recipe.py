"""What a fine-tuning run does: every setting with its default and its limits. Knows nothing of models or data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import UsageError
from engine.inputs.depth import CLIP, window_of
from engine.options import DecodeOptions
from train.data.augment import AUGMENTATIONS

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
    With `ema` above 0 an exponential moving average of the weights with this decay is what is evaluated and kept
    (learning/ema.py). `metric` is what the best epoch is chosen by: a metric of `engine score` over captions generated
    with `eval_beams` beams and the other `eval_` settings, or loss. With `write_decoding` the kept models carry these
    settings in place of the checkpoint's own, so that `generate` and an exported bundle caption as the validation did.
    `high_bit_depth` is how pictures of more than 8 bits are read, and `engine caption` has to be told the same
    (engine/inputs/depth.py).

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
    ema: float = 0.0
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
        refuse(0 <= self.ema < 1, "ema must be at least 0 and below 1")
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

"""The arithmetic captions need, counted; needs the engine alone, no torch.

Only useful work counts: rows that carry a running beam of an image Hugging Face's rule has not closed yet, and of the
cached positions those a row descends from. Empty slots, masked positions and padding count for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.captioner import Captioner
from engine.decoding.backend import Backend, StepInputs
from engine.options import DecodeOptions


@dataclass(frozen=True)
class ModelWork:
    """Floating-point operations (a multiplication and an addition are two) and float32 bytes of one model.

    Counted from the matrices of transformers' BlipForConditionalGeneration; normalisations, activations and softmax are
    left out (under 1 % of the work).
    """

    encoder_flops: float
    row_flops: float
    position_flops: float
    encoder_bytes: float
    decoder_bytes: float
    cross_bytes: float
    position_bytes: float

    @classmethod
    def of(cls, checkpoint: Path) -> ModelWork:
        """Count for a checkpoint."""
        return cls.of_config(json.loads((checkpoint / "config.json").read_text()))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ModelWork:
        """Count for the content of a config.json: per image, per row fed, and per cached position a row sees."""
        vision, text = config["vision_config"], config["text_config"]
        positions = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        width, inner = vision["hidden_size"], vision["intermediate_size"]
        layer = 4 * width**2 + 2 * width * inner
        patch = 3 * vision["patch_size"] ** 2 * width
        dim, layers = text["hidden_size"], text["num_hidden_layers"]
        cross = 2 * layers * width * dim
        block = 6 * dim**2 + 2 * dim * text["intermediate_size"]
        head = dim**2 + dim * text["vocab_size"]
        attention = vision["num_hidden_layers"] * 2 * positions**2 * width
        encoder_weights = patch + vision["num_hidden_layers"] * layer + cross
        return cls(
            encoder_flops=2.0 * (positions * encoder_weights + attention),
            row_flops=2.0 * (layers * (block + 2 * positions * dim) + head),
            position_flops=2.0 * layers * 2 * dim,
            encoder_bytes=4.0 * encoder_weights,
            decoder_bytes=4.0 * (layers * block + head),
            cross_bytes=4.0 * 2 * layers * positions * dim,
            position_bytes=4.0 * 2 * layers * dim,
        )


@dataclass
class Work:
    """What some captions needed: images, search steps, rows fed, and cached positions seen by these rows."""

    images: int = 0
    image_steps: int = 0
    rows: int = 0
    positions: int = 0

    def flops(self, model: ModelWork) -> float:
        """Return the floating-point operations of this work."""
        return self.images * model.encoder_flops + self.rows * model.row_flops + self.positions * model.position_flops

    def least_bytes(self, model: ModelWork, images_at_once: int) -> float:
        """Return the float32 bytes read when `images_at_once` images share each pass over the weights.

        Each row reads the positions it descends from; beams that share some could read them once.
        """
        return (
            (self.images * model.encoder_bytes + self.image_steps * model.decoder_bytes) / images_at_once
            + self.image_steps * model.cross_bytes
            + self.positions * model.position_bytes
        )


RULED_OUT = -1e8
"""The running score of a closed slot, a beam that is ruled out and a prompt's inner tokens is below this."""


@dataclass
class CountingBackend:
    """A Backend around another that adds up the useful work."""

    backend: Backend
    work: Work = field(default_factory=Work)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode(self, pixel_values: NDArray[np.uint8]) -> Any:
        self.work.images += len(pixel_values)
        return self.backend.encode(pixel_values)

    def step(self, cache: Any, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        useful = inputs.scores > RULED_OUT
        self.work.image_steps += int(useful.any(1).sum())
        self.work.rows += int(useful.sum())
        self.work.positions += int(inputs.ancestry[useful].sum())
        return self.backend.step(cache, inputs)


def count_work(captioner: Captioner, pixels: NDArray[np.uint8], options: DecodeOptions) -> Work:
    """Decode images u8[N,height,width,3] once and return the useful work."""
    counting = CountingBackend(captioner.backend)
    scheduler = Captioner(captioner.bundle, counting).scheduler(captioner.search(options))
    list(scheduler.decode(pixels))
    return counting.work

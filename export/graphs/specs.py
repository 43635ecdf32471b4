"""The three graphs as an exporter sees them: names, dynamic axes, example inputs; knows no exporter."""

from __future__ import annotations

import torch
from transformers import BlipForConditionalGeneration

from engine.bundle.graphs import cache_names
from export.checkpoints.load import encoder_positions


class GraphSpec:
    """What an exporter needs to know of one graph; subclasses give the names, axes and example inputs."""

    def __init__(self, blip: BlipForConditionalGeneration) -> None:
        self.config = blip.config
        text, vision = blip.config.text_config, blip.config.vision_config
        self.layers, self.heads = text.num_hidden_layers, text.num_attention_heads
        self.width = text.hidden_size // self.heads
        self.size = vision.image_size
        self.encoder_positions = encoder_positions(vision)
        self.cache_type = blip.dtype

    def cache_names(self, part: str) -> list[str]:
        return cache_names(self.layers, part)

    def cache_axes(self, part: str, images: str, positions: str | None) -> dict[str, dict[int, str]]:
        axes = {0: images} | ({2: positions} if positions else {})
        return dict.fromkeys(self.cache_names(part), axes)

    def cache(self, images: int, positions: int) -> list[torch.Tensor]:
        shape = (images, self.heads, positions, self.width)
        return [torch.randn(shape, dtype=self.cache_type) for _ in range(2 * self.layers)]

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Names of the inputs in order, and the names of their dynamic axes."""
        raise AssertionError("each graph gives its own")

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Names of the outputs in order, and the names of their dynamic axes."""
        raise AssertionError("each graph gives its own")

    def examples(self) -> dict:
        """Example inputs for tracing: every dynamic axis has its own length, so that none is frozen by accident."""
        raise AssertionError("each graph gives its own")


class EncoderSpec(GraphSpec):
    """encoder.onnx: pixels u8[B,height,width,3] -> cross keys and values."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"pixel_values": {0: "images"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return self.cache_axes("cross", "images", None)

    def examples(self) -> dict:
        return {"pixel_values": torch.randint(0, 256, (2, self.size, self.size, 3), dtype=torch.uint8)}


class DecoderSpec(GraphSpec):
    """decoder.onnx: one step, prefill included."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        rows = {0: "images", 1: "rows"}
        return {
            "input_ids": rows,
            "positions": rows,
            "scores": rows,
            "marked_ids": rows | {2: "marks"},
            "penalties": {},
            "ancestry": rows | {2: "positions"},
            "num_candidates": {},
            **self.cache_axes("cross", "images", None),
            **self.cache_axes("settled", "images", "settled"),
            **self.cache_axes("recent", "images", "recent"),
        }

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        candidates = {0: "images", 1: "candidates"}
        return {
            "candidate_scores": candidates,
            "candidate_ids": candidates,
            **self.cache_axes("extended", "images", "recent + rows"),
        }

    def examples(self) -> dict:
        images, rows, settled, recent = 2, 3, 5, 4
        return {
            "input_ids": torch.randint(1, 9, (images, rows)),
            "positions": torch.full((images, rows), 7),
            "scores": torch.zeros(images, rows),
            "marked_ids": torch.full((images, rows, 2), -1),
            "penalties": torch.ones(2),
            "ancestry": torch.ones(images, rows, settled + recent + rows, dtype=torch.bool),
            "num_candidates": torch.tensor([6]),
            "cross": self.cache(images, self.encoder_positions),
            "settled": self.cache(images, settled),
            "recent": self.cache(images, recent),
        }


class RegroupSpec(GraphSpec):
    """regroup.onnx: recent positions settled, slots and positions kept."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {
            "slots": {0: "kept"},
            "columns": {0: "kept", 1: "kept positions"},
            **self.cache_axes("settled", "slots", "settled"),
            **self.cache_axes("recent", "slots", "recent"),
        }

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return self.cache_axes("regrouped", "kept", "kept positions")

    def examples(self) -> dict:
        return {
            "slots": torch.tensor([0, 2]),
            "columns": torch.zeros(2, 4, dtype=torch.long),
            "settled": self.cache(3, 5),
            "recent": self.cache(3, 2),
        }

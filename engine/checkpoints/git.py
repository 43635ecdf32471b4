"""GIT (Microsoft): names, sizes and settings of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.bundle.manifest import TokenIds
from engine.checkpoints.rules import (
    CLIP,
    CROP,
    ConvertibleRules,
    Settings,
    Sizes,
    check_heads,
    check_numbers,
    check_patches,
    completed,
    linear,
    norm,
    outer_settings,
    processor_rules,
)
from engine.errors import CheckpointError

TEXT: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 1024,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": False,
    "bos_token_id": 101,
    "eos_token_id": 102,
    "pad_token_id": 0,
}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""Settings of config.json and of its vision_config that are read here, with their defaults.

Source: transformers 4.57, GitConfig and GitVisionConfig.
"""


SHAPE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps"),
)
"""Settings of both parts that decide the operations of the graphs."""
SIZES = ("vocab_size", "max_position_embeddings", "image_size", "patch_size", *SHAPE[:4])


class GitRules(ConvertibleRules):
    """GIT with a captioning head (GitForCausalLM), for single images."""

    name = "GIT"
    model_type, architecture = "git", "GitForCausalLM"
    weight_prefixes = ("git.image_encoder.", "git.encoder.")
    tokenizer_class = "BertTokenizer"
    position_table = "git.image_encoder.vision_model.embeddings.position_embedding.weight"
    processor = processor_rules("CLIP", {"shortest_edge": 224}, 3, CLIP, **CROP)

    def check_config(self, raw: Mapping[str, Any], path: Path) -> None:
        """See Rules.check_config. Models of videos add an embedding to the tokens of each of several images."""
        if raw.get("vision_config") is not None and not isinstance(raw["vision_config"], dict):
            raise CheckpointError(f"{path}: vision_config is not a JSON object")
        if (frames := raw.get("num_image_with_embedding")) is not None:
            raise CheckpointError(
                f"{path} describes a GIT model of videos (num_image_with_embedding is {frames!r}), which is not "
                "supported: use one of single images, such as microsoft/git-base-coco"
            )
        if not all(type(value) is int for value in (completed(raw, TEXT)[name] for name in IDS)):
            listed = ", ".join(f"{name}={raw.get(name)!r}" for name in IDS)
            raise CheckpointError(f"{path}: special ids that are not one number each are not supported ({listed})")

        for part, settings in (
            ("config.json", completed(raw, TEXT)),
            ("vision_config", completed(raw.get("vision_config"), VISION)),
        ):
            check_numbers({name: settings[name] for name in SIZES if name in settings}, path, part, lowest=1)
            check_heads(settings["hidden_size"], settings["num_attention_heads"], path, part)

    def settings(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> list[Settings]:
        """See Rules.settings."""
        return outer_settings(raw, generation)

    def complete(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
        """See Rules.complete."""
        (source,) = self.settings(raw, generation)
        ids = {name: source.values[name] for name in IDS if source.values.get(name) is not None}
        return {**raw, **ids}

    def sizes(self, raw: Mapping[str, Any]) -> Sizes:
        """See Rules.sizes. The image has a token per patch, and one for the class token."""
        text = completed(raw, TEXT)
        vision = completed(raw.get("vision_config"), VISION)
        return Sizes(
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            head_width=text["hidden_size"] // text["num_attention_heads"],
            vocab_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
            encoder_positions=(vision["image_size"] // vision["patch_size"]) ** 2 + 1,
            image_size=vision["image_size"],
            tokens=TokenIds(bos=text["bos_token_id"], eos=text["eos_token_id"], pad=text["pad_token_id"]),
        )

    def shape(self, raw: Mapping[str, Any]) -> dict[str, int | float | str]:
        """See ConvertibleRules.shape."""
        text, vision = completed(raw, TEXT), completed(raw.get("vision_config"), VISION)
        shape = {f"text.{name}": text[name] for name in SHAPE}
        return shape | {f"vision.{name}": vision[name] for name in (*SHAPE, "patch_size")}

    def weight_shapes(self, raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """See ConvertibleRules.weight_shapes. The names are those of GitForCausalLM in transformers 4.57."""
        text, vision = completed(raw, TEXT), completed(raw.get("vision_config"), VISION)
        width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
        tower = "git.image_encoder.vision_model"
        shapes: dict[str, tuple[int, ...]] = {
            f"{tower}.embeddings.class_embedding": (width,),
            self.position_table: (self.sizes(raw).encoder_positions, width),
            f"{tower}.embeddings.patch_embedding.weight": (width, 3, patch, patch),
            **norm(f"{tower}.pre_layrnorm", width),
            **norm(f"{tower}.post_layernorm", width),
        }
        for i in range(vision["num_hidden_layers"]):
            layer = f"{tower}.encoder.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear(f"{layer}.self_attn.{part}", width, width)
            shapes |= linear(f"{layer}.mlp.fc1", inner, width) | linear(f"{layer}.mlp.fc2", width, inner)
            shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        vision_width, width, inner, words = width, text["hidden_size"], text["intermediate_size"], text["vocab_size"]
        projection = "git.visual_projection.visual_projection"
        shapes |= {
            "git.embeddings.word_embeddings.weight": (words, width),
            "git.embeddings.position_embeddings.weight": (text["max_position_embeddings"], width),
            **norm("git.embeddings.LayerNorm", width),
            **linear(f"{projection}.0", width, vision_width),
            **norm(f"{projection}.1", width),
            **linear("output", words, width),
        }
        for i in range(text["num_hidden_layers"]):
            layer = f"git.encoder.layer.{i}"
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                shapes |= linear(f"{layer}.attention.{part}", width, width)
            shapes |= norm(f"{layer}.attention.output.LayerNorm", width) | norm(f"{layer}.output.LayerNorm", width)
            shapes |= linear(f"{layer}.intermediate.dense", inner, width)
            shapes |= linear(f"{layer}.output.dense", width, inner)
        return shapes

    def resized(self, raw: Mapping[str, Any], image_size: int) -> dict[str, Any]:
        """See ConvertibleRules.resized."""
        vision = completed(raw.get("vision_config"), VISION)
        check_patches(image_size, vision["patch_size"])
        return {**raw, "vision_config": vision | {"image_size": image_size}}

    def tied(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """See Rules.tied."""
        is_tied = completed(raw, TEXT)["tie_word_embeddings"]
        return {"output.weight": "git.embeddings.word_embeddings.weight"} if is_tied else {}

    def unsupported(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Rules.unsupported."""
        kind = completed(raw, TEXT)["position_embedding_type"]
        return {} if kind == "absolute" else {"position_embedding_type": kind}

"""Florence-2 (Microsoft): names, sizes and settings of its checkpoints, and the tasks that are captions.

The first checkpoints (microsoft/Florence-2-base) have names of their own and ask for custom code. Those of the class in
transformers (florence-community/Florence-2-base) are the same models. Their config.json has no image size: it is 768
px, or `image_size` in config.json, which transformers ignores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from engine.bundle.manifest import TokenIds
from engine.checkpoints.rules import (
    ConvertibleRules,
    Settings,
    Sizes,
    check_heads,
    check_numbers,
    completed,
    linear,
    norm,
    outer_settings,
    processor_rules,
)
from engine.checkpoints.vision_encoder_decoder import POSITION_OFFSET
from engine.errors import CheckpointError

IMAGE_SIZE = 768
TEXT: dict[str, Any] = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "d_model": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "activation_function": "gelu",
    "scale_embedding": False,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "depths": [1, 1, 9, 1],
    "patch_size": [7, 3, 3, 3],
    "patch_stride": [4, 2, 2, 2],
    "patch_padding": [3, 1, 1, 1],
    "patch_prenorm": [False, True, True, True],
    "embed_dim": [128, 256, 512, 1024],
    "num_heads": [4, 8, 16, 32],
    "num_groups": [4, 8, 16, 32],
    "window_size": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "activation_function": "gelu",
    "projection_dim": 1024,
    "max_position_embeddings": 50,
}
"""Settings of text_config (BART) and vision_config (DaViT) that are read here, with their defaults.

Source: transformers 4.57, BartConfig and Florence2VisionConfig.
"""
STAGES = tuple(name for name, value in VISION.items() if isinstance(value, list))
"""Settings of DaViT with one value per stage."""
FIRST_TEXT = "florence2_language"
"""`model_type` of text_config in the first checkpoints."""
ENDINGS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
SIZES = (
    *("vocab_size", "max_position_embeddings", "d_model", "encoder_layers", "encoder_ffn_dim"),
    *("encoder_attention_heads", "decoder_layers", "decoder_ffn_dim", "decoder_attention_heads"),
)

RENAMED = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^model\.(?=vision_tower\.|multi_modal_projector\.|language_model\.)", ""),  # a wrapper's, or transformers'
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "language_model."),
        (r"^(vision_tower\.convs\.\d+\.)proj\.", r"\1conv."),
        (r"\.(conv[12])\.fn\.dw\.", r".\1."),
        (r"\.(?:window|channel)_attn\.norm\.", ".norm1."),
        (r"\.ffn\.norm\.", ".norm2."),
        (r"\.(window_attn|channel_attn)\.fn\.", r".\1."),
        (r"\.ffn\.fn\.net\.", ".ffn."),
        (r"^image_projection$", "multi_modal_projector.image_projection.weight"),
        (r"^image_pos_embed\.", "multi_modal_projector.image_position_embed."),
        (r"^(image_proj_norm|visual_temporal_embed)\.", r"multi_modal_projector.\1."),
        (r"^(?=vision_tower\.|multi_modal_projector\.|language_model\.)", "model."),
    )
)
"""Patterns of the first checkpoints' names, applied in this order, and what transformers has instead.

Source: transformers' conversion script (models/florence2/convert_florence2_original_pytorch_to_hf.py).
"""
PROJECTION = "image_projection"
"""A dense layer that the first checkpoints store as [inputs,outputs]."""
PLACES = 1000
"""Steps of the coordinates that location tokens stand for."""


def _pairs(*names: str) -> list[str]:
    return [f"<{mark}{name}>" for name in names for mark in ("", "/")]


class Florence2Rules(ConvertibleRules):
    """Florence-2 with a language model head (Florence2ForConditionalGeneration)."""

    name = "Florence-2"
    model_type, architecture = "florence2", "Florence2ForConditionalGeneration"
    weight_prefixes = ("model.vision_tower.", "model.language_model.decoder.layers.")
    tokenizer_class = "BartTokenizer"
    has_native_code = True
    position_table = ""  # nothing to resize: rows and columns have embeddings of their own
    processor = processor_rules(
        "CLIP",
        {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        3,
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        do_center_crop=False,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    tasks: ClassVar[Mapping[str, str]] = {
        "caption": "What does the image describe?",
        "detailed-caption": "Describe in detail what is shown in the image.",
        "more-detailed-caption": "Describe with a paragraph what is shown in the image.",
    }
    task_ends = ("<s>", "</s>")
    special_tokens = (
        *_pairs("od", "ocr"),
        *(f"<loc_{place}>" for place in range(PLACES)),
        *_pairs("cap", "ncap", "dcap", "grounding", "seg"),
        "<sep>",
        *_pairs("region_cap", "region_to_desciption", "proposal", "poly"),  # spelled so
        "<and>",
    )

    def check_config(self, raw: Mapping[str, Any], path: Path) -> None:
        """See Rules.check_config."""
        for part in ("text_config", "vision_config"):
            if not isinstance(raw.get(part, {}), dict):
                raise CheckpointError(f"{path}: {part} is not a JSON object")
        kind = raw["text_config"].get("model_type")
        if kind != "bart":
            raise CheckpointError(f"{path}: text_config is of a {str(kind)[:40]!r} model, but Florence-2's is BART")
        text, vision = _text(raw), _vision(raw)
        missing = [name for name in ENDINGS if type(raw.get(name)) is not int]
        if missing:
            raise CheckpointError(f"{path}: {missing[0]} is {raw.get(missing[0])!r}, but `generate` needs one id")
        check_numbers({name: text[name] for name in SIZES}, path, "text_config", lowest=1)
        check_heads(text["d_model"], text["encoder_attention_heads"], path, "text_config")
        check_heads(text["d_model"], text["decoder_attention_heads"], path, "text_config")
        stages = [vision[name] for name in STAGES]
        if any(not isinstance(stage, list) or len(stage) != len(stages[0]) or not stage for stage in stages):
            raise CheckpointError(f"{path}: {', '.join(STAGES)} of vision_config do not have one value per stage each")
        for number, values in enumerate(zip(*stages, strict=True)):
            stage = dict(zip(STAGES, values, strict=True))
            padding = {"patch_padding": stage.pop("patch_padding")}
            del stage["patch_prenorm"]
            check_numbers(stage, path, f"vision_config (stage {number})", lowest=1)
            check_numbers(padding, path, f"vision_config (stage {number})", lowest=0)
            check_heads(stage["embed_dim"], stage["num_heads"], path, f"vision_config (stage {number})")
            check_heads(stage["embed_dim"], stage["num_groups"], path, f"vision_config (stage {number})")
        names = ("window_size", "projection_dim", "max_position_embeddings")
        check_numbers({name: vision[name] for name in names}, path, "vision_config", lowest=1)
        check_numbers({"image_size": raw["image_size"]}, path, "config.json", lowest=1)
        if vision["projection_dim"] != text["d_model"]:
            raise CheckpointError(
                f"{path}: the width of the image's tokens ({vision['projection_dim']}) is not that of the text "
                f"({text['d_model']})"
            )
        _check_image(raw, str(path))

    def complete(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
        """See Rules.complete. Settings of the first checkpoints get the names of transformers' class."""
        if not all(isinstance(raw.get(part, {}), dict) for part in ("text_config", "vision_config")):
            return dict(raw)
        vision = dict(raw.get("vision_config", {}))
        if "dim_embed" in vision:
            vision["embed_dim"] = vision.pop("dim_embed")
            for name, part, key in (
                ("max_position_embeddings", "image_pos_embed", "max_pos_embeddings"),
                ("max_temporal_embeddings", "visual_temporal_embedding", "max_temporal_embeddings"),
            ):
                inner = vision.pop(part, None)
                if isinstance(inner, dict) and key in inner:
                    vision[name] = inner[key]
            vision.pop("model_type", None)
        text = {"model_type": "bart", **raw.get("text_config", {})}
        if text["model_type"] == FIRST_TEXT:
            text["model_type"] = "bart"
        settings = self.settings(raw, generation)
        ids = {
            name: next((s.values[name] for s in settings if s.values.get(name) is not None), None) for name in ENDINGS
        }
        vocabulary = completed(text, TEXT)["vocab_size"]
        image = {
            "image_token_id": raw.get("image_token_id", vocabulary - 1),
            "image_size": raw.get("image_size", IMAGE_SIZE),
        }
        kept = {name: value for name, value in raw.items() if name != "auto_map"}
        return {**kept, **ids, **image, "text_config": text, "vision_config": vision}

    def settings(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> list[Settings]:
        """See Rules.settings. Without generation_config.json, Hugging Face reads both levels of config.json."""
        found = outer_settings(raw, generation)
        inner = raw.get("text_config")
        ids = {name: value for name, value in TEXT.items() if name.endswith("_token_id")}
        text = Settings("text_config of config.json", {**ids, **(inner if isinstance(inner, dict) else {})})
        return [*found, text] if found[0].values is raw else found

    def sizes(self, raw: Mapping[str, Any]) -> Sizes:
        """See Rules.sizes. The image has a token per patch of the last stage, and one for their mean."""
        text = _text(raw)
        return Sizes(
            num_layers=text["decoder_layers"],
            num_heads=text["decoder_attention_heads"],
            head_width=text["d_model"] // text["decoder_attention_heads"],
            vocab_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
            encoder_positions=sides(raw)[-1] ** 2 + 1,
            image_size=raw["image_size"],
            tokens=TokenIds(*(raw[name] for name in ENDINGS)),
            has_tasks=True,
        )

    def current_name(self, name: str) -> tuple[str, bool]:
        """See Rules.current_name."""
        new = name
        for pattern, replacement in RENAMED:
            new = pattern.sub(replacement, new)
        return new, name == PROJECTION

    def unused(self, raw: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002
        """See Rules.unused."""
        return ("model.language_model.final_logits_bias",)

    def shape(self, raw: Mapping[str, Any]) -> dict[str, int | float | str]:
        """See ConvertibleRules.shape. The image size is one of them: it decides how windows are padded."""
        text, vision = _text(raw), _vision(raw)
        names = [*SIZES[2:], "activation_function", "scale_embedding"]
        shape = {f"text.{name}": text[name] for name in names}
        names = [name for name in VISION if name != "max_position_embeddings"]
        joined = {name: " ".join(map(str, vision[name])) if name in STAGES else vision[name] for name in names}
        positions = {"vision.max_position_embeddings": vision["max_position_embeddings"]}
        return (
            shape
            | {f"vision.{name}": value for name, value in joined.items()}
            | positions
            | {"image_size": raw["image_size"]}
        )

    def weight_shapes(self, raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """See ConvertibleRules.weight_shapes. The names are those of transformers 4.57."""
        text, vision = _text(raw), _vision(raw)
        width, words, positions = text["d_model"], text["vocab_size"], text["max_position_embeddings"]
        language, projector = "model.language_model", "model.multi_modal_projector"
        last = vision["embed_dim"][-1]
        table = f"{projector}.image_position_embed"
        shapes: dict[str, tuple[int, ...]] = {
            **_tower_shapes(vision),
            f"{projector}.image_projection.weight": (width, last),
            **norm(f"{projector}.image_proj_norm", width),
            f"{table}.row_embeddings.weight": (vision["max_position_embeddings"], last // 2),
            f"{table}.column_embeddings.weight": (vision["max_position_embeddings"], last - last // 2),
            **dict.fromkeys((f"{language}.shared.weight", *self.tied(raw)), (words, width)),
        }
        for side in ("encoder", "decoder"):
            body, inner = f"{language}.{side}", text[f"{side}_ffn_dim"]
            shapes[f"{body}.embed_positions.weight"] = (positions + POSITION_OFFSET, width)
            shapes |= norm(f"{body}.layernorm_embedding", width)
            for i in range(text[f"{side}_layers"]):
                layer = f"{body}.layers.{i}"
                for attention in ("self_attn", "encoder_attn")[: 1 + (side == "decoder")]:
                    for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                        shapes |= linear(f"{layer}.{attention}.{part}", width, width)
                    shapes |= norm(f"{layer}.{attention}_layer_norm", width)
                shapes |= linear(f"{layer}.fc1", inner, width) | linear(f"{layer}.fc2", width, inner)
                shapes |= norm(f"{layer}.final_layer_norm", width)
        return shapes

    def resized(self, raw: Mapping[str, Any], image_size: int) -> dict[str, Any]:
        """See ConvertibleRules.resized. Smaller images use fewer of the embeddings of rows and columns."""
        _check_image(resized := {**raw, "image_size": image_size}, f"--image-size {image_size}")
        return resized

    def tied(self, raw: Mapping[str, Any]) -> dict[str, str]:  # noqa: ARG002
        """See Rules.tied."""
        language = "model.language_model"
        copies = (
            "lm_head.weight",
            f"{language}.encoder.embed_tokens.weight",
            f"{language}.decoder.embed_tokens.weight",
        )
        return dict.fromkeys(copies, f"{language}.shared.weight")

    def unsupported(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Rules.unsupported."""
        settings = {"tie_word_embeddings": raw, "text_config.tie_word_embeddings": raw["text_config"]}
        return {name: False for name, values in settings.items() if values.get("tie_word_embeddings") is False}


def _text(raw: Mapping[str, Any]) -> dict[str, Any]:
    return completed(raw.get("text_config"), TEXT)


def _vision(raw: Mapping[str, Any]) -> dict[str, Any]:
    return completed(raw.get("vision_config"), VISION)


def sides(raw: Mapping[str, Any]) -> list[int]:
    """Return the patches per side of the image in each stage of DaViT, whose convolutions overlap."""
    vision, side, found = _vision(raw), raw["image_size"], []
    for size, stride, padding in zip(*(vision[f"patch_{name}"] for name in ("size", "stride", "padding")), strict=True):
        side = max(0, math.floor((side + 2 * padding - size) / stride) + 1)
        found.append(side)
    return found


def _check_image(raw: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError if images have no tokens, or more than the model has positions for."""
    side, most = sides(raw)[-1], _vision(raw)["max_position_embeddings"]
    if not 0 < side <= most or side**2 + 1 >= _text(raw)["max_position_embeddings"]:
        raise CheckpointError(
            f"{where}: images of {raw['image_size']} px give {side} x {side} tokens, for which the model has no "
            "position embeddings: choose another size"
        )


def _tower_shapes(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of DaViT's weights by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    widths = vision["embed_dim"]
    for stage, (width, depth, patch) in enumerate(zip(widths, vision["depths"], vision["patch_size"], strict=True)):
        before = widths[stage - 1] if stage else 3
        conv = f"model.vision_tower.convs.{stage}"
        shapes |= {f"{conv}.conv.weight": (width, before, patch, patch), f"{conv}.conv.bias": (width,)}
        shapes |= norm(f"{conv}.norm", before if vision["patch_prenorm"][stage] else width)
        inner = int(width * vision["mlp_ratio"])
        for i in range(depth):
            for block, attention in (("spatial_block", "window_attn"), ("channel_block", "channel_attn")):
                part = f"model.vision_tower.blocks.{stage}.{i}.{block}"
                for name in ("conv1", "conv2"):
                    shapes |= {f"{part}.{name}.weight": (width, 1, 3, 3), f"{part}.{name}.bias": (width,)}
                shapes |= norm(f"{part}.norm1", width) | norm(f"{part}.norm2", width)
                shapes |= linear(f"{part}.{attention}.qkv", 3 * width, width, bias=vision["qkv_bias"])
                shapes |= linear(f"{part}.{attention}.proj", width, width)
                shapes |= linear(f"{part}.ffn.fc1", inner, width) | linear(f"{part}.ffn.fc2", width, inner)
    return shapes

"""GPT-2 with an image prefix: a layout of this project for checkpoints such as ClipCap's and MedICap's.

No class of transformers has this shape, and published checkpoints come with their own code, which is never run. So
docs/checkpoints.md describes a config.json and names of weights: those of CLIP in transformers, of ClipCap's `.pt`
files, and of GPT2LMHeadModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.bundle.manifest import TokenIds
from engine.checkpoints.git import GitRules
from engine.checkpoints.rules import (
    ProcessorRules,
    Rules,
    Settings,
    Sizes,
    check_heads,
    check_numbers,
    check_patches,
    completed,
    outer_settings,
)
from engine.checkpoints.vision_encoder_decoder import DECODERS, ENDINGS, VIT, only_one, part_of
from engine.checkpoints.vision_encoder_decoder import ENCODERS as VISION_ENCODERS
from engine.errors import CheckpointError

CLIP_ENCODER = "clip_vision_model"
ENCODERS: dict[str, dict[str, Any]] = {
    CLIP_ENCODER: {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "projection_dim": 512,
    },
    "vit": VISION_ENCODERS["vit"],
}
"""Settings of image encoders that are read here, with their defaults, by `model_type`.

Source: transformers 4.57, CLIPVisionConfig and ViTConfig.
"""
PROCESSORS = {CLIP_ENCODER: GitRules.processor, "vit": VIT}
"""Image processors: the one of each encoder. A checkpoint may name either."""
MAPPING_HEADS = 8
"""Attention heads of ClipCap's mapping network, which has no setting for them."""
MAPPINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"prefix_length": 10, "normalize_prefix": False},
    "transformer": {"prefix_length": 10, "normalize_prefix": False, "clip_length": 10, "num_layers": 8},
}
"""Mapping networks by `type`, and their other settings with ClipCap's defaults.

`linear` is a layer norm and a dense layer for each hidden state of the image encoder (MedICap). `mlp` and
`transformer` map CLIP's image embedding, one vector, to the prefix (ClipCap).
"""


class ImagePrefixRules(Rules):
    """An image encoder and a mapping network, whose output stands before the text in GPT-2's self-attention.

    It does not convert without torch: no public checkpoint has a layout that could be known by name.
    """

    name = "GPT-2 image-prefix"
    model_type, architecture = "image-prefix-gpt2", "ImagePrefixGPT2"
    weight_prefixes = ("vision_model.", "gpt.")
    tokenizer_class = "GPT2Tokenizer"
    processor = GitRules.processor

    def check_config(self, raw: Mapping[str, Any], path: Path) -> None:
        """See Rules.check_config."""
        for part in ("encoder", "decoder", "mapping"):
            if not isinstance(raw.get(part), dict):
                raise CheckpointError(f"{path}: {part} is not a JSON object: see docs/checkpoints.md")
        encoder, decoder = (raw[part].get("model_type") for part in ("encoder", "decoder"))
        mapping = raw["mapping"].get("type")
        for part, value, known in (
            ("encoder.model_type", encoder, ENCODERS),
            ("decoder.model_type", decoder, ("gpt2",)),
            ("mapping.type", mapping, MAPPINGS),
        ):
            if not isinstance(value, str) or value not in known:
                raise CheckpointError(
                    f"{path}: {part} is {value!r:.40}, but it must be {' or '.join(map(repr, known))}"
                )
        if mapping != "linear" and encoder != CLIP_ENCODER:
            raise CheckpointError(
                f"{path}: the mapping {mapping!r} needs CLIP's image embedding, but the encoder is {encoder!r}: use "
                f"the mapping 'linear' or the encoder {CLIP_ENCODER!r}"
            )
        if raw["decoder"].get("add_cross_attention"):
            raise CheckpointError(
                f"{path}: decoder.add_cross_attention is true, but with a prefix the decoder attends to no encoder: "
                "set it to false, or use a VisionEncoderDecoder checkpoint"
            )
        self._check_sizes(raw, path)
        for name in ENDINGS:
            if type(raw[name]) is not int and not (name == ENDINGS[0] and raw[name] is None):
                raise CheckpointError(
                    f"{path}: {name} is {raw[name]!r:.40}, but `generate` needs one id: set it in "
                    "generation_config.json"
                )

    def _check_sizes(self, raw: Mapping[str, Any], path: Path) -> None:
        vision, text, mapping = _encoder(raw), part_of(raw, "decoder"), _mapping(raw)
        names = set(ENCODERS[vision["model_type"]]) & set(ENCODERS[CLIP_ENCODER])
        check_numbers({name: vision[name] for name in sorted(names)}, path, "encoder", lowest=1)
        rules = DECODERS["gpt2"]
        check_numbers({name: text[name] for name in (*rules.sizes, "vocab_size")}, path, "decoder", lowest=1)
        numbers = {name: mapping[name] for name in MAPPINGS[mapping["type"]] if name != "normalize_prefix"}
        check_numbers(numbers, path, "mapping", lowest=1)
        if type(mapping.get("normalize_prefix", False)) is not bool:
            raise CheckpointError(f"{path}: mapping.normalize_prefix is not true or false: change it")
        check_heads(vision["hidden_size"], vision["num_attention_heads"], path, "encoder")
        check_heads(text["n_embd"], text["n_head"], path, "decoder")
        if mapping["type"] == "transformer":
            check_heads(text["n_embd"], MAPPING_HEADS, path, "decoder")
        check_patches(vision["image_size"], vision["patch_size"])
        if (length := _prefix_length(raw)) >= text["n_positions"]:
            raise CheckpointError(
                f"{path}: the image prefix takes {length} of GPT-2's {text['n_positions']} positions, so no caption "
                "fits: use a larger n_positions or a smaller prefix"
            )

    def settings(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> list[Settings]:
        """See Rules.settings."""
        return outer_settings(raw, generation)

    def complete(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
        """See Rules.complete. Captions of a checkpoint without decoder_start_token_id start after the prefix."""
        (source,) = self.settings(raw, generation)
        inner = raw["decoder"] if isinstance(raw.get("decoder"), dict) else {}
        defaults = {name: inner.get(name) for name in ENDINGS[1:]} | {ENDINGS[0]: None}
        start, end, pad = (
            next((one for one in map(only_one, values) if one is not None), None)
            for values in ((source.values.get(name), raw.get(name), defaults[name]) for name in ENDINGS)
        )
        end = DECODERS["gpt2"].ids["eos_token_id"] if end is None else end
        return {**raw, **dict(zip(ENDINGS, (start, end, end if pad is None else pad), strict=True))}

    def sizes(self, raw: Mapping[str, Any]) -> Sizes:
        """See Rules.sizes.

        Without a start token, the last position of the prefix takes its place: `generate` counts it neither as a token
        nor for bans and penalties. It has an id of its own after the vocabulary, which no caption can contain again.
        """
        text, vision, length = part_of(raw, "decoder"), _encoder(raw), _prefix_length(raw)
        start, words = raw.get(ENDINGS[0]), text["vocab_size"]
        return Sizes(
            num_layers=text["n_layer"],
            num_heads=text["n_head"],
            head_width=text["n_embd"] // text["n_head"],
            vocab_size=words + (start is None),
            max_positions=text["n_positions"] - length + (start is None),
            encoder_positions=length,
            image_size=vision["image_size"],
            tokens=TokenIds(words if start is None else start, *(raw[name] for name in ENDINGS[1:])),
        )

    def tied(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """See Rules.tied."""
        head, words = DECODERS["gpt2"].head
        return {f"gpt.{head}": f"gpt.{words}"} if raw["decoder"].get("tie_word_embeddings", True) else {}

    def unused(self, raw: Mapping[str, Any]) -> tuple[str, ...]:
        """See Rules.unused."""
        is_clip_alone = raw["mapping"]["type"] == "linear" and raw["encoder"]["model_type"] == CLIP_ENCODER
        return ("vision_model.post_layernorm.",) if is_clip_alone else ()

    def unsupported(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Rules.unsupported."""
        text, neutral = raw["decoder"], DECODERS["gpt2"].neutral
        found = {f"decoder.{name}": text[name] for name, value in neutral.items() if text.get(name, value) != value}
        mapping = raw["mapping"]
        known = {"type", *MAPPINGS[mapping["type"]]}
        return found | {f"mapping.{name}": value for name, value in mapping.items() if name not in known}

    def processor_for(self, kind: str | None, raw: Mapping[str, Any]) -> ProcessorRules | None:
        """See Rules.processor_for."""
        if kind is None:
            return PROCESSORS[raw["encoder"]["model_type"]]
        return next((rules for rules in PROCESSORS.values() if kind.startswith(rules.prefix)), None)


def _encoder(raw: Mapping[str, Any]) -> dict[str, Any]:
    return completed(raw["encoder"], ENCODERS[raw["encoder"]["model_type"]])


def _mapping(raw: Mapping[str, Any]) -> dict[str, Any]:
    return completed(raw["mapping"], MAPPINGS[raw["mapping"]["type"]])


def _prefix_length(raw: Mapping[str, Any]) -> int:
    """Return the number of positions of the image: of the mapping network, or of the encoder with its class token."""
    vision = _encoder(raw)
    length: int = _mapping(raw).get("prefix_length", (vision["image_size"] // vision["patch_size"]) ** 2 + 1)
    return length

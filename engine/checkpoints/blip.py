"""BLIP (Salesforce, LAVIS): names, sizes and settings of its checkpoints, and the authors' own layout of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.bundle.manifest import TokenIds, demo_bundle
from engine.checkpoints.int8 import Residual
from engine.checkpoints.rules import (
    CLIP,
    ConvertibleRules,
    Settings,
    Sizes,
    check_heads,
    check_numbers,
    check_patches,
    completed,
    linear,
    norm,
    processor_rules,
)
from engine.errors import CheckpointError

HEAD, WORDS = "text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"
BIAS = "text_decoder.cls.predictions.decoder.bias"
TIED = {HEAD: WORDS, BIAS: "text_decoder.cls.predictions.bias"}
"""Names of one tensor: the bias always, the words if tie_word_embeddings is set, as in every published checkpoint."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "bos_token_id": 30522,
        "pad_token_id": 0,
        "sep_token_id": 102,
        "is_decoder": True,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 384,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    },
}
"""Settings of config.json that are read here, with their defaults.

Source: transformers 4.57, BlipTextConfig and BlipVisionConfig.
"""


SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "max_position_embeddings", "image_size", "patch_size"),
)
TOKENS = ("bos_token_id", "pad_token_id", "sep_token_id")
ALIKE = ("hidden_act", "layer_norm_eps")


def _part(raw: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return a part of config.json, completed with the defaults."""
    return completed(raw.get(part), DEFAULTS[part])


class Original(NamedTuple):
    """A checkpoint in the authors' own layout, as one in Hugging Face's.

    `config` is the content of config.json, `names` maps the names of weights in the file to Hugging Face's, and `files`
    are the texts of further files by name, such as the settings of the image processor.
    """

    config: dict[str, Any]
    names: dict[str, str]
    files: dict[str, str]


class BlipRules(ConvertibleRules):
    """BLIP with a captioning head (BlipForConditionalGeneration)."""

    name = "BLIP"
    model_type, architecture = "blip", "BlipForConditionalGeneration"
    weight_prefixes = ("vision_model.", "text_decoder.")
    other_models = {  # noqa: RUF012
        "itm_head.": "an image-text matching (retrieval) checkpoint",
        "text_encoder.": "a question answering or retrieval checkpoint",
        "text_projection.": "a retrieval checkpoint",
    }
    tokenizer_class = "BertTokenizer"
    position_table = "vision_model.embeddings.position_embedding"
    processor = processor_rules("Blip", {"height": 384, "width": 384}, 3, CLIP)  # in transformers 4.57 and 5

    def check_config(self, raw: Mapping[str, Any], path: Path) -> None:
        """See Rules.check_config."""
        for part in DEFAULTS:
            if raw.get(part) is not None and not isinstance(raw[part], dict):
                raise CheckpointError(f"{path}: {part} is not a JSON object")
            settings = _part(raw, part)
            check_numbers({name: settings[name] for name in SIZES if name in settings}, path, part, lowest=1)
            check_numbers({name: settings[name] for name in TOKENS if name in settings}, path, part, lowest=0)
            check_heads(settings["hidden_size"], settings["num_attention_heads"], path, part)
        if not _part(raw, "text_config")["is_decoder"]:
            raise CheckpointError(
                f"{path}: text_config.is_decoder is false, so the text model cannot attend to an image"
            )

    def sizes(self, raw: Mapping[str, Any]) -> Sizes:
        """See Rules.sizes. The encoder has a position per patch, and one for the class token."""
        text, vision = _part(raw, "text_config"), _part(raw, "vision_config")
        return Sizes(
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            head_width=text["hidden_size"] // text["num_attention_heads"],
            vocab_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
            encoder_positions=(vision["image_size"] // vision["patch_size"]) ** 2 + 1,
            image_size=vision["image_size"],
            tokens=TokenIds(bos=text["bos_token_id"], eos=text["sep_token_id"], pad=text["pad_token_id"]),
        )

    def shape(self, raw: Mapping[str, Any]) -> dict[str, int | float | str]:
        """See ConvertibleRules.shape."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", *ALIKE)
        shape = {f"text.{name}": _part(raw, "text_config")[name] for name in names}
        return shape | {f"vision.{name}": _part(raw, "vision_config")[name] for name in (*names, "patch_size")}

    def weight_shapes(self, raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """See ConvertibleRules.weight_shapes. Names: BlipForConditionalGeneration in transformers 4.57."""
        text, vision = _part(raw, "text_config"), _part(raw, "vision_config")
        width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
        shapes: dict[str, tuple[int, ...]] = {
            "vision_model.embeddings.class_embedding": (1, 1, width),
            self.position_table: (1, self.sizes(raw).encoder_positions, width),
            "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
            "vision_model.embeddings.patch_embedding.bias": (width,),
            **norm("vision_model.post_layernorm", width),
        }
        for i in range(vision["num_hidden_layers"]):
            layer = f"vision_model.encoder.layers.{i}"
            shapes |= linear(f"{layer}.self_attn.qkv", 3 * width, width)
            shapes |= linear(f"{layer}.self_attn.projection", width, width)
            shapes |= linear(f"{layer}.mlp.fc1", inner, width) | linear(f"{layer}.mlp.fc2", width, inner)
            shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        encoder_width, width, inner = width, text["hidden_size"], text["intermediate_size"]
        bert, head, words = "text_decoder.bert", "text_decoder.cls.predictions", text["vocab_size"]
        shapes |= {
            WORDS: (words, width),
            f"{bert}.embeddings.position_embeddings.weight": (text["max_position_embeddings"], width),
            **norm(f"{bert}.embeddings.LayerNorm", width),
            **linear(f"{head}.transform.dense", width, width),
            **norm(f"{head}.transform.LayerNorm", width),
            **{HEAD: (words, width), BIAS: (words,), TIED[BIAS]: (words,)},
        }
        for i in range(text["num_hidden_layers"]):
            layer = f"{bert}.encoder.layer.{i}"
            for attention, source in (("attention", width), ("crossattention", encoder_width)):
                shapes |= linear(f"{layer}.{attention}.self.query", width, width)
                shapes |= linear(f"{layer}.{attention}.self.key", width, source)
                shapes |= linear(f"{layer}.{attention}.self.value", width, source)
                shapes |= linear(f"{layer}.{attention}.output.dense", width, width)
                shapes |= norm(f"{layer}.{attention}.output.LayerNorm", width)
            shapes |= linear(f"{layer}.intermediate.dense", inner, width)
            shapes |= linear(f"{layer}.output.dense", width, inner) | norm(f"{layer}.output.LayerNorm", width)
        return shapes

    def residual(self, raw: Mapping[str, Any]) -> Residual:
        """See Rules.residual. The last layer norm is read by every cross-attention of the decoder."""
        text, vision = _part(raw, "text_config"), _part(raw, "vision_config")
        patches, layers = "vision_model.embeddings.patch_embedding", range(vision["num_hidden_layers"])
        attention = [f"vision_model.encoder.layers.{i}.self_attn" for i in layers]
        mlp = [f"vision_model.encoder.layers.{i}.mlp" for i in layers]
        norms = [f"vision_model.encoder.layers.{i}.layer_norm" for i in layers]
        cross = [
            f"text_decoder.bert.encoder.layer.{i}.crossattention.self.{kind}"
            for i in range(text["num_hidden_layers"])
            for kind in ("key", "value")
        ]
        return Residual(
            tables=("vision_model.embeddings.class_embedding", self.position_table),
            outputs=(patches, *(f"{one}.projection" for one in attention), *(f"{one}.fc2" for one in mlp)),
            readers={
                **{f"{norm}1": (f"{one}.qkv",) for norm, one in zip(norms, attention, strict=True)},
                **{f"{norm}2": (f"{one}.fc1",) for norm, one in zip(norms, mlp, strict=True)},
                "vision_model.post_layernorm": tuple(cross),
            },
            values={f"{one}.projection": f"{one}.qkv" for one in attention},
            head=vision["hidden_size"] // vision["num_attention_heads"],
        )

    def resized(self, raw: Mapping[str, Any], image_size: int) -> dict[str, Any]:
        """See ConvertibleRules.resized."""
        vision = _part(raw, "vision_config")
        check_patches(image_size, vision["patch_size"])
        return {**raw, "vision_config": vision | {"image_size": image_size}}

    def tied(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """See Rules.tied."""
        return TIED if _part(raw, "text_config")["tie_word_embeddings"] else {BIAS: TIED[BIAS]}

    def unsupported(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Rules.unsupported."""
        kind = _part(raw, "text_config")["position_embedding_type"]
        return {} if kind == "absolute" else {"position_embedding_type": kind}

    def settings(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> list[Settings]:  # noqa: ARG002
        """See Rules.settings. `generate` calls the text decoder's, which does not see generation_config.json."""
        return [Settings("text_config of config.json", raw.get("text_config") or {})]

    def convert_original(self, shapes: Mapping[str, tuple[int, ...]], file: Path) -> Original:
        """Return how a checkpoint in the authors' own layout, with weights of these shapes, becomes Hugging Face's.

        The tokenizer is bert-base-uncased with [DEC] and [ENC], which the demo has too. Raises CheckpointError if the
        weights are of another task, or have other sizes than the published models.
        """
        names = {name: _renamed(name) for name in shapes}
        renamed = {names[name]: shape for name, shape in shapes.items()}
        required = ("vision_model.embeddings.class_embedding", WORDS)
        if any(name not in renamed for name in required):
            raise CheckpointError(
                f"{file} is not a BLIP captioning checkpoint: visual_encoder or text_decoder is missing"
            )
        names = {old: new for old, new in names.items() if new.startswith(self.weight_prefixes)}
        tokenizer = (demo_bundle() / "tokenizer.json").read_text(encoding="utf-8")
        config = read_sizes(renamed, file, json.loads(tokenizer))
        size = config["vision_config"]["image_size"]
        processor = {**self.processor.settings, "size": {"height": size, "width": size}}
        processor["image_processor_type"] = self.processor.kind
        files = {
            "preprocessor_config.json": json.dumps(processor, indent=1) + "\n",
            "tokenizer_config.json": json.dumps(TOKENIZER, indent=1) + "\n",
            "tokenizer.json": tokenizer,
        }
        return Original(config, names, files)


HEAD_WIDTH = 64
"""Width of an attention head in BLIP base and large, in the image encoder and the text decoder."""
RENAMED = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)
"""Names in the image encoder of an original checkpoint (patterns), and Hugging Face's. The decoder's are the same."""
TOKENIZER = {
    "tokenizer_class": "BertTokenizerFast",
    "do_lower_case": True,
    "bos_token": "[DEC]",
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "additional_special_tokens": ["[ENC]"],
}
"""tokenizer_config.json of a converted checkpoint."""


def _renamed(name: str) -> str:
    """Return Hugging Face's name of a weight of an original checkpoint."""
    for pattern, replacement in RENAMED:
        new_name, count = re.subn(pattern, replacement, name)
        if count:
            return new_name
    return name


def read_sizes(shapes: Mapping[str, tuple[int, ...]], file: Path, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the sizes of the tensors. All else is BLIP's own value, which is the default.

    `tokenizer` is the content of tokenizer.json. Raises CheckpointError if it does not fit the word embeddings.
    """
    table = shapes["vision_model.embeddings.position_embedding"]
    patches = shapes["vision_model.embeddings.patch_embedding.weight"]
    words = shapes[WORDS]
    known = 1 + max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))
    if words[0] != known:
        raise CheckpointError(
            f"{file} has {words[0]} word embeddings, but BLIP's tokenizer has {known} tokens: convert it by hand"
        )
    return {
        "model_type": BlipRules.model_type,
        "architectures": [BlipRules.architecture],
        "vision_config": {
            "hidden_size": table[2],
            "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": _layers(shapes, "vision_model.encoder.layers"),
            "num_attention_heads": table[2] // HEAD_WIDTH,
            "image_size": math.isqrt(table[1] - 1) * patches[3],
            "patch_size": patches[3],
        },
        "text_config": {
            "vocab_size": words[0],
            "hidden_size": words[1],
            "encoder_hidden_size": table[2],
            "intermediate_size": shapes["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"][0],
            "num_hidden_layers": _layers(shapes, "text_decoder.bert.encoder.layer"),
            "num_attention_heads": words[1] // HEAD_WIDTH,
            "max_position_embeddings": shapes["text_decoder.bert.embeddings.position_embeddings.weight"][0],
        },
    }


def _layers(names: Iterable[str], part: str) -> int:
    """Return the number of layers under the prefix `part`."""
    numbers = {int(name.removeprefix(part + ".").split(".")[0]) for name in names if name.startswith(part + ".")}
    return 1 + max(numbers, default=-1)

"""Checkpoints of BLIP's first authors (salesforce/BLIP, LAVIS): one file of torch.save, names and sizes of their own.

They are written once as a Hugging Face directory into the cache, by the names of transformers' conversion, and used
from there.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BlipConfig

from engine.bundle.manifest import demo_bundle
from engine.errors import CheckpointError
from engine.files.atomic import file_sha256
from export.checkpoints.converted import kept_or_made
from export.checkpoints.files import SAFE, read_pickle
from export.checkpoints.load import clean_names
from export.checkpoints.processor import OWN_FILE, SETTINGS

HEAD_WIDTH = 64
"""Of every attention head in BLIP base and large, on both sides."""
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
"""Their names of the image encoder, and Hugging Face's; the text decoder has the same names in both."""


def convert_original(file: Path) -> Path:
    """Return a Hugging Face directory of the captioning checkpoint in one file, made once into the cache.

    Raises CheckpointError for a file that cannot be read safely, is of another task, or has other sizes than BLIP's.
    """
    return kept_or_made(f"{file.stem}-{file_sha256(file)[:12]}", lambda draft: _convert(file, draft))


def _convert(file: Path, draft: Path) -> None:
    weights = {_renamed(name): tensor for name, tensor in clean_names(read_pickle(file), file).items()}
    wanted = ("vision_model.embeddings.class_embedding", "text_decoder.bert.embeddings.word_embeddings.weight")
    if any(name not in weights for name in wanted):
        raise CheckpointError(f"{file} is no captioning checkpoint of BLIP: it has no visual_encoder and text_decoder")
    weights = {name: one for name, one in weights.items() if name.startswith(("vision_model.", "text_decoder."))}
    config = read_sizes(weights, file)
    config.save_pretrained(draft)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, draft / SAFE)
    size = config.vision_config.image_size
    processor = SETTINGS | {"size": {"height": size, "width": size}, "image_processor_type": "BlipImageProcessor"}
    (draft / OWN_FILE).write_text(json.dumps(processor, indent=1) + "\n")
    shutil.copy(demo_bundle() / "tokenizer.json", draft)  # bert-base-uncased with [DEC] and [ENC], as theirs
    (draft / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=1) + "\n")


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


def _renamed(name: str) -> str:
    for pattern, ours in RENAMED:
        found, count = re.subn(pattern, ours, name)
        if count:
            return found
    return name


def read_sizes(weights: dict[str, torch.Tensor], file: Path) -> BlipConfig:
    """Read the sizes off the tensors; what these do not tell is BLIP's own and the default of BlipConfig."""
    table = weights["vision_model.embeddings.position_embedding"]
    patches = weights["vision_model.embeddings.patch_embedding.weight"]
    words = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    tokens = json.loads((demo_bundle() / "tokenizer.json").read_text(encoding="utf-8"))
    known = 1 + max(*tokens["model"]["vocab"].values(), *(token["id"] for token in tokens["added_tokens"]))
    if words.shape[0] != known:
        raise CheckpointError(f"{file} has {words.shape[0]} words, BLIP's own tokenizer {known}: convert it by hand")
    vision = _layers(weights, "vision_model.encoder.layers")
    text = _layers(weights, "text_decoder.bert.encoder.layer")
    return BlipConfig(
        architectures=["BlipForConditionalGeneration"],
        vision_config={
            "hidden_size": table.shape[2],
            "intermediate_size": weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": vision,
            "num_attention_heads": table.shape[2] // HEAD_WIDTH,
            "image_size": math.isqrt(table.shape[1] - 1) * patches.shape[3],
            "patch_size": patches.shape[3],
        },
        text_config={
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "encoder_hidden_size": table.shape[2],
            "intermediate_size": weights["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": text,
            "num_attention_heads": words.shape[1] // HEAD_WIDTH,
            "max_position_embeddings": weights["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        },
    )


def _layers(weights: dict[str, torch.Tensor], part: str) -> int:
    numbers = {int(name.removeprefix(part + ".").split(".")[0]) for name in weights if name.startswith(part + ".")}
    return 1 + max(numbers, default=-1)

"""Small random Florence-2 checkpoints: in transformers' layout, and in that of the first checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import BartTokenizerFast, Florence2Config, Florence2ForConditionalGeneration, GenerationConfig

from tests.helpers.tiny_pairs import byte_pairs

IMAGE_SIZE = 64
"""In px; the last stage of DaViT has 2x2 patches then."""
VISION: dict[str, Any] = {
    "depths": [1, 1, 2, 1],
    "embed_dim": [8, 8, 16, 16],
    "num_heads": [2, 2, 2, 4],
    "num_groups": [2, 2, 4, 4],
    "window_size": 3,
    "projection_dim": 32,
    "max_position_embeddings": 5,
}
TEXT: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 96,
}
GENERATION = {
    "num_beams": 3,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
}
"""Settings of all published checkpoints."""
LOCATIONS = ["<od>", "</od>", *(f"<loc_{place}>" for place in range(4)), "<and>"]


def make_florence_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    end_bias: float = 2.2,
    image_size: int = IMAGE_SIZE,
    vision: dict | None = None,
    text: dict | None = None,
    generation: dict | None = None,
    is_first: bool = False,
    as_transformers: bool = False,
) -> Path:
    """Write a checkpoint with random weights and return its directory.

    `vision`, `text` and `generation` are further settings. For `end_bias` see make_checkpoint. With `is_first` the
    files are those of microsoft/Florence-2-base: own names, a pickle, code next to it, and no location tokens in the
    tokenizer. `as_transformers` leaves the same model in transformers' layout.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_pairs(directory, BartTokenizerFast, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    if not is_first:
        special = [AddedToken(one, special=True, normalized=False) for one in [*LOCATIONS, "<image>"]]
        tokenizer.add_tokens(special, special_tokens=True)
    words = len(tokenizer) + (1024 if is_first else 0)
    config = Florence2Config(
        text_config={"vocab_size": words} | TEXT | (text or {}),
        vision_config=VISION | (vision or {}),
        image_token_id=words - 1,
        image_size=image_size,
    )
    model = Florence2ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
        model.tie_weights()
        row = model.lm_head.weight[2]
        model.model.language_model.decoder.layers[-1].final_layer_norm.bias += end_bias * row / row.dot(row)
    settings = GENERATION if generation is None else generation
    model.generation_config = GenerationConfig(
        bos_token_id=0, decoder_start_token_id=2, eos_token_id=2, pad_token_id=1, **settings
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    processor = {"image_processor_type": "CLIPImageProcessor", "processor_class": "Florence2Processor"}
    size = {"height": image_size, "width": image_size}
    processor |= {"size": size, "crop_size": size, "do_center_crop": False, "image_seq_length": 5, "resample": 3}
    processor |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_convert_rgb": None}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    if is_first and not as_transformers:
        _as_first(directory, model)
    return directory


FIRST_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower\.)", r"\1"),
    (r"^(vision_tower\.convs\.\d+)\.conv\.", r"\1.proj."),
    (r"\.(spatial|channel)_block\.(conv[12])\.", r".\1_block.\2.fn.dw."),
    (r"\.(window|channel)_attn\.(qkv|proj)\.", r".\1_attn.fn.\2."),
    (r"\.spatial_block\.norm1\.", ".spatial_block.window_attn.norm."),
    (r"\.channel_block\.norm1\.", ".channel_block.channel_attn.norm."),
    (r"\.norm2\.", ".ffn.norm."),
    (r"\.ffn\.(fc[12])\.", r".ffn.fn.net.\1."),
    (r"^model\.multi_modal_projector\.image_projection\.weight$", "image_projection"),
    (r"^model\.multi_modal_projector\.image_position_embed\.", "image_pos_embed."),
    (r"^model\.multi_modal_projector\.", ""),
)


def first_name(name: str) -> str:
    """Return the name that the first checkpoints have for a weight of transformers' class."""
    for pattern, replacement in FIRST_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _as_first(directory: Path, model: Florence2ForConditionalGeneration) -> None:
    weights = {first_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    weights["image_projection"] = weights["image_projection"].T.contiguous()
    weights["language_model.final_logits_bias"] = torch.zeros(1, len(weights["language_model.lm_head.weight"]))
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    raw = json.loads((directory / "config.json").read_text())
    for name in ("image_token_id", "dtype", "torch_dtype"):
        raw.pop(name, None)
    vision = raw["vision_config"]
    vision |= {"model_type": "davit", "dim_embed": vision.pop("embed_dim"), "enable_checkpoint": False}
    positions, images = vision.pop("max_position_embeddings"), vision.pop("max_temporal_embeddings", 100)
    vision |= {
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": positions},
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": images},
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    }
    raw["text_config"]["model_type"] = "florence2_language"
    raw |= {"auto_map": {"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"}}
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "modeling_florence2.py").write_text("raise SystemExit('the code of a checkpoint was run')\n")
    processor = json.loads((directory / "preprocessor_config.json").read_text())
    processor["auto_map"] = {"AutoProcessor": "processing_florence2.Florence2Processor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (directory / name).unlink(missing_ok=True)

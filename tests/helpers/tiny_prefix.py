"""Small random checkpoints of GPT-2 with an image prefix, in the layout that docs/checkpoints.md describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2TokenizerFast

from export.families.image_prefix import CLIPImageProcessor, ImagePrefixGPT2, ImagePrefixGPT2Config
from export.families.vision_encoder_decoder import PROCESSORS
from tests.helpers.tiny import IMAGE_SIZE, PATCH_SIZE
from tests.helpers.tiny_pairs import ENCODERS, TEXT, byte_pairs, favour

SHAPES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "clip-mlp": ("clip_vision_model", {"type": "mlp", "prefix_length": 4}, False),
    "clip-transformer": (
        "clip_vision_model",
        {"type": "transformer", "prefix_length": 5, "clip_length": 3, "num_layers": 2, "normalize_prefix": True},
        False,
    ),
    "vit-linear": ("vit", {"type": "linear"}, True),
    "clip-linear": ("clip_vision_model", {"type": "linear"}, False),
}
"""Image encoder, mapping network, and whether captions begin with a start token. The first two are ClipCap's shapes,
the third is MedICap's."""


def make_prefix_checkpoint(
    directory: Path, shape: str, *, seed: int = 0, end_bias: float = 2.0, **changes: Any
) -> Path:
    """Write a checkpoint with random weights and return its directory; `changes` are settings of config.json.

    `end_bias` is added to the logit of the end token, so that captions of different images have different lengths.
    """
    directory.mkdir(parents=True, exist_ok=True)
    encoder, mapping, has_start = SHAPES[shape]
    tokenizer = byte_pairs(directory, GPT2TokenizerFast, ["<|endoftext|>"])
    end = tokenizer.eos_token_id
    vision = ENCODERS["vit"] | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "model_type": encoder}
    if encoder != "vit":
        vision["projection_dim"] = 20
    settings = {
        "encoder": vision,
        "decoder": TEXT["gpt2"]
        | {"model_type": "gpt2", "vocab_size": len(tokenizer)}
        | {"bos_token_id": end, "eos_token_id": end},
        "mapping": mapping,
        "eos_token_id": end,
        "pad_token_id": end,
        **({"decoder_start_token_id": end} if has_start else {}),
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ImagePrefixGPT2(ImagePrefixGPT2Config(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
        model.gpt.tie_weights()
        favour(model.gpt, "gpt2", end, end_bias)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "gpt.lm_head.weight"}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")
    named = {"model_type": "image-prefix-gpt2", "architectures": ["ImagePrefixGPT2"]} | settings
    (directory / "config.json").write_text(json.dumps(named, indent=1), encoding="utf-8")
    tokenizer.save_pretrained(directory)
    if encoder == "vit":
        processor = PROCESSORS["ViT"](size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    else:
        crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)
    processor.save_pretrained(directory)
    return directory

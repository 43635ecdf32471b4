"""A small random GIT checkpoint, as tests/helpers/tiny.py makes BLIP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GitConfig, GitForCausalLM

from export.families.git import CLIPImageProcessor
from tests.helpers.tiny import IMAGE_SIZE, PATCH_SIZE, make_tokenizer


def make_git_checkpoint(
    directory: Path, *, seed: int = 0, end_bias: float = 2.0, image_size: int = IMAGE_SIZE, **changes: Any
) -> Path:
    """Write a checkpoint with random weights and return its directory. `changes` are settings of config.json.

    For `end_bias` see make_checkpoint. GIT needs a smaller one, because no layer norm precedes its head.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(directory)
    config = GitConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
        },
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"max_position_embeddings": 64} | changes,
    )
    model = GitForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
        model.output.bias[tokenizer.sep_token_id] += end_bias
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    crop = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop).save_pretrained(directory)
    return directory

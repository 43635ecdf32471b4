"""Small random BLIP checkpoints for tests.

They take seconds to create, but have real tokenizers and give different captions for different images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration

from export.checkpoints.load import word_pieces
from export.families.blip import BlipImageProcessor

WORDS = [
    "a",
    "the",
    "of",
    "and",
    "with",
    "in",
    "on",
    "ct",
    "mri",
    "axial",
    "coronal",
    "sagittal",
    "chest",
    "brain",
    "abdomen",
    "lesion",
    "mass",
    "nodule",
    "arrow",
    "white",
    "left",
    "right",
    "upper",
    "lower",
    "lobe",
    "image",
    "showing",
    "shows",
    "contrast",
    "enhanced",
    "weighted",
    "t1",
    "t2",
    "x",
    "ray",
    "plain",
    "view",
    "large",
    "small",
    "-",
    "(",
    ")",
    ".",
    ",",
    ":",
    "/",
    "%",
    "1",
    "2",
    "3",
    "5",
    "mm",
    "cm",
    "##s",
    "##al",
    "##ic",
    "##ed",
    "'",
    "s",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
IMAGE_SIZE, PATCH_SIZE = 32, 8


def make_tokenizer(directory: Path) -> BertTokenizerFast:
    """Return a WordPiece tokenizer of SPECIAL + WORDS, followed by [DEC] and [ENC]."""
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(SPECIAL + WORDS) + "\n")
    tokenizer = word_pieces(vocabulary, do_lower_case=True)
    vocabulary.unlink()
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


def make_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    end_bias: float = 5.0,
    std: float = 0.25,
    image_size: int = IMAGE_SIZE,
    text: dict | None = None,
    vision: dict | None = None,
) -> Path:
    """Write a checkpoint with random weights and return its directory.

    All weights are drawn again, because Hugging Face's random initialisation of the vision model has std 1e-10.
    `end_bias` is added to the logit of the end token, so that captions of different images have different lengths.
    `std` is large, so that images and words matter and near-ties are rare.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(directory)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text_config = common | {
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 24,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "projection_dim": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": 2,
    }
    vision_config = common | {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "image_size": image_size,
        "patch_size": PATCH_SIZE,
        "layer_norm_eps": 1e-6,
    }
    config = BlipConfig(text_config=text_config | (text or {}), vision_config=vision_config | (vision or {}))
    model = BlipForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std, generator=generator)
        model.tie_weights()
        model.text_decoder.cls.predictions.bias[tokenizer.sep_token_id] += end_bias
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    BlipImageProcessor(size={"height": image_size, "width": image_size}).save_pretrained(directory)
    return directory


def make_tie_rich_checkpoint(directory: Path) -> Path:
    """Write a checkpoint in which every word ties with three others, while each leads to different next words.

    The words of a group of four share the half of their embedding that the head reads. They differ in the other half,
    which only the next step reads. So rounding decides the ties of every step and leads to captions with very different
    scores.
    """
    make_checkpoint(directory, end_bias=0.0)
    model = BlipForConditionalGeneration.from_pretrained(directory)
    with torch.no_grad():
        words = model.text_decoder.bert.embeddings.word_embeddings.weight
        half, groups = words.shape[1] // 2, len(words) // 4
        words[: 4 * groups, :half] = words[: 4 * groups : 4, :half].repeat_interleave(4, 0)
        model.text_decoder.cls.predictions.transform.LayerNorm.weight[half:] = 0
    model.save_pretrained(directory)
    return directory


def random_pictures(count: int, seed: int = 0, size: tuple[int, int] = (41, 37)) -> list[Image.Image]:
    """Return different RGB images of random colour blocks."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        images.append(Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC))
    return images


def save_pictures(folder: Path, count: int, *, seed: int = 0, name: str = "{}.png") -> Path:
    """Write random_pictures into a folder, numbered from 0 and named by the pattern `name`. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(random_pictures(count, seed)):
        image.save(folder / name.format(i))
    return folder

"""Checkpoints to measure with: BLIP's shapes, weights drawn once by seed, and captions that end at many lengths.

    python -m benchmarks.workload --shape base --out build/workload/base

No trained BLIP can be had from a package registry, and speed does not depend on what the words mean. It does depend on
when captions end: the end token's bias is set so that they spread like real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

from engine.bundle import demo_bundle


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint, and the bias on its end token that spreads caption lengths."""

    vision_layers: int
    vision_width: int
    vision_heads: int
    end_bias: float


SHAPES = {"base": Shape(12, 768, 12, 14.3), "large": Shape(24, 1024, 16, 14.3)}
"""Salesforce/blip-image-captioning-base and -large; the text decoder is BERT-base in both. The bias was tuned for base
(mean 24 new tokens at 4 beams); for large it is the same and untried."""
IMAGE_SIZE, PATCH_SIZE, TEXT_WIDTH = 224, 16, 768
STD, EMBEDDING_STD = 0.05, 0.1
"""Larger than a fresh model's 0.02, so that pictures change words and few candidates tie."""


def make_checkpoint(out: Path, shape: Shape, *, seed: int = 0, std: float = STD) -> Path:
    """Write a checkpoint of `shape` into `out`, with the demo's tokenizer; return `out`."""
    tokenizer = BertTokenizerFast(tokenizer_file=str(demo_bundle() / "tokenizer.json"))
    text = {
        "vocab_size": 30524,
        "hidden_size": TEXT_WIDTH,
        "encoder_hidden_size": shape.vision_width,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "bos_token_id": 30522,
        "sep_token_id": 102,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": shape.vision_width,
        "intermediate_size": 4 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=EMBEDDING_STD if "word_embeddings" in name else std, generator=generator)
        model.tie_weights()
        model.text_decoder.cls.predictions.bias[text["sep_token_id"]] += shape.end_bias
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(out)
    return out


@click.command()
@click.option("--shape", type=click.Choice(sorted(SHAPES)), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(shape: str, out: Path, seed: int) -> None:
    """Write a checkpoint to measure with."""
    click.echo(make_checkpoint(out, SHAPES[shape], seed=seed))


if __name__ == "__main__":
    main()

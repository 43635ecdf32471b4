"""The demo recipe: packaged volumes and weights in, a small captioning checkpoint with a report out.

What the model can do is recognise plane and level in T1-weighted head MRI; it has no clinical use.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from engine.output.run import write_run
from train.assets import fetch_assets
from train.finetune import encode_images, finetune_decoder
from train.model import init_text_from_bert, init_vision_from_dinov2, round_to_fp16
from train.volumes import PLANES, Pair, read_pairs, write_pairs

VISION_LAYERS, TEXT_LAYERS, WIDTH = 8, 3, 384
"""33.7 M parameters, 67 MB in float16: what fits the embedded bundle. The first 8 of 12 ViT layers were enough."""
IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""ImageNet's, which DINOv2 was trained with (BLIP's own default is CLIP's)."""
BATCH = 16
EXAMPLES = {"icbm09a": (8, 9, 9), "icbm09c": (1, 1, 1), "colin27": (1, 1, 1)}
"""Example pictures of each volume by plane: 26 held out, 3 that chose the epoch, 3 of the training head."""


def build_demo(out: Path, work: Path, say: Callable[[str], None], *, epochs: int = 8, seed: int = 0) -> dict:
    """Train the demo checkpoint into `out` and return its report (also written to out/demo_report.json).

    `work` keeps downloads, slices (work/pairs) and encoder features, so a second call starts from them.
    """
    torch.manual_seed(seed)
    assets = fetch_assets(work / "assets")
    pairs_dir = work / "pairs"
    pairs = read_pairs(pairs_dir) if (pairs_dir / "pairs.jsonl").exists() else write_pairs(assets, pairs_dir)
    say(f"{len(pairs)} slices in {pairs_dir}")
    model = _initial_model(assets, seed)
    tokenizer = BertTokenizerFast(vocab_file=str(assets["vocab.txt"]), do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    processor = BlipProcessor(
        BlipImageProcessor(size={"height": 224, "width": 224}, image_mean=IMAGE_MEAN, image_std=IMAGE_STD), tokenizer
    )
    features = encode_images(model, _pixel_batches(processor, pairs_dir, pairs), say)

    def split(name: str) -> tuple[torch.Tensor, list[str]]:
        chosen = [i for i, pair in enumerate(pairs) if pair.split == name]
        return features[chosen], [pairs[i].caption for i in chosen]

    finetune_decoder(model, tokenizer, split("train"), split("valid"), say, epochs=epochs, seed=seed)
    round_to_fp16(model)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, safe_serialization=True)
    processor.save_pretrained(out)
    held_out, _ = split("test")
    report = _report(model, tokenizer, held_out, pairs)
    (out / "demo_report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _initial_model(assets: dict[str, Path], seed: int) -> BlipForConditionalGeneration:
    common = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "hidden_act": "gelu"}
    text = common | {
        "vocab_size": 30524,
        "encoder_hidden_size": WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "bos_token_id": 30522,
        "sep_token_id": 102,
        "pad_token_id": 0,
        "max_length": 64,
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
    }
    vision = common | {
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 6,
        "image_size": 224,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.text_decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    init_text_from_bert(model, assets["model.safetensors"])
    init_vision_from_dinov2(model.vision_model, assets["vit_s_focus.onnx"])
    return model


def _pixel_batches(processor: BlipProcessor, directory: Path, pairs: list[Pair]):
    """Yield pixel batches f32[B,3,224,224], one at a time so that the pictures never lie in memory together."""
    for i in range(0, len(pairs), BATCH):
        pictures = [Image.open(directory / pair.image).convert("RGB") for pair in pairs[i : i + BATCH]]
        yield processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


def _report(model, tokenizer, features: torch.Tensor, pairs: list[Pair]) -> dict:
    """Caption the held-out volume with the checkpoint's own generation defaults and score the captions."""
    trained_on = {pair.caption for pair in pairs if pair.split == "train"}
    references = [pair.caption for pair in pairs if pair.split == "test"]
    captions = []
    for i in range(0, len(references), BATCH):
        encoded = features[i : i + BATCH].float()
        ids = model.text_decoder.generate(
            input_ids=torch.full((len(encoded), 1), model.config.text_config.bos_token_id),
            encoder_hidden_states=encoded,
            eos_token_id=model.config.text_config.sep_token_id,
            pad_token_id=model.config.text_config.pad_token_id,
        )
        captions += tokenizer.batch_decode(ids, skip_special_tokens=True)
    unseen = [i for i, reference in enumerate(references) if reference not in trained_on]
    return {
        "held_out": score_captions(references, captions),
        "caption_never_in_training": score_captions([references[i] for i in unseen], [captions[i] for i in unseen]),
        "slices": {name: sum(pair.split == name for pair in pairs) for name in ("train", "valid", "test")},
    }


def write_examples(pairs_dir: Path, out: Path) -> int:
    """Copy EXAMPLES pictures into out/images with their captions in out/captions.csv, the held-out volume first."""
    pairs = read_pairs(pairs_dir)
    chosen: list[Pair] = []
    for volume, counts in EXAMPLES.items():
        for plane, count in zip(PLANES, counts, strict=True):
            slices = [p for p in pairs if p.volume == volume and p.plane == plane and "_v" not in p.image]
            chosen += [slices[len(slices) * (2 * i + 1) // (2 * count)] for i in range(count)]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for pair in chosen:
        shutil.copyfile(pairs_dir / pair.image, out / "images" / pair.image)
    rows = ((Path(pair.image).stem, pair.caption) for pair in chosen)
    write_run(out / "captions.csv", rows)
    return len(chosen)


def score_captions(references: list[str], captions: list[str]) -> dict[str, float]:
    """Return plane accuracy, ROUGE-1 F (rouge-score, no stemmer, mean over images), exact match and counts.

    Exact match compares letters and digits only: the tokenizer lower-cases and splits punctuation.
    """
    if not references:
        return {"images": 0}
    scorer = RougeScorer(["rouge1"], use_stemmer=False)

    def letters(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    def planes(text: str) -> list[bool]:
        return [plane in text.lower() for plane in PLANES]

    both = list(zip(references, captions, strict=True))
    return {
        "images": len(both),
        "plane_accuracy": float(np.mean([planes(r) == planes(c) for r, c in both])),
        "rouge1": float(np.mean([scorer.score(r, c)["rouge1"].fmeasure for r, c in both])),
        "exact_match": float(np.mean([letters(r) == letters(c) for r, c in both])),
        "distinct_captions": len(set(captions)),
        "distinct_references": len(set(references)),
    }

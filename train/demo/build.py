"""The demo recipe: packaged volumes and weights in, a small captioning checkpoint with a report out.

What the model can do is recognise plane and level in T1-weighted head MRI; it has no clinical use.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import BlipConfig, BlipForConditionalGeneration

from engine.files.run_files import write_run
from engine.options import options_from
from export.checkpoints.releases import BlipImageProcessor, word_pieces
from export.manifest import generation_defaults
from export.reference.huggingface import Reference
from export.reference.torch_backend import caption_live
from train.data.batches import PixelSpec
from train.demo.assets import fetch_assets
from train.demo.initial_weights import init_text_from_bert, init_vision_from_dinov2, round_to_fp16
from train.demo.volumes import PLANES, REGIONS, Pair, read_pairs, write_pairs
from train.finetune import DataInputs, Job, finetune
from train.learning.run_dir import save_checkpoint
from train.recipes import load_recipe

STAGES = ("demo-decoder", "demo")
"""Recipes, one after the other."""
IMAGE_SIZE = 224
VISION_LAYERS, TEXT_LAYERS, WIDTH = 8, 3, 384
"""33.7 M parameters, 67 MB in float16: what fits the embedded bundle. The first 8 of 12 ViT layers were enough."""
IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""ImageNet's, which DINOv2 was trained with (BLIP's own default is CLIP's)."""
EXAMPLES = {"icbm09a": (8, 9, 9), "icbm09c": (1, 1, 1), "colin27": (1, 1, 1)}
"""Example pictures of each volume by plane: 26 held out, 3 that chose the epoch, 3 of the training head."""


def build_demo(out: Path, work: Path, say: Callable[[str], None], *, seed: int = 0) -> dict:
    """Train the demo checkpoint into `out` and return its report (also written to out/demo_report.json).

    Two runs of train.finetune, by the recipes STAGES: the decoder alone on features of the frozen encoder, then
    everything on augmented pictures. `work` keeps downloads, slices (work/pairs) and both run directories, so a second
    call goes on where the first was cut off.
    """
    pairs, pairs_dir = demo_pairs(work), work / "pairs"
    say(f"{len(pairs)} slices in {pairs_dir}")
    checkpoint = initial_checkpoint(work, seed)
    for name in STAGES:
        job = Job(checkpoint, DataInputs(pairs_dir), work / name, load_recipe(name, {"seed": seed}))
        say(f"{name}: {finetune(job, say)['best']}")
        checkpoint = job.out / "best"
    reference = Reference.load(checkpoint)
    round_to_fp16(reference.model)
    save_checkpoint(reference, out)
    report = _report(reference, pairs_dir, pairs)
    (out / "demo_report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def demo_pairs(work: Path) -> list[Pair]:
    """Return the slices and captions in work/pairs, cut from downloaded volumes where that has not been done yet."""
    directory = work / "pairs"
    if (directory / "pairs.jsonl").exists():
        return read_pairs(directory)
    return write_pairs(fetch_assets(work / "assets"), directory)


def initial_checkpoint(work: Path, seed: int = 0) -> Path:
    """Write work/initial, what training starts from, and return it: weights of DINOv2 and MiniLM, the rest random."""
    checkpoint = work / "initial"
    save_checkpoint(_initial_reference(fetch_assets(work / "assets"), seed), checkpoint)
    return checkpoint


def _initial_reference(assets: dict[str, Path], seed: int) -> Reference:
    torch.manual_seed(seed)
    tokenizer = word_pieces(assets["vocab.txt"], do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = BlipImageProcessor(size=size, image_mean=IMAGE_MEAN, image_std=IMAGE_STD)
    return Reference(_initial_model(assets, seed), processor, tokenizer)


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
        "image_size": IMAGE_SIZE,
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


def _report(reference: Reference, pairs_dir: Path, pairs: list[Pair]) -> dict:
    """Caption the held-out volume with the checkpoint's own generation defaults and score the captions."""
    trained_on = {pair.caption for pair in pairs if pair.split == "train"}
    held_out = [pair for pair in pairs if pair.split == "test"]
    references = [pair.caption for pair in held_out]
    spec = PixelSpec.of(reference.image_processor)
    options = options_from(generation_defaults(reference), {})
    images = ((i, spec.read(pairs_dir / pair.image)) for i, pair in enumerate(held_out))
    found = dict(caption_live(reference.model, reference.image_processor, images, options))
    captions = [reference.tokenizer.decode(found[i][0].ids, skip_special_tokens=True) for i in range(len(held_out))]
    unseen = [i for i, caption in enumerate(references) if caption not in trained_on]
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
    """Return plane accuracy, region F1 (of the sets of REGIONS named, mean over images), ROUGE-1 F (rouge-score, no
    stemmer, mean over images), exact match and counts.

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
        "region_f1": float(np.mean([_f1(regions_of(r), regions_of(c)) for r, c in both])),
        "rouge1": float(np.mean([scorer.score(r, c)["rouge1"].fmeasure for r, c in both])),
        "exact_match": float(np.mean([letters(r) == letters(c) for r, c in both])),
        "distinct_captions": len(set(captions)),
        "distinct_references": len(set(references)),
    }


def regions_of(caption: str) -> set[str]:
    """Return the names of REGIONS in a caption; a precuneus is no cuneus."""
    text = caption.lower()
    return {name for name, _ in REGIONS if re.search(rf"\b{re.escape(name.lower())}\b", text)}


def _f1(expected: set[str], found: set[str]) -> float:
    total = len(expected) + len(found)
    return 2 * len(expected & found) / total if total else 1.0

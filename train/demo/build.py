"""Build the demo checkpoint: initialise a BLIP from other models' weights, train it and score its captions."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from transformers import BlipConfig, BlipForConditionalGeneration
from transformers.models.blip.modeling_blip import BlipVisionModel

from engine.options import options_from
from engine.run.outputs import write_run
from export.bundle import generation_defaults
from export.checkpoints.load import word_pieces
from export.families.blip import BlipImageProcessor
from export.reference.huggingface import Reference
from export.reference.torch_backend import caption_live
from train.data.batches import PixelSpec
from train.data.dataset import DataInputs
from train.demo.volumes import PLANES, REGIONS, Pair, fetch_assets, read_pairs, write_pairs
from train.finetune import Job, finetune
from train.learning.run_dir import save_checkpoint
from train.recipe import load_recipe


def round_to_fp16(model: torch.nn.Module) -> None:
    """Round every weight in place to the nearest float16 value, kept as float32.

    Bundles of all precisions then share the same weights.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())


def init_text_from_bert(model: BlipForConditionalGeneration, weights: Path) -> None:
    """Initialise the trunk of the text decoder from a BERT of the same width (safetensors).

    Layers that the decoder does not have are ignored. [DEC] and [ENC] get the mean word embedding. The embedding of
    token type 0, which BLIP does not have, is added to the word embeddings. The cross-attention and the transform of
    the LM head keep their initial weights.
    """
    bert = {name.removeprefix("bert."): tensor for name, tensor in load_file(weights).items()}
    trunk = model.text_decoder.bert
    state = trunk.state_dict()
    state.update({name: bert[name] for name in state if name in bert and bert[name].shape == state[name].shape})
    words = bert["embeddings.word_embeddings.weight"] + bert["embeddings.token_type_embeddings.weight"][0]
    extra = state["embeddings.word_embeddings.weight"].shape[0] - words.shape[0]
    state["embeddings.word_embeddings.weight"] = torch.cat([words, words.mean(0, keepdim=True).repeat(extra, 1)])
    trunk.load_state_dict(state)
    model.tie_weights()


def init_vision_from_dinov2(vision: BlipVisionModel, onnx_file: Path) -> None:
    """Initialise BLIP's vision tower from the DINOv2-style ViT in an ONNX file (initializers `backbone.*`).

    BLIP has no LayerScale: it is multiplied into the preceding projections. q, k and v are packed into one matrix. The
    position table is resized to the tower's grid, as Dinov2Embeddings.interpolate_pos_encoding does. Layers that the
    tower does not have are ignored.
    """
    source = _dinov2_weights(onnx_file)
    own = vision.state_dict()
    grid = math.isqrt(own["embeddings.position_embedding"].shape[1] - 1)
    table = source["position"]
    old = math.isqrt(table.shape[1] - 1)
    patches = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    own["embeddings.position_embedding"] = torch.cat(
        [table[:, :1], patches.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], 1
    )
    own["embeddings.class_embedding"] = source["embeddings.cls_token"]
    for kind in ("weight", "bias"):
        own[f"embeddings.patch_embedding.{kind}"] = source[f"embeddings.patch_embeddings.projection.{kind}"]
        own[f"post_layernorm.{kind}"] = source[f"layernorm.{kind}"]
    for i in range(len(vision.encoder.layers)):
        theirs, ours = f"encoder.layer.{i}", f"encoder.layers.{i}"
        scales = {j: source[f"{theirs}.layer_scale{j}.lambda1"] for j in (1, 2)}
        for kind in ("weight", "bias"):
            attention = [source[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            own[f"{ours}.self_attn.qkv.{kind}"] = torch.cat(attention)
            for j in (1, 2):
                own[f"{ours}.layer_norm{j}.{kind}"] = source[f"{theirs}.norm{j}.{kind}"]
            own[f"{ours}.mlp.fc1.{kind}"] = source[f"{theirs}.mlp.fc1.{kind}"]
            for target, name, j in (
                ("self_attn.projection", "attention.output.dense", 1),
                ("mlp.fc2", "mlp.fc2", 2),
            ):
                tensor = source[f"{theirs}.{name}.{kind}"]
                own[f"{ours}.{target}.{kind}"] = (scales[j][:, None] if kind == "weight" else scales[j]) * tensor
    vision.load_state_dict(own)


def _dinov2_weights(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Read the weights from an exported graph, by their Dinov2Model names.

    The export renames the weights of linear layers. They are found through the bias that is added to their product.
    """
    import onnx

    graph = onnx.load(str(onnx_file)).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    weights = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        biases = [name for name in node.input if name.startswith("backbone.encoder") and name.endswith(".bias")]
        if node.op_type != "Add" or not biases:
            continue
        product = producer.get(next(name for name in node.input if name not in biases))
        if product is not None and product.op_type == "MatMul":
            matrix = next(name for name in product.input if name in arrays)
            weights[biases[0].removeprefix("backbone.").removesuffix("bias") + "weight"] = arrays[matrix].T
    table = [arrays[next(n for n in arrays if n.startswith(f"onnx::{kind}"))] for kind in ("Concat", "Reshape")]
    weights["position"] = np.concatenate(table, 1)
    return {name: torch.tensor(np.ascontiguousarray(array)) for name, array in weights.items()}


STAGES = ("demo-decoder", "demo")
"""The recipes, in the order in which they run."""
IMAGE_SIZE = 224
VISION_LAYERS, TEXT_LAYERS, WIDTH = 8, 3, 384
"""33.7 M parameters, 67 MB in float16, which fits the embedded bundle. The first 8 of 12 ViT layers were enough."""
IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""The ImageNet values that DINOv2 was trained with. BLIP's default are the CLIP values."""
EXAMPLES = {"icbm09a": (8, 9, 9), "icbm09c": (1, 1, 1), "colin27": (1, 1, 1)}
"""Number of example images per volume and plane: 26 of the test volume, 3 of the validation volume, 3 of training."""


def build_demo(out: Path, work: Path, log: Callable[[str], None], *, seed: int = 0) -> dict:
    """Train the demo checkpoint into `out` and return its report, which is also written to out/demo_report.json.

    This runs train.finetune twice, with the recipes STAGES. The first trains the decoder alone on features of the
    frozen encoder, the second trains the whole model on augmented images. `work` keeps the downloads, the slices
    (work/pairs) and both run directories, so a second call resumes an interrupted one.
    """
    pairs_dir, assets = work / "pairs", fetch_assets(work / "assets")
    pairs = read_pairs(pairs_dir) if (pairs_dir / "pairs.jsonl").exists() else write_pairs(assets, pairs_dir)
    log(f"{len(pairs)} slices in {pairs_dir}")
    checkpoint = work / "initial"
    save_checkpoint(initial_reference(assets, seed), checkpoint)
    for name in STAGES:
        job = Job(checkpoint, DataInputs(pairs_dir), work / name, load_recipe(name, {"seed": seed}))
        log(f"{name}: {finetune(job, log)['best']}")
        checkpoint = job.out / "best"
    reference = Reference.load(checkpoint)
    round_to_fp16(reference.model)
    save_checkpoint(reference, out)
    report = _report(reference, pairs_dir, pairs)
    (out / "demo_report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def initial_reference(assets: dict[str, Path], seed: int) -> Reference:
    """Return the initial checkpoint: weights of DINOv2 and MiniLM, the rest random."""
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
    """Caption the held-out volume with the checkpoint's generation defaults and score the captions."""
    trained_on = {pair.caption for pair in pairs if pair.split == "train"}
    held_out = [pair for pair in pairs if pair.split == "test"]
    references = [pair.caption for pair in held_out]
    spec = PixelSpec.of(reference.image_processor)
    options = options_from(generation_defaults(reference), {})
    images = ((i, spec.read(pairs_dir / pair.image)) for i, pair in enumerate(held_out))
    results = dict(caption_live(reference.model, reference.image_processor, images, options))
    captions = [reference.tokenizer.decode(results[i][0].ids, skip_special_tokens=True) for i in range(len(held_out))]
    unseen = [i for i, caption in enumerate(references) if caption not in trained_on]
    return {
        "held_out": score_captions(references, captions),
        "caption_never_in_training": score_captions([references[i] for i in unseen], [captions[i] for i in unseen]),
        "slices": {name: sum(pair.split == name for pair in pairs) for name in ("train", "valid", "test")},
    }


def write_examples(pairs_dir: Path, out: Path) -> int:
    """Copy the EXAMPLES images to out/images and write their captions to out/captions.csv, the held-out volume first.

    Returns the number of images.
    """
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
    """Return plane accuracy, region F1, ROUGE-1, exact match and counts for captions and their references.

    Region F1 compares the sets of REGIONS that a caption and its reference name. ROUGE-1 is the F-measure of
    rouge-score without stemmer. Both are means over images. Exact match compares only letters and digits, because the
    tokenizer lower-cases and splits punctuation.
    """
    if not references:
        return {"images": 0}
    scorer = RougeScorer(["rouge1"], use_stemmer=False)

    def letters(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    def planes(text: str) -> list[bool]:
        return [plane in text.lower() for plane in PLANES]

    def region_f1(reference: str, caption: str) -> float:
        expected, found = regions_of(reference), regions_of(caption)
        total = len(expected) + len(found)
        return 2 * len(expected & found) / total if total else 1.0

    pairs = list(zip(references, captions, strict=True))
    return {
        "images": len(pairs),
        "plane_accuracy": float(np.mean([planes(r) == planes(c) for r, c in pairs])),
        "region_f1": float(np.mean([region_f1(r, c) for r, c in pairs])),
        "rouge1": float(np.mean([scorer.score(r, c)["rouge1"].fmeasure for r, c in pairs])),
        "exact_match": float(np.mean([letters(r) == letters(c) for r, c in pairs])),
        "distinct_captions": len(set(captions)),
        "distinct_references": len(set(references)),
    }


def regions_of(caption: str) -> set[str]:
    """Return the names of REGIONS in a caption, as whole words: "precuneus" does not contain "cuneus"."""
    text = caption.lower()
    return {name for name, _ in REGIONS if re.search(rf"\b{re.escape(name.lower())}\b", text)}

"""Build a BLIP from other models' weights; knows nothing of training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration
from transformers.models.blip.modeling_blip import BlipVisionModel


def round_to_fp16(model: torch.nn.Module) -> None:
    """Round every weight in place to the nearest float16 value (kept as float32), so all precisions share them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())


def init_text_from_bert(model: BlipForConditionalGeneration, weights: Path) -> None:
    """Initialise the text decoder's trunk from a BERT (safetensors) with the same width.

    Layers beyond the decoder's are ignored, [DEC] and [ENC] get the mean word embedding, the token type 0
    embedding (BLIP has none) is added to the words; cross-attention and the LM head's transform stay fresh.
    """
    bert = {name.removeprefix("bert."): tensor for name, tensor in load_file(weights).items()}
    trunk = model.text_decoder.bert
    own = trunk.state_dict()
    own.update({name: bert[name] for name in own if name in bert and bert[name].shape == own[name].shape})
    words = bert["embeddings.word_embeddings.weight"] + bert["embeddings.token_type_embeddings.weight"][0]
    extra = own["embeddings.word_embeddings.weight"].shape[0] - words.shape[0]
    own["embeddings.word_embeddings.weight"] = torch.cat([words, words.mean(0, keepdim=True).repeat(extra, 1)])
    trunk.load_state_dict(own)
    model.tie_weights()


def init_vision_from_dinov2(vision: BlipVisionModel, onnx_file: Path) -> None:
    """Fold the DINOv2-style ViT inside an ONNX file (initialisers `backbone.*`) into BLIP's vision tower.

    LayerScale is multiplied into the projections that precede it, q, k and v are packed, and the position table
    is resized to the tower's grid as Dinov2Embeddings.interpolate_pos_encoding does. Layers beyond the tower's
    are ignored.
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
    """Read weights by their Dinov2Model names out of an exported graph; linear weights are found by their bias."""
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

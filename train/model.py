"""Checkpoint surgery for BLIP: load safely, resize the position table, build from other models' weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import BlipConfig, BlipForConditionalGeneration
from transformers.models.blip.modeling_blip import BlipVisionModel

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class CheckpointError(Exception):
    """A checkpoint is not one this project can use; the message names the directory and the remedy."""


def load_checkpoint(directory: Path, image_size: int | None = None) -> BlipForConditionalGeneration:
    """Load a BLIP captioning checkpoint (safetensors, Hugging Face layout) in float32, in eval mode.

    With `image_size` (px) the position table is resized to it first. Raises CheckpointError when the directory
    is not a BLIP captioning checkpoint, holds only pickled weights, or its image processor, its
    config.image_size and its position table disagree (a 384 px table fed 224 px images silently uses its first
    197 rows in Hugging Face: wrong geometry, no error).
    """
    config = _read_config(directory)
    if not list(directory.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
        found = f"only pickled weights ({', '.join(pickles)})" if pickles else "no weights"
        raise CheckpointError(
            f"{directory} holds {found}: save the model with safe_serialization=True, pickles are never loaded"
        )
    try:
        model, report = BlipForConditionalGeneration.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:
        raise CheckpointError(f"cannot load {directory}: {' '.join(str(error).split())[:300]}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{directory} lacks {len(missing)} weights of BlipForConditionalGeneration ({missing[0]}, ...): "
            "is it a BLIP captioning checkpoint?"
        )
    model.eval()
    if image_size is not None:
        resize_position_table(model, image_size)
    elif (size := processor_size(directory)) not in (None, (config.vision_config.image_size,) * 2):
        rows = model.vision_model.embeddings.position_embedding.shape[1]
        raise CheckpointError(
            f"{directory}: preprocessor_config.json makes {size[0]}x{size[1]} px images, but the position table "
            f"({rows} rows) is for {config.vision_config.image_size} px: pass --image-size {size[0]} to resize it"
        )
    return model


def _read_config(directory: Path) -> BlipConfig:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint: it has no config.json")
    raw = _read_json(path)
    architectures = raw.get("architectures") or []
    if raw.get("model_type") != "blip" or (architectures and "BlipForConditionalGeneration" not in architectures):
        raise CheckpointError(
            f"{directory} is not a BLIP captioning checkpoint: model_type {raw.get('model_type')!r}, architectures "
            f"{architectures}; expected 'blip' and BlipForConditionalGeneration"
        )
    if not raw.get("text_config", {}).get("is_decoder", True):
        raise CheckpointError(f"{path}: text_config.is_decoder is false, so the text model cannot look at an image")
    if "auto_map" in raw:
        raise CheckpointError(f"{path} asks for custom code (auto_map), which is never run: remove that entry")
    return BlipConfig.from_dict(raw)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def processor_size(directory: Path) -> tuple[int, int] | None:
    """Return the (height, width) in px of preprocessor_config.json, or None when there is no such file."""
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return None
    size = _read_json(path).get("size", {"height": 384, "width": 384})
    if isinstance(size, int):
        return size, size
    if not isinstance(size, dict) or not {"height", "width"} <= set(size):
        raise CheckpointError(f"{path} gives the size {size!r}: BLIP needs a height and a width in pixels")
    return int(size["height"]), int(size["width"])


def resize_position_table(model: BlipForConditionalGeneration, image_size: int) -> None:
    """Resize the vision position table in place to `image_size` px, bicubic, the class row kept apart.

    The same interpolation as BlipVisionEmbeddings.interpolate_pos_encoding (transformers 4.57), done once so
    that the checkpoint and the exported graph hold a plain table.
    """
    embeddings, vision_config = model.vision_model.embeddings, model.config.vision_config
    if image_size % vision_config.patch_size:
        raise CheckpointError(f"image size {image_size} is not a multiple of the patch size {vision_config.patch_size}")
    table = embeddings.position_embedding.data
    old, new = math.isqrt(table.shape[1] - 1), image_size // vision_config.patch_size
    if new != old:
        grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)
        embeddings.position_embedding = torch.nn.Parameter(torch.cat([table[:, :1], grid], 1))
    embeddings.image_size = vision_config.image_size = image_size
    embeddings.num_patches, embeddings.num_positions = new * new, new * new + 1
    model.vision_model.config.image_size = image_size


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

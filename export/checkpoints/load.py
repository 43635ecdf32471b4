"""Load a BLIP checkpoint safely, and resize its position table; where every torch program of this project begins."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipVisionConfig

from engine.errors import CheckpointError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


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


def encoder_positions(vision: BlipVisionConfig) -> int:
    """Return the rows of the vision position table: one a patch, and the class row."""
    return int((vision.image_size // vision.patch_size) ** 2 + 1)


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

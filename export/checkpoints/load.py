"""Load a BLIP checkpoint safely and resize its position table. Export, training and parity all load models here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipVisionConfig

from engine.errors import CheckpointError
from export.checkpoints.files import read_json, read_weights, weight_files
from export.checkpoints.settings import apply_settings, read_processor

PREFIXES = ("_orig_mod.", "module.", "model.")
"""Prefixes that torch.compile, DataParallel and trainers add to all weight names."""
NO_WEIGHTS = (".position_ids",)
"""Name endings of buffers that older releases saved: position numbers, which are not weights."""
HEAD, WORDS = "text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"
TIED = {HEAD: WORDS, "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias"}
"""Names of one tensor if tie_word_embeddings is set, as it is in every published checkpoint."""
OTHER_HEADS = {
    "itm_head.": "an image-text matching (retrieval) checkpoint",
    "text_encoder.": "a question answering or retrieval checkpoint",
    "text_projection.": "a retrieval checkpoint",
}
"""Weight-name prefixes of BLIP's other models, which do not generate captions."""
MAX_LISTED = 5
"""Number of a run's checkpoints that an error lists; the last ones are listed."""


def load_checkpoint(directory: Path, image_size: int | None = None) -> BlipForConditionalGeneration:
    """Load a BLIP captioning checkpoint in float32 and eval mode, from Hugging Face's layout.

    With `image_size` (px), the position table is resized to it. Raises CheckpointError if the directory is not a BLIP
    captioning checkpoint, if it has no weights that can be read safely, or if its image processor, its
    config.image_size and its position table disagree. Hugging Face would not notice the last: with 224 px images and a
    384 px table it uses the first 197 rows, which have the wrong geometry, and raises no error.
    """
    config = read_config(directory)
    weights = clean_names(read_weights(weight_files(directory)), directory)
    refuse_broken_numbers(weights, directory)
    model = build_model(config, weights, directory)
    apply_settings(model, directory)
    if image_size is not None:
        resize_position_table(model, image_size)
        return model
    processor = read_processor(directory)
    if processor.file is not None and processor.size != (config.vision_config.image_size,) * 2:
        rows, height, width = model.vision_model.embeddings.position_embedding.shape[1], *processor.size
        raise CheckpointError(
            f"{directory}: {processor.file.name} makes {height}x{width} px images, but the position table "
            f"({rows} rows) is for {config.vision_config.image_size} px: pass --image-size {height} to resize it"
        )
    return model


def read_config(directory: Path) -> BlipConfig:
    """Read config.json. Raises CheckpointError if it does not describe a BLIP captioning checkpoint."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint: {_what_it_is(directory)}")
    raw = read_json(path)
    architectures = raw.get("architectures") or []
    if raw.get("model_type") != "blip" or (architectures and "BlipForConditionalGeneration" not in architectures):
        raise CheckpointError(
            f"{directory} is not a BLIP captioning checkpoint: model_type {raw.get('model_type')!r}, architectures "
            f"{architectures}; expected 'blip' and BlipForConditionalGeneration"
        )
    for part in ("text_config", "vision_config"):
        if raw.get(part) is not None and not isinstance(raw[part], dict):
            raise CheckpointError(f"{path}: {part} is not a JSON object")
    text = raw.get("text_config") or {}
    if not text.get("is_decoder", True):
        raise CheckpointError(f"{path}: text_config.is_decoder is false, so the text model cannot attend to an image")
    if "auto_map" in raw:
        raise CheckpointError(f"{path} asks for custom code (auto_map), which is never run: remove that entry")
    try:
        return BlipConfig.from_dict(_without_kernels({name: value for name, value in raw.items() if value is not None}))
    except Exception as error:  # transformers raises many kinds of exceptions for bad settings
        raise CheckpointError(f"{path} cannot be used: {' '.join(str(error).split())[:200]}") from error


def _without_kernels(raw: dict) -> dict:
    """Return the settings of config.json without those that choose a kernel, at the top level and in nested
    configurations.

    transformers 4.56 to 5.2 loads code from the hub if `_attn_implementation` or `_attn_implementation_internal` is an
    id such as `owner/kernel` and the package `kernels` is installed (CVE-2026-4372).
    """
    return {
        name: _without_kernels(value) if isinstance(value, dict) else value
        for name, value in raw.items()
        if not name.lstrip("_").startswith(("attn_implementation", "experts_implementation"))
    }


def _what_it_is(directory: Path) -> str:
    """Return why a folder without config.json is not a checkpoint, and what to pass instead."""
    if not directory.is_dir():
        return "no such folder"
    if (directory / "adapter_config.json").is_file():
        return "it is an adapter (such as LoRA), but a base must be a full model"
    originals = sorted(path.name for pattern in ("*.pth", "*.pt") for path in directory.glob(pattern))
    if originals:
        return f"it has no config.json; to use an original .pth file, pass its path: {directory / originals[0]}"
    names = (path.parent.name for path in directory.glob("*/config.json"))
    subfolders = sorted(names, key=lambda name: (len(name), name))  # checkpoint-1000 after checkpoint-500
    if subfolders:
        return f"it has no config.json, but its subfolders have: pass one of {', '.join(subfolders[-MAX_LISTED:])}"
    return "it has no config.json"


def clean_names(weights: Mapping[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    """Return weights in float32 under Hugging Face's names, without the prefixes of wrappers and without old buffers.

    Raises CheckpointError for the weights of another BLIP model.
    """
    named = dict(weights)
    while (prefix := _common_prefix(named)) is not None:
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    for start, what in OTHER_HEADS.items():
        if any(name.startswith(start) for name in named):
            raise CheckpointError(
                f"{source} is {what} of BLIP, which cannot generate captions: use a captioning checkpoint"
            )
    return {name: tensor.float() for name, tensor in named.items() if not name.endswith(NO_WEIGHTS)}


def refuse_broken_numbers(weights: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raise CheckpointError if a weight is NaN or infinite, or if all weights of the encoder or the decoder are 0."""
    broken = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in weights.items()}
    broken = {name: count for name, count in broken.items() if count}
    if broken:
        total, first = sum(broken.values()), next(iter(broken))
        raise CheckpointError(
            f"{source}: {total} weight{' is' if total == 1 else 's are'} NaN or infinite (in {first}"
            f"{f' and {len(broken) - 1} more tensors' if len(broken) > 1 else ''}): the training diverged, use an "
            "earlier checkpoint"
        )
    for part in ("vision_model.", "text_decoder."):
        tensors = [tensor for name, tensor in weights.items() if name.startswith(part)]
        if tensors and not any(bool(tensor.any()) for tensor in tensors):
            raise CheckpointError(f"{source}: all weights of {part[:-1]} are 0: save the trained model again")


def _common_prefix(names: Iterable[str]) -> str | None:
    """Return the wrapper's prefix that all names start with, or None if there is no such prefix."""
    return next((prefix for prefix in PREFIXES if names and all(name.startswith(prefix) for name in names)), None)


def build_model(config: BlipConfig, weights: dict[str, torch.Tensor], source: Path) -> BlipForConditionalGeneration:
    """Return the model of a configuration with these weights. Raises CheckpointError if they do not fit."""
    tied = config.text_config.tie_word_embeddings
    for copy, original in TIED.items() if tied else ():
        if copy in weights and original in weights and not torch.equal(weights[copy], weights[original]):
            raise CheckpointError(
                f"{source}: {copy} differs from {original}, but tie_word_embeddings requires them to be equal: set it "
                "to false in text_config, or remove one of the two"
            )
        if original not in weights and copy in weights:
            weights[original] = weights[copy]
    try:
        model = BlipForConditionalGeneration(config)
    except Exception as error:
        raise CheckpointError(f"cannot load {source}: {' '.join(str(error).split())[:300]}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{source}: {name} has the shape {tuple(tensor.shape)}, but config.json requires {shapes[name]}"
            )
    missing = sorted(set(shapes) - set(weights) - (set(TIED) if tied else set()))
    missing = [name for name in missing if not name.endswith(NO_WEIGHTS)]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} weights of BlipForConditionalGeneration ({missing[0]}, ...): "
            "is it a BLIP captioning checkpoint?"
        )
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in shapes}, strict=False)
    model.tie_weights()
    return model.eval()


def encoder_positions(vision: BlipVisionConfig) -> int:
    """Return the number of rows of the vision position table: one per patch, and one for the class token."""
    return int((vision.image_size // vision.patch_size) ** 2 + 1)


def resize_position_table(model: BlipForConditionalGeneration, image_size: int) -> None:
    """Resize the vision position table in place to `image_size` px by bicubic interpolation; the class row is kept.

    This is the interpolation of BlipVisionEmbeddings.interpolate_pos_encoding (transformers 4.57). It is done once
    here, so that the checkpoint and the exported graph hold a plain table. Raises CheckpointError if `image_size` is
    not a multiple of the patch size.
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

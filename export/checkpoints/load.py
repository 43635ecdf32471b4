"""Load a checkpoint of any family safely with torch, and hide what differs between transformers 4 and 5.

Export, training and parity all load models here.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertTokenizerFast, PretrainedConfig, PreTrainedModel

from engine.checkpoints.files import read_config_file, refuse_stand_in, rules_at, weight_files
from engine.checkpoints.pickles import unwrapped
from engine.checkpoints.read import refuse_missing, refuse_other_models
from engine.checkpoints.rules import Rules
from engine.checkpoints.settings import read_processor
from engine.checkpoints.weights import NO_WEIGHTS, common_prefix
from engine.errors import CheckpointError
from export.checkpoints.settings import apply_settings
from export.families import FAMILIES, family_at
from export.families.modules import IS_5


def load_checkpoint(directory: Path, image_size: int | None = None) -> PreTrainedModel:
    """Load a captioning checkpoint in float32 and eval mode, from Hugging Face's layout.

    With `image_size` (px), the position table is resized to it. Raises CheckpointError if the directory is not a
    captioning checkpoint of a known family, if it has no weights that can be read safely, or if its image processor,
    its config.image_size and its position table disagree. Hugging Face would not notice the last: with 224 px images
    and a 384 px table it uses BLIP's first 197 rows, which have the wrong geometry, and raises no error.
    """
    config = read_config(directory)
    family = family_at(directory)
    weights = clean_names(read_weights(weight_files(directory)), directory, family.rules)
    refuse_broken_numbers(weights, directory, family.rules)
    model = build_model(config, weights, directory)
    apply_settings(model, directory)
    if image_size is not None:
        family.resize(model, image_size)
        return model
    processor, sizes = read_processor(directory), family.sizes(config)
    if processor.file is not None and processor.size != (sizes.image_size,) * 2:
        height, width = processor.size
        raise CheckpointError(
            f"{directory}: {processor.file.name} makes {height}x{width} px images, but the position table "
            f"({sizes.encoder_positions} rows) is for {sizes.image_size} px: pass --image-size {height} to resize it"
        )
    return model


def read_config(directory: Path) -> PretrainedConfig:
    """Read config.json. Raises CheckpointError if it does not describe a captioning checkpoint of a known family."""
    raw, path = read_config_file(directory), directory / "config.json"
    rules_at(directory).check_config(raw, path)
    if "auto_map" in raw and not rules_at(directory).has_native_code:
        raise CheckpointError(f"{path} asks for custom code (auto_map), which is never run: remove that entry")
    try:
        settings = _without_kernels({name: value for name, value in raw.items() if value is not None})
        return family_at(directory).config_class.from_dict(settings)
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


def clean_names(weights: Mapping[str, torch.Tensor], source: Path, rules: Rules) -> dict[str, torch.Tensor]:
    """Return weights in float32 under Hugging Face's names, without the prefixes of wrappers and without old buffers.

    Raises CheckpointError for the weights of a model of the family that cannot caption.
    """
    named = dict(weights)
    while (prefix := common_prefix(named)) is not None:
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    refuse_other_models(named, rules, source)
    current = {}
    for name, tensor in named.items():
        new, is_transposed = rules.current_name(name)
        current[new] = tensor.float().T if is_transposed else tensor.float()
    return {name: tensor for name, tensor in current.items() if not name.endswith(NO_WEIGHTS)}


def refuse_broken_numbers(weights: Mapping[str, torch.Tensor], source: Path, rules: Rules) -> None:
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
    for part in rules.weight_prefixes:
        tensors = [tensor for name, tensor in weights.items() if name.startswith(part)]
        if tensors and not any(bool(tensor.any()) for tensor in tensors):
            raise CheckpointError(f"{source}: all weights of {part[:-1]} are 0: save the trained model again")


def build_model(config: PretrainedConfig, weights: dict[str, torch.Tensor], source: Path) -> PreTrainedModel:
    """Return the model of a configuration with these weights. Raises CheckpointError if they do not fit."""
    family = FAMILIES[config.model_type]
    tied = family.tied(config)
    for copy, original in tied.items():
        if copy in weights and original in weights and not torch.equal(weights[copy], weights[original]):
            raise CheckpointError(
                f"{source}: {copy} differs from {original}, but tie_word_embeddings requires them to be equal: set it "
                "to false in config.json, or remove one of the two"
            )
        if original not in weights and copy in weights:
            weights[original] = weights[copy]
    try:
        model = family.model_class(config)
    except Exception as error:
        raise CheckpointError(f"cannot load {source}: {' '.join(str(error).split())[:300]}") from error
    weights = current_names(model, weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{source}: {name} has the shape {tuple(tensor.shape)}, but config.json requires {shapes[name]}"
            )
    missing = sorted(set(shapes) - set(weights) - set(tied))
    unused = family.rules.unused(config.to_dict())
    missing = [name for name in missing if not name.endswith(NO_WEIGHTS) and not name.startswith(unused)]
    refuse_missing(missing, family.rules, source)
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in shapes}, strict=False)
    model.tie_weights()
    return model.eval()


def word_pieces(vocabulary: Path, **settings: Any) -> BertTokenizerFast:
    """Return the BERT tokenizer of a vocab.txt with one word piece per line.

    transformers 4 takes the file, 5 takes the words.
    """
    if not IS_5:
        return BertTokenizerFast(vocab_file=str(vocabulary), **settings)
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}, **settings)


def current_names(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights under the names that the installed release has for them.

    transformers 5 has renamed weights of image encoders, and `from_pretrained` renames those of older checkpoints.
    """
    if not IS_5:
        return weights
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    return {rename_source_key(name, renamings, [])[0]: tensor for name, tensor in weights.items()}


def read_weights(files: list[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of weight files by name.

    Raises CheckpointError if a file cannot be read, or if it holds anything but weights.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        weights |= read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    return weights


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name. Raises CheckpointError if it cannot be read."""
    refuse_stand_in(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a torch.save file by name.

    Torch's weights-only unpickler reads it, so no code of the file runs. Raises CheckpointError, which names the object
    that the file asks for, if it holds anything but weights.
    """
    refuse_stand_in(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it asks to load {_refused_object(error)}, but only weights are read from pickles: "
            "save only the weights, as safetensors"
        ) from error
    except Exception as error:  # a damaged file can make torch raise almost any exception
        reason = " ".join(str(error).split())[:200] or "it is empty or truncated"
        raise CheckpointError(f"{path} cannot be read as a torch.save file ({reason}): download it again") from error
    weights = unwrapped(content, path).items()
    return {str(name): tensor for name, tensor in weights if isinstance(tensor, torch.Tensor)}


def _refused_object(error: pickle.UnpicklingError) -> str:
    """Return the name of the object that the weights-only unpickler refused, taken from torch's message."""
    text = " ".join(str(error).split())
    match = re.search(r"(?:GLOBAL|global|class|Unsupported operand)\s*:?\s+`?([\w.]+)`?", text)
    return match[1] if match else "something that is not a tensor"

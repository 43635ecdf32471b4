"""Read the weights of a checkpoint with torch, and hide what differs between transformers 4 and 5."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertTokenizerFast, PreTrainedModel

from engine.checkpoints.files import refuse_stand_in
from engine.checkpoints.pickles import unwrapped
from engine.errors import CheckpointError
from export.families.modules import IS_5


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

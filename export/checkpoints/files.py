"""Read the files of a checkpoint, and hide what differs between transformers 4 and 5."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertTokenizerFast

from engine.errors import CheckpointError
from engine.inputs.kinds import HEAD_BYTES, wrong_content
from export.families import family_named
from export.families.modules import IS_5, Family


def word_pieces(vocabulary: Path, **settings: Any) -> BertTokenizerFast:
    """Return the BERT tokenizer of a vocab.txt with one word piece per line.

    transformers 4 takes the file, 5 takes the words.
    """
    if not IS_5:
        return BertTokenizerFast(vocab_file=str(vocabulary), **settings)
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}, **settings)


SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
"""Patterns of weight files that cannot be read; errors name them."""


def refuse_stand_in(path: Path) -> None:
    """Raise CheckpointError if a file is empty, or holds a Git LFS pointer or an HTML page instead of its content."""
    try:
        with path.open("rb") as stream:
            reason = wrong_content(stream.read(HEAD_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if reason is not None:
        raise CheckpointError(f"{path}: {reason}")


def read_json(path: Path) -> dict:
    """Return the JSON object of a file, with or without a byte order mark.

    Raises CheckpointError, which names the file, if it is not a JSON object.
    """
    refuse_stand_in(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


MAX_LISTED = 5
"""Number of a run's checkpoints that an error lists; the last ones are listed."""


def read_config_file(directory: Path) -> dict:
    """Return config.json as JSON. Raises CheckpointError if it is missing, and says what the folder is instead."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint: {_what_it_is(directory)}")
    return read_json(path)


def family_at(directory: Path) -> Family:
    """Return the family of a checkpoint. Raises CheckpointError if its config.json names none that is supported."""
    raw = read_config_file(directory)
    return family_named(raw.get("model_type"), raw.get("architectures") or [], directory)


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


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files of a checkpoint: safetensors files if there are any, else torch pickles.

    Raises CheckpointError if there are none, or if a file that an index names is missing.
    """
    for single, index in ((SAFE, SAFE_INDEX), (PICKLE, PICKLE_INDEX)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _indexed(directory / index)
        if single == SAFE and (others := sorted(directory.glob("*.safetensors"))):
            return others
    unreadable = sorted(path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern))
    content = f"no weights that can be read, only {', '.join(unreadable)}" if unreadable else "no weights"
    raise CheckpointError(f"{directory} has {content}: it needs {SAFE} or {PICKLE}, as save_pretrained writes them")


def _indexed(index: Path) -> list[Path]:
    """Return the weight files that an index lists. Raises CheckpointError if it lists none, or if one is missing."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} lists no weights (weight_map): save the model again")
    files = [index.with_name(Path(str(name)).name) for name in sorted(set(names.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"{index} lists files that are missing: {', '.join(missing[:3])}: download them again")
    return files


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
    while isinstance(content, Mapping) and len(content) <= MAX_WRAPPER_ENTRIES:
        inner = next(
            (content[name] for name in ("model", "state_dict") if isinstance(content.get(name), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__} instead of a dict of weights")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


MAX_WRAPPER_ENTRIES = 16
"""Largest dict that is searched for the weights under `model` or `state_dict`.

A wrapper of a training script has a few entries, such as epoch, optimizer and config. A larger dict holds the weights.
"""


def _refused_object(error: pickle.UnpicklingError) -> str:
    """Return the name of the object that the weights-only unpickler refused, taken from torch's message."""
    text = " ".join(str(error).split())
    match = re.search(r"(?:GLOBAL|global|class|Unsupported operand)\s*:?\s+`?([\w.]+)`?", text)
    return match[1] if match else "something that is not a tensor"

"""What differs between releases 4 and 5 of transformers, in one place: the same names for both."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertTokenizerFast

from engine.errors import CheckpointError
from engine.inputs.kinds import HEAD_BYTES, wrong_content

IS_5 = int(transformers.__version__.partition(".")[0]) >= 5

if IS_5:  # its BlipImageProcessor is torchvision's where that is installed, which resizes otherwise by a level or two
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as BlipImageProcessor
else:
    from transformers import BlipImageProcessor

__all__ = ["IS_5", "BlipImageProcessor", "word_pieces"]


def word_pieces(vocabulary: Path, **settings: Any) -> BertTokenizerFast:
    """Return BERT's tokenizer of a vocab.txt, a word piece a line; release 5 takes the words themselves."""
    if not IS_5:
        return BertTokenizerFast(vocab_file=str(vocabulary), **settings)
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}, **settings)


SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
"""What may lie in a folder instead of weights that can be read."""


def refuse_stand_in(path: Path) -> None:
    """Raise CheckpointError for a file that is empty, or a Git LFS pointer or an HTML page instead of its content."""
    try:
        with path.open("rb") as stream:
            reason = wrong_content(stream.read(HEAD_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if reason is not None:
        raise CheckpointError(f"{path}: {reason}")


def read_json(path: Path) -> dict:
    """Return a JSON object, with or without byte order mark. Raises CheckpointError naming the file."""
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


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights: safetensors where there are any, else pickles of torch.

    Raises CheckpointError when there are none, or one that an index names is missing.
    """
    for whole, index in ((SAFE, SAFE_INDEX), (PICKLE, PICKLE_INDEX)):
        if (directory / whole).is_file():
            return [directory / whole]
        if (directory / index).is_file():
            return _indexed(directory / index)
        if whole == SAFE and (others := sorted(directory.glob("*.safetensors"))):
            return others
    found = sorted(path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern))
    holds = f"no weights that can be read, only {', '.join(found)}" if found else "no weights"
    raise CheckpointError(f"{directory} holds {holds}: it needs {SAFE} or {PICKLE}, as save_pretrained writes them")


def _indexed(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} names no weights (weight_map)")
    files = [index.with_name(Path(str(name)).name) for name in sorted(set(names.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that are missing: {', '.join(missing[:3])}: fetch them again")
    return files


def read_weights(files: list[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of weight files by name. Raises CheckpointError where one cannot be read, or is more than
    weights.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        weights |= read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    return weights


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file. Raises CheckpointError."""
    refuse_stand_in(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of torch.save, by torch's weights-only unpickler: nothing else is loaded, no code
    runs. Raises CheckpointError naming what the file asked for instead.
    """
    refuse_stand_in(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it asks to load {_asked_for(error)}, and only weights are read from pickles: save the "
            "weights alone, as safetensors"
        ) from error
    except Exception as error:  # what a damaged file makes torch raise is of many kinds
        reason = " ".join(str(error).split())[:200] or "it is empty or cut off"
        raise CheckpointError(f"{path} cannot be read as a file of torch.save: {reason}: fetch it again") from error
    while isinstance(content, Mapping) and len(content) <= MOST_WRAPPERS:
        inner = next(
            (content[name] for name in ("model", "state_dict") if isinstance(content.get(name), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not weights by name")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


MOST_WRAPPERS = 16
"""A dict around the weights, under `model` or `state_dict`, has a few entries: epoch, optimizer, config."""


def _asked_for(error: pickle.UnpicklingError) -> str:
    """Return what a pickle wanted that is no tensor: torch names it in its message."""
    text = " ".join(str(error).split())
    found = re.search(r"(?:GLOBAL|global|class|Unsupported operand)\s*:?\s+`?([\w.]+)`?", text)
    return found[1] if found else "something that is not a tensor"

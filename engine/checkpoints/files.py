"""Find and read the files of a checkpoint: JSON files, and lists of weight files. Weights are read by weights.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.checkpoints.families import RULES, rules_named
from engine.checkpoints.rules import Rules
from engine.errors import CheckpointError
from engine.inputs.kinds import HEAD_BYTES, wrong_content

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


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, with or without a byte order mark.

    Raises CheckpointError, which names the file, if it is not a JSON object.
    """
    refuse_stand_in(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


GENERATION_FILE = "generation_config.json"
MAX_LISTED = 5
"""Number of a run's checkpoints that an error lists; the last ones are listed."""


def read_config_file(directory: Path) -> dict[str, Any]:
    """Return config.json as JSON, with the special ids that `generate` uses.

    Raises CheckpointError if it is missing, and says what the folder is instead.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint: {_what_it_is(directory)}")
    raw = read_json(path)
    if raw.get("quantization_config"):  # the integers of 8-bit weights would pass as weights
        raise CheckpointError(
            f"{path}: the weights are quantised (quantization_config): use the original model, or save the model again "
            "after dequantize()"
        )
    rules = RULES.get(kind) if isinstance(kind := raw.get("model_type"), str) else None
    return raw if rules is None else rules.complete(raw, read_generation_file(directory))


def refuse_file_of_folder(file: Path) -> None:
    """Raise CheckpointError if a file is the weights of a folder, whose settings would not be used."""
    if file.suffix in (".safetensors", ".bin") and (file.parent / "config.json").is_file():
        raise CheckpointError(f"{file} is one file of a checkpoint: give its folder, {file.parent}")


def read_generation_file(directory: Path) -> dict[str, Any] | None:
    """Return generation_config.json as JSON, or None if there is no such file."""
    path = directory / GENERATION_FILE
    return read_json(path) if path.is_file() else None


def rules_at(directory: Path) -> Rules:
    """Return the rules of a checkpoint's family. Raises CheckpointError if config.json names no supported family."""
    raw = read_config_file(directory)
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(f"{directory / 'config.json'}: architectures is {architectures!r:.40}, not a list")
    return rules_named(raw.get("model_type"), architectures, directory)


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
    """Return the weight files of a checkpoint, in transformers' order: safetensors, else torch pickles.

    Without any of their usual names, all other safetensors files but those of adapters are taken together. Raises
    CheckpointError if it has none, or if a file that an index names is missing.
    """
    for single, index in ((SAFE, SAFE_INDEX), (PICKLE, PICKLE_INDEX)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _indexed(directory / index)
    if others := sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("adapter_")):
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

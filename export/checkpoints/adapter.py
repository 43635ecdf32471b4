"""Adapters of PEFT (LoRA and the like): a few weights beside a base checkpoint that they name.

`peft` merges them into their base; the whole model is kept in the cache and used from there.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from pathlib import Path

from safetensors.torch import save_file
from transformers import BlipForConditionalGeneration

from engine.errors import CheckpointError
from engine.files.atomic import file_sha256
from export.checkpoints.converted import kept_or_made
from export.checkpoints.files import PICKLE, PICKLE_INDEX, SAFE, SAFE_INDEX, read_json, refuse_stand_in, weight_files
from export.checkpoints.load import load_checkpoint

SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Peft reads the second with torch's weights-only unpickler."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no whole model."""
    whole = any((folder / name).is_file() for name in (SAFE, SAFE_INDEX, PICKLE, PICKLE_INDEX))
    return (folder / SETTINGS).is_file() and not whole


def base_of(adapter: Path) -> str:
    """Return the base checkpoint that an adapter names: a folder or a hub's id.

    Raises CheckpointError without one, without weights, and without peft.
    """
    _weights(adapter)
    settings = read_json(adapter / SETTINGS)
    if settings.get("megatron_config"):  # peft before 0.20 imports whatever module megatron_core names
        raise CheckpointError(
            f"{adapter / SETTINGS} asks for Megatron (megatron_config), which is never loaded: remove it"
        )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{adapter / SETTINGS} names no base checkpoint (base_model_name_or_path): add it")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{adapter} is an adapter (LoRA or the like) of {base}: merging it needs peft (pip install peft), or merge "
            "it yourself with merge_and_unload() and save the whole model"
        ) from error
    return base


def _weights(adapter: Path) -> Path:
    found = next((adapter / name for name in WEIGHTS if (adapter / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{adapter} is an adapter without weights: it needs {' or '.join(WEIGHTS)}")
    refuse_stand_in(found)
    return found


def merge_adapter(adapter: Path, base: Path) -> Path:
    """Return a Hugging Face directory of `base` with the adapter merged into its weights, made once into the cache.

    Image processor and tokenizer are the adapter's own where it has them. Raises CheckpointError without peft, and for
    an adapter that cannot be merged or does not fit the base.
    """
    files = [*_settings_files(base), *_settings_files(adapter), *weight_files(base), _weights(adapter)]
    digest = hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()[:12]

    def write(draft: Path) -> None:
        model = _merged(load_checkpoint(base), adapter)
        save_file({name: one.contiguous().clone() for name, one in model.state_dict().items()}, draft / SAFE)
        for file in (*_settings_files(base), *_settings_files(adapter)):
            if file.name != SETTINGS:
                shutil.copy(file, draft)

    return kept_or_made(f"{adapter.resolve().name}-{digest}", write)


def _settings_files(folder: Path) -> list[Path]:
    """Return configurations and vocabularies of a folder, an adapter's own config.json apart."""
    names = [path for pattern in ("*.json", "*.txt") for path in sorted(folder.glob(pattern))]
    unwanted = {SAFE_INDEX, PICKLE_INDEX} | ({"config.json"} if is_adapter(folder) else set())
    return [path for path in names if path.name not in unwanted]


def _merged(model: BlipForConditionalGeneration, adapter: Path) -> BlipForConditionalGeneration:
    from peft import PeftConfig, PeftModel

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(str(adapter))
            config.task_type = None  # it would wrap the model for another task's methods
            merged = PeftModel.from_pretrained(model, str(adapter), config=config).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft, torch and safetensors each have kinds of their own
        kind = read_json(adapter / SETTINGS).get("peft_type")
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{adapter}: this {kind} adapter cannot be merged into {base_of(adapter)}: {reason}"
        ) from error
    doubts = [str(one.message) for one in caught if "adapter keys" in str(one.message)]
    if doubts:
        raise CheckpointError(
            f"{adapter} does not fit its base {base_of(adapter)}: {' '.join(doubts[0].split())[:200]}"
        )
    return merged.eval()

"""Find a checkpoint by path or Hugging Face Hub id, and convert it to Hugging Face's layout if needed.

Original .pth files and adapters are converted once and cached.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from engine.checkpoints.cache import kept
from engine.checkpoints.files import (
    PICKLE,
    PICKLE_INDEX,
    SAFE,
    SAFE_INDEX,
    read_config_file,
    read_json,
    refuse_file_of_folder,
    refuse_stand_in,
    weight_files,
)
from engine.checkpoints.hub import fetch, is_hub_id
from engine.errors import CheckpointError
from engine.files.atomic import cache_root, file_sha256
from export.checkpoints.load import clean_names, load_checkpoint, read_pickle
from export.families import ORIGINAL

REASON = "the weights cached there decide what is exported"


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """Return the cache folder of a converted checkpoint; if it does not exist yet, `write` fills it. See kept."""
    return kept(cache_root() / "converted" / name, write, lambda folder: (folder / SAFE).is_file(), REASON)


def convert_original(file: Path) -> Path:
    """Convert an original captioning checkpoint (one .pth file) to a cached folder in Hugging Face's layout; return it.

    Raises CheckpointError if the file cannot be read safely, is of another task, or has other sizes than the
    family's published models.
    """
    return cached(f"{file.stem}-{file_sha256(file)[:12]}", lambda draft: _convert(file, draft))


def _convert(file: Path, draft: Path) -> None:
    rules = ORIGINAL.rules
    weights = clean_names(read_pickle(file), file, rules)
    original = rules.convert_original({name: tuple(tensor.shape) for name, tensor in weights.items()}, file)
    ORIGINAL.config_class.from_dict(original.config).save_pretrained(draft)
    save_file({new: weights[name].contiguous().clone() for name, new in original.names.items()}, draft / SAFE)
    for name, text in original.files.items():
        (draft / name).write_text(text, encoding="utf-8")


ADAPTER_SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Weight files of an adapter; peft reads the second with torch's weights-only unpickler."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no full model."""
    has_model = any((folder / name).is_file() for name in (SAFE, SAFE_INDEX, PICKLE, PICKLE_INDEX))
    return (folder / ADAPTER_SETTINGS).is_file() and not has_model


def base_of(adapter: Path) -> str:
    """Return the base checkpoint that an adapter names: a folder or a Hugging Face Hub id.

    Raises CheckpointError if the adapter names no base, if it has no weights, or if peft is not installed.
    """
    _weights(adapter)
    settings = read_json(adapter / ADAPTER_SETTINGS)
    if settings.get("megatron_config"):  # peft before 0.20 imports any module that megatron_core names
        raise CheckpointError(
            f"{adapter / ADAPTER_SETTINGS} asks for Megatron (megatron_config), which is never loaded: remove it"
        )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{adapter / ADAPTER_SETTINGS} has no base_model_name_or_path: add the base checkpoint")
    revision = settings.get("revision")
    if isinstance(revision, str) and revision and "@" not in base and not Path(base).exists():
        base = f"{base}@{revision}"  # the version of the base that the adapter was trained on
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{adapter} is an adapter (such as LoRA) of {base}: merging it needs peft (pip install peft), or merge it "
            "yourself with merge_and_unload() and save the full model"
        ) from error
    return base


def _weights(adapter: Path) -> Path:
    """Return the weight file of an adapter. Raises CheckpointError if it has none."""
    weights = next((adapter / name for name in WEIGHTS if (adapter / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{adapter} is an adapter without weights: it needs {' or '.join(WEIGHTS)}")
    refuse_stand_in(weights)
    return weights


def merge_adapter(adapter: Path, base: Path) -> Path:
    """Merge an adapter into the weights of `base`; return the result, a cached folder in Hugging Face's layout.

    The adapter's image processor and tokenizer, if it has them, override those of the base. Raises CheckpointError if
    peft is not installed, or if the adapter cannot be merged or does not fit the base.
    """
    read_config_file(base)  # raises an error if it is not a checkpoint
    files = [*_settings_files(base), *_settings_files(adapter), *weight_files(base), _weights(adapter)]
    digest = hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()[:12]

    def write(draft: Path) -> None:
        model = _merged(load_checkpoint(base), adapter)
        save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, draft / SAFE)
        for file in (*_settings_files(base), *_settings_files(adapter)):
            if file.name != ADAPTER_SETTINGS:
                shutil.copy(file, draft)

    return cached(f"{adapter.resolve().name}-{digest}", write)


def _settings_files(folder: Path) -> list[Path]:
    """Return the configuration and vocabulary files of a folder, but not an adapter's config.json."""
    names = [path for pattern in ("*.json", "*.txt") for path in sorted(folder.glob(pattern))]
    excluded = {SAFE_INDEX, PICKLE_INDEX} | ({"config.json"} if is_adapter(folder) else set())
    return [path for path in names if path.name not in excluded]


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Return the model with an adapter merged into its weights. Raises CheckpointError if that fails."""
    from peft import PeftConfig, PeftModel

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(str(adapter))
            config.task_type = None  # with a task type, peft wraps the model in the methods of that task
            merged = PeftModel.from_pretrained(model, str(adapter), config=config).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft, torch and safetensors each raise their own exceptions
        kind = read_json(adapter / ADAPTER_SETTINGS).get("peft_type")
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{adapter}: this {kind} adapter cannot be merged into {base_of(adapter)}: {reason}"
        ) from error
    # peft only warns about missing or unexpected keys and would merge a part of the adapter
    mismatches = [str(warning.message) for warning in caught if "adapter keys" in str(warning.message)]
    if mismatches:
        raise CheckpointError(
            f"{adapter} does not fit its base {base_of(adapter)}: {' '.join(mismatches[0].split())[:200]}"
        )
    return merged.eval()


def find_checkpoint(name: str, log: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of a checkpoint.

    `name` is an existing path, or a Hugging Face Hub id: `owner/name` or `owner/name@revision`. An original .pth file
    is converted (convert_original), and an adapter is merged into its base (merge_adapter). Downloads are stored in
    huggingface_hub's cache; private repositories need HF_TOKEN. `log` gets a line for a download. A name that is
    neither a path nor an id is returned unchanged. Raises CheckpointError if the hub does not have the checkpoint or
    does not give access to it, and OutputError if there is no space for it.
    """
    folder = _find(name, log)
    if (folder / ADAPTER_SETTINGS).is_file() and is_adapter(folder):
        return merge_adapter(folder, _find(base_of(folder), log))
    return folder


def _find(name: str, log: Callable[[str], None]) -> Path:
    """Return the folder of a checkpoint as find_checkpoint does, but do not merge an adapter."""
    path = Path(name)
    if path.is_file():
        refuse_file_of_folder(path)
        return convert_original(path)
    return path if path.exists() or not is_hub_id(name) else fetch(name, log).folder

"""Checkpoints that are made into Hugging Face's layout once, and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save_file
from transformers import BlipConfig, BlipForConditionalGeneration

from engine.bundle.manifest import demo_bundle
from engine.errors import CheckpointError
from engine.files.atomic import cache_root, draft_folder, file_sha256, require_private
from engine.files.lock import waiting_lock
from export.checkpoints.files import (
    PICKLE,
    PICKLE_INDEX,
    SAFE,
    SAFE_INDEX,
    read_json,
    read_pickle,
    refuse_stand_in,
    weight_files,
)
from export.checkpoints.load import clean_names, load_checkpoint
from export.checkpoints.settings import OWN_FILE, SETTINGS

REASON = "the weights kept there decide what is exported"


def kept_or_made(name: str, write: Callable[[Path], None]) -> Path:
    """Return the cache's folder `name`; where it is not there yet, `write` fills it.

    One process at a time makes it, the others wait. Neither a half-made folder is kept nor a finished one replaced.
    Raises BackendError where the cache is open to other users, CheckpointError where it cannot be written.
    """
    folder = cache_root() / "converted" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror or error}: set XDG_CACHE_HOME") from error
    _check_private(folder)
    if (folder / SAFE).is_file():  # before the lock, for which a read-only cache has no room
        return folder
    with waiting_lock(folder.with_name(f"{name}.lock")):
        if not (folder / SAFE).is_file():  # else the process that held the lock has made it
            with draft_folder(folder) as draft:
                write(draft)
                shutil.rmtree(folder, ignore_errors=True)  # without weights it is not finished
                draft.rename(folder)
    return folder


def _check_private(folder: Path) -> None:
    """Raise BackendError where another user could have put or changed what is in the cache's folder."""
    require_private(folder.parent, REASON)
    if folder.parent.stat().st_mode & 0o011 and folder.is_dir():  # others may enter it: look at each file, too
        for path in (folder, *folder.iterdir()):
            require_private(path, REASON)


HEAD_WIDTH = 64
"""Of every attention head in BLIP base and large, on both sides."""
RENAMED = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)
"""Their names of the image encoder, and Hugging Face's; the text decoder has the same names in both."""


def convert_original(file: Path) -> Path:
    """Return a Hugging Face directory of the captioning checkpoint in one file, made once into the cache.

    Raises CheckpointError for a file that cannot be read safely, is of another task, or has other sizes than BLIP's.
    """
    return kept_or_made(f"{file.stem}-{file_sha256(file)[:12]}", lambda draft: _convert(file, draft))


def _convert(file: Path, draft: Path) -> None:
    weights = {_renamed(name): tensor for name, tensor in clean_names(read_pickle(file), file).items()}
    wanted = ("vision_model.embeddings.class_embedding", "text_decoder.bert.embeddings.word_embeddings.weight")
    if any(name not in weights for name in wanted):
        raise CheckpointError(f"{file} is no captioning checkpoint of BLIP: it has no visual_encoder and text_decoder")
    weights = {name: one for name, one in weights.items() if name.startswith(("vision_model.", "text_decoder."))}
    config = read_sizes(weights, file)
    config.save_pretrained(draft)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, draft / SAFE)
    size = config.vision_config.image_size
    processor = SETTINGS | {"size": {"height": size, "width": size}, "image_processor_type": "BlipImageProcessor"}
    (draft / OWN_FILE).write_text(json.dumps(processor, indent=1) + "\n")
    shutil.copy(demo_bundle() / "tokenizer.json", draft)  # bert-base-uncased with [DEC] and [ENC], as theirs
    (draft / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=1) + "\n")


TOKENIZER = {
    "tokenizer_class": "BertTokenizerFast",
    "do_lower_case": True,
    "bos_token": "[DEC]",
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "additional_special_tokens": ["[ENC]"],
}


def _renamed(name: str) -> str:
    for pattern, ours in RENAMED:
        found, count = re.subn(pattern, ours, name)
        if count:
            return found
    return name


def read_sizes(weights: dict[str, torch.Tensor], file: Path) -> BlipConfig:
    """Read the sizes off the tensors; what these do not tell is BLIP's own and the default of BlipConfig."""
    table = weights["vision_model.embeddings.position_embedding"]
    patches = weights["vision_model.embeddings.patch_embedding.weight"]
    words = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    tokens = json.loads((demo_bundle() / "tokenizer.json").read_text(encoding="utf-8"))
    known = 1 + max(*tokens["model"]["vocab"].values(), *(token["id"] for token in tokens["added_tokens"]))
    if words.shape[0] != known:
        raise CheckpointError(f"{file} has {words.shape[0]} words, BLIP's own tokenizer {known}: convert it by hand")
    vision = _layers(weights, "vision_model.encoder.layers")
    text = _layers(weights, "text_decoder.bert.encoder.layer")
    return BlipConfig(
        architectures=["BlipForConditionalGeneration"],
        vision_config={
            "hidden_size": table.shape[2],
            "intermediate_size": weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": vision,
            "num_attention_heads": table.shape[2] // HEAD_WIDTH,
            "image_size": math.isqrt(table.shape[1] - 1) * patches.shape[3],
            "patch_size": patches.shape[3],
        },
        text_config={
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "encoder_hidden_size": table.shape[2],
            "intermediate_size": weights["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": text,
            "num_attention_heads": words.shape[1] // HEAD_WIDTH,
            "max_position_embeddings": weights["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        },
    )


def _layers(weights: dict[str, torch.Tensor], part: str) -> int:
    numbers = {int(name.removeprefix(part + ".").split(".")[0]) for name in weights if name.startswith(part + ".")}
    return 1 + max(numbers, default=-1)


ADAPTER_SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Peft reads the second with torch's weights-only unpickler."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no whole model."""
    whole = any((folder / name).is_file() for name in (SAFE, SAFE_INDEX, PICKLE, PICKLE_INDEX))
    return (folder / ADAPTER_SETTINGS).is_file() and not whole


def base_of(adapter: Path) -> str:
    """Return the base checkpoint that an adapter names: a folder or a hub's id.

    Raises CheckpointError without one, without weights, and without peft.
    """
    _weights(adapter)
    settings = read_json(adapter / ADAPTER_SETTINGS)
    if settings.get("megatron_config"):  # peft before 0.20 imports whatever module megatron_core names
        raise CheckpointError(
            f"{adapter / ADAPTER_SETTINGS} asks for Megatron (megatron_config), which is never loaded: remove it"
        )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{adapter / ADAPTER_SETTINGS} has no base_model_name_or_path: add the base checkpoint")
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
            if file.name != ADAPTER_SETTINGS:
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
        kind = read_json(adapter / ADAPTER_SETTINGS).get("peft_type")
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


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
SAFE_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt")
"""Weights, configurations and vocabularies: no code is fetched, let alone run."""
PICKLED_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Fetched only where there is nothing better, and read by torch's weights-only unpickler (files.py)."""


def find_checkpoint(name: str) -> Path:
    """Return the directory of a checkpoint: a path that is there, or a hub's id, `owner/name` or `owner/name@revision`.

    A file of BLIP's first authors is converted (convert_original), an adapter is merged into its base (merge_adapter).
    A hub's files are kept in huggingface_hub's own cache; HF_TOKEN opens private ones. What is neither there nor looks
    like an id is returned as it is. Raises CheckpointError where the hub does not give it.
    """
    found = _find(name)
    if (found / "adapter_config.json").is_file() and is_adapter(found):
        return merge_adapter(found, _find(base_of(found)))
    return found


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return convert_original(path)
    repository, _, revision = name.partition("@")
    if path.exists() or not HUB_ID.fullmatch(repository):
        return path
    try:
        return _fetch(name, repository, revision or None)
    except CheckpointError:
        raise
    except Exception as error:  # requests and httpx, whichever the hub's client stands on, raise kinds of their own
        _explain(name, repository, revision, error)


def _fetch(name: str, repository: str, revision: str | None) -> Path:
    """Fetch what is needed of a repository of the hub; without a connection, return what an earlier call fetched."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        listed = HfApi().model_info(repository, revision=revision).siblings or []
        names = [entry.rfilename for entry in listed]
    except HfHubHTTPError:
        raise  # the hub answered, and said no
    except Exception:  # no connection
        patterns = list(SAFE_FILES)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=True))
    weights = SAFE_FILES if any(file.endswith(".safetensors") for file in names) else (*SAFE_FILES, *PICKLED_FILES)
    if not any(file.endswith((".safetensors", ".bin")) for file in names):
        others = [file for file in names if file.endswith((".pth", ".pt", ".h5", ".msgpack"))]
        raise CheckpointError(
            f"{name} holds no weights that are read from the hub ({', '.join(others[:3]) or 'none at all'}): "
            "fetch a .pth file of BLIP's first authors yourself and give the file"
        )
    return Path(snapshot_download(repository, revision=revision, allow_patterns=list(weights)))


def _explain(name: str, repository: str, revision: str, error: Exception) -> NoReturn:
    """Raise CheckpointError saying in one line why the hub does not give a checkpoint, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        reason = "it is gated: ask for access on its page, then set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"{repository} has no revision {revision}: look at its page"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = "there is no such repository, or it is private: check the name, or set HF_TOKEN"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        reason = "it cannot be reached, and nothing of it is cached: give the folder of a checkpoint"
    else:
        text = " ".join(str(error).split())[:300]
        reason = f"{text}: run the same command again, it goes on where it stopped, or give the folder of a checkpoint"
    raise CheckpointError(f"{name} is no folder here, and the Hugging Face hub does not give it: {reason}") from error

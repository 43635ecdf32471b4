"""A checkpoint by name: a folder here, a file of BLIP's first authors, or an id of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from engine.errors import CheckpointError

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
    if (found / "adapter_config.json").is_file():
        from export.checkpoints.adapter import base_of, is_adapter, merge_adapter  # needs torch, which a hub does not

        if is_adapter(found):
            return merge_adapter(found, _find(base_of(found)))
    return found


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        from export.checkpoints.original import convert_original  # needs torch, too

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

"""A checkpoint by name: a folder here, or an id of the Hugging Face hub, of which only safe files are fetched."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import CheckpointError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
SAFE_FILES = ("*.safetensors", "*.json", "*.txt")
"""Weights, configurations and vocabularies: no pickle and no code is fetched, let alone loaded."""


def find_checkpoint(name: str) -> Path:
    """Return the directory of a checkpoint: a path that is there, or a hub's id, `owner/name` or `owner/name@revision`.

    A hub's files are kept in huggingface_hub's own cache; HF_TOKEN opens private ones. What is neither there nor looks
    like an id is returned as it is. Raises CheckpointError where the hub does not give it.
    """
    repository, _, revision = name.partition("@")
    if Path(name).exists() or not HUB_ID.fullmatch(repository):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(SAFE_FILES)))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{name} is no folder here, and the Hugging Face hub does not give it: {reason}: give the folder of a "
            "checkpoint"
        ) from error

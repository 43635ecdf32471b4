"""A checkpoint's tokenizer, whichever release of transformers wrote it: tokenizer.json is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import CheckpointError
from export.checkpoints.files import read_json

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of a checkpoint. Raises CheckpointError without a usable one."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise CheckpointError(f"{directory} has no usable tokenizer: add tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, use_fast=True)
    except Exception as error:
        if not (directory / "tokenizer.json").is_file():
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{directory} has no usable tokenizer ({reason}): add tokenizer.json") from error
    return _from_tokenizer_json(directory)


def _from_tokenizer_json(directory: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of tokenizer.json with the special tokens that tokenizer_config.json names: what
    transformers 5 writes beside them, 4 does not understand.
    """
    path = directory / "tokenizer_config.json"
    raw = read_json(path) if path.is_file() else {}
    settings: dict[str, Any] = {name: _text(raw[name]) for name in SPECIAL if raw.get(name)}
    extra = raw.get("extra_special_tokens") or raw.get("additional_special_tokens") or []
    if isinstance(extra, list):
        settings["additional_special_tokens"] = [_text(token) for token in extra]
    for name in ("do_lower_case", "strip_accents", "clean_up_tokenization_spaces", "model_max_length"):
        if name in raw:
            settings[name] = raw[name]
    file = directory / "tokenizer.json"
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **settings)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _text(token: Any) -> str:
    """Return a token that is written as text, or as an object with its content."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)

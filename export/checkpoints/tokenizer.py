"""A checkpoint's tokenizer, whichever release of transformers wrote it: tokenizer.json is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import CheckpointError
from export.checkpoints.files import read_json, refuse_stand_in

FILES = ("tokenizer.json", "vocab.txt")
"""Either is enough."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer(directory: Path, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of a checkpoint, whose model has `vocab_size` token embeddings.

    Raises CheckpointError without a usable tokenizer, or for one with ids that the model has no embedding for. Code of
    the checkpoint is never run.
    """
    if not any((directory / name).is_file() for name in FILES):
        raise CheckpointError(_missing(directory))
    for name in (*FILES, *SETTINGS):
        if (directory / name).is_file():
            refuse_stand_in(directory / name)
    tokenizer = _read(directory)
    entries = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if vocab_size is not None and entries > vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {entries} entries, the model {vocab_size} token embeddings: call "
            "model.resize_token_embeddings(len(tokenizer)), train the new ones and save the model again"
        )
    if all(id_ in tokenizer.added_tokens_decoder for id_ in tokenizer.get_vocab().values()) and all(
        token.special for token in tokenizer.added_tokens_decoder.values()
    ):
        raise CheckpointError(
            f"{directory}: every token of the tokenizer is special, so that all captions would be empty: mark only "
            "tokens such as [DEC] as special"
        )
    return tokenizer


def _missing(directory: Path) -> str:
    """Return what to do about a checkpoint without a tokenizer: Trainer saves it only if it is given the processor."""
    config = directory / "config.json"
    base = (read_json(config).get("_name_or_path") if config.is_file() else None) or "BASE"
    return (
        f"{directory} has no tokenizer (tokenizer.json or vocab.txt): copy it and preprocessor_config.json from the "
        f"checkpoint that the training started from, as in AutoProcessor.from_pretrained({str(base)!r})"
        f".save_pretrained({str(directory)!r})"
    )


def _read(directory: Path) -> PreTrainedTokenizerFast:
    path = directory / "tokenizer_config.json"
    if path.is_file() and "auto_map" in read_json(path):
        raise CheckpointError(f"{path} asks for custom code (auto_map), which is never run: remove that entry")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, use_fast=True, trust_remote_code=False)
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

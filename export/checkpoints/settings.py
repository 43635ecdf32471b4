"""Read a checkpoint's tokenizer with transformers, and check its generation settings as `generate` sees them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers.models import WordPiece
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedModel, PreTrainedTokenizerFast

from engine.checkpoints.files import read_json, refuse_stand_in
from engine.checkpoints.settings import configured_settings, verdict
from engine.errors import CheckpointError
from export.families import family_of

FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
"""A tokenizer needs one of these files; vocab.json comes with merges.txt."""
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer(directory: Path, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of a checkpoint; its model has `vocab_size` token embeddings.

    Raises CheckpointError if there is no usable tokenizer, or if it has ids without an embedding in the model. Custom
    code of the checkpoint is never run.
    """
    if not any((directory / name).is_file() for name in FILES):
        raise CheckpointError(_missing(directory))
    for name in (*FILES, *TOKENIZER_SETTINGS):
        if (directory / name).is_file():
            refuse_stand_in(directory / name)
    tokenizer = _read(directory)
    entries = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if vocab_size is not None and entries > vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {entries} entries, but the model has {vocab_size} token embeddings: call "
            "model.resize_token_embeddings(len(tokenizer)), train the new embeddings and save the model again"
        )
    if all(id_ in tokenizer.added_tokens_decoder for id_ in tokenizer.get_vocab().values()) and all(
        token.special for token in tokenizer.added_tokens_decoder.values()
    ):
        raise CheckpointError(
            f"{directory}: every token of the tokenizer is special, so all captions would be empty: mark only "
            "tokens such as [DEC] as special"
        )
    return tokenizer


def tokenizer_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return what restored_tokenizer needs in addition to tokenizer.json."""
    if isinstance(tokenizer.backend_tokenizer.model, WordPiece):
        return {name: tokenizer.init_kwargs.get(name) for name in ("do_lower_case", "strip_accents")}
    return {name: str(getattr(tokenizer, name)) for name in SPECIAL if getattr(tokenizer, name) is not None}


def restored_tokenizer(file: Path, settings: Mapping[str, Any], *, clean_up: bool) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a tokenizer.json with settings from tokenizer_settings."""
    kind = BertTokenizerFast if "do_lower_case" in settings else PreTrainedTokenizerFast
    return kind(tokenizer_file=str(file), clean_up_tokenization_spaces=clean_up, **settings)


def _missing(directory: Path) -> str:
    """Return the error for a checkpoint without a tokenizer. Trainer saves one only if it gets the processor."""
    config = directory / "config.json"
    base = (read_json(config).get("_name_or_path") if config.is_file() else None) or "BASE"
    return (
        f"{directory} has no tokenizer (tokenizer.json, vocab.txt or vocab.json): copy it and preprocessor_config.json "
        f"from the checkpoint that the training started from, as in AutoProcessor.from_pretrained({str(base)!r})"
        f".save_pretrained({str(directory)!r})"
    )


def _read(directory: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a directory by AutoTokenizer or, if that fails, from tokenizer.json alone."""
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
    """Return the tokenizer of tokenizer.json with the special tokens that tokenizer_config.json names.

    The other settings there are ignored, because transformers 4 cannot read all that transformers 5 writes.
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
    """Return the text of a token, which is stored as a string or as an object with its content."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def check_supported(model: PreTrainedModel, checkpoint: Path) -> None:
    """Raise CheckpointError if the checkpoint has generation settings that the engine does not support."""
    family = family_of(model)
    settings = family.generation_config(model).to_diff_dict()
    unknown = {name: value for name, value in settings.items() if verdict(name) == "refused" and value is not None}
    unknown |= family.rules.unsupported(model.config.to_dict())
    if unknown:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
        raise CheckpointError(
            f"{checkpoint} has settings that the engine does not support ({listed}): remove them and export again"
        )


def apply_settings(model: PreTrainedModel, directory: Path) -> None:
    """Give the model the generation settings that `from_pretrained` would read from a checkpoint."""
    settings = {name: setting.value for name, setting in configured_settings(directory).items()}
    family_of(model).apply_settings(model, settings)

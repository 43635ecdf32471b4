"""Read a checkpoint's tokenizer with transformers, and check its generation settings as `generate` sees them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers.models import WordPiece
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedModel, PreTrainedTokenizerFast

from engine.checkpoints.files import read_json, rules_at
from engine.checkpoints.settings import configured_settings, refuse_settings, verdict
from engine.checkpoints.tokenizer import (
    FILE,
    SPECIAL,
    has_tokenizer,
    missing_tokenizer,
    refuse_code,
    refuse_unusable,
    special_settings,
)
from engine.errors import CheckpointError
from export.families import family_of


def read_tokenizer(directory: Path, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of a checkpoint; its model has `vocab_size` token embeddings.

    Raises CheckpointError if there is no usable tokenizer, or if it has ids without an embedding in the model. Custom
    code of the checkpoint is never run.
    """
    if not has_tokenizer(directory):
        raise missing_tokenizer(directory)
    refuse_code(directory)
    tokenizer = _read(directory)
    more = list(rules_at(directory).special_tokens)
    if more and not set(more) & set(tokenizer.get_vocab()):
        tokenizer.add_tokens(more, special_tokens=True)
    special = [id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special]
    refuse_unusable(directory, tokenizer.get_vocab(), special, vocab_size)
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


def _read(directory: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a directory by AutoTokenizer or, if that fails, from tokenizer.json alone."""
    rules, path = rules_at(directory), directory / "tokenizer_config.json"
    # config.json of a checkpoint with custom code may not be readable by transformers, and names no tokenizer
    is_named = not rules.has_native_code or (path.is_file() and "tokenizer_class" in read_json(path))
    kind = {} if is_named else {"tokenizer_type": rules.tokenizer_class.removesuffix("Tokenizer").lower()}
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, use_fast=True, trust_remote_code=False, **kind
        )
    except Exception as error:
        if not (directory / FILE).is_file():
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{directory} has no usable tokenizer ({reason}): add tokenizer.json") from error
    # transformers 4 cannot read all settings that transformers 5 writes
    file = directory / FILE
    settings = special_settings(read_json(path) if path.is_file() else {})
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **settings)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from error


def check_supported(model: PreTrainedModel, checkpoint: Path) -> None:
    """Raise CheckpointError if the checkpoint has generation settings that the engine does not support."""
    family = family_of(model)
    settings = family.generation_config(model).to_diff_dict()
    unknown = {name: value for name, value in settings.items() if verdict(name) == "refused" and value is not None}
    unknown |= family.rules.unsupported(model.config.to_dict())
    refuse_settings(unknown, checkpoint)


def apply_settings(model: PreTrainedModel, directory: Path) -> None:
    """Give the model the generation settings that `from_pretrained` would read from a checkpoint."""
    settings = {name: setting.value for name, setting in configured_settings(directory).items()}
    family_of(model).apply_settings(model, settings)

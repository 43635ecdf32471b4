"""Read a checkpoint's tokenizer with transformers, and check its generation settings as `generate` sees them."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from engine.checkpoints.files import read_json
from engine.checkpoints.settings import configured_settings, refuse_settings, verdict
from engine.checkpoints.tokenizer import (
    FILE,
    has_tokenizer,
    missing_tokenizer,
    refuse_code,
    refuse_unusable,
    special_settings,
)
from engine.errors import CheckpointError
from export.families import family_of
from export.families.modules import IS_5


def read_tokenizer(directory: Path, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of a checkpoint; its model has `vocab_size` token embeddings.

    Raises CheckpointError if there is no usable tokenizer, or if it has ids without an embedding in the model. Custom
    code of the checkpoint is never run.
    """
    if not has_tokenizer(directory):
        raise missing_tokenizer(directory)
    refuse_code(directory)
    tokenizer = _read(directory)
    special = [id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special]
    refuse_unusable(directory, tokenizer.get_vocab(), special, vocab_size)
    return tokenizer


def _read(directory: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a directory by AutoTokenizer or, if that fails, from tokenizer.json alone."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, use_fast=True, trust_remote_code=False)
    except Exception as error:
        if not (directory / FILE).is_file():
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{directory} has no usable tokenizer ({reason}): add tokenizer.json") from error
    # transformers 4 cannot read all settings that transformers 5 writes
    path, file = directory / "tokenizer_config.json", directory / FILE
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
    """Copy the settings of config.json to the generation config. Only transformers 5 needs this; 4 does it itself."""
    if IS_5:
        for name, value in configured_settings(directory).items():
            setattr(family_of(model).generation_config(model), name, value)

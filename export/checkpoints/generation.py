"""Generation settings of a checkpoint: those in text_config, which BLIP's generate reads, whatever release loads them.

transformers 4 takes them into the text decoder's generation config; 5 drops them without a word, so they are put there.
generation_config.json beside config.json is not read by BLIP's generate in either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BlipForConditionalGeneration

from export.checkpoints.files import read_json
from export.checkpoints.releases import IS_5

DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "max_new_tokens": None,
    "min_new_tokens": None,
}
"""Generation settings that stand in a configuration, with their defaults (transformers 4.57, PretrainedConfig)."""


def settings_of_text_config(directory: Path) -> dict[str, Any]:
    """Return the generation settings of config.json's text_config that are not the defaults."""
    text = read_json(directory / "config.json").get("text_config") or {}
    return {
        name: text[name] for name, default in DEFAULTS.items() if text.get(name) is not None and text[name] != default
    }


def apply_settings(model: BlipForConditionalGeneration, directory: Path) -> None:
    """Put the settings of text_config where generate reads them, where the release has not done so."""
    if IS_5:
        for name, value in settings_of_text_config(directory).items():
            setattr(model.text_decoder.generation_config, name, value)


def ignored_settings(directory: Path) -> list[str]:
    """Return a line where generation_config.json asks for something else than text_config: generate ignores it."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    own = settings_of_text_config(directory)
    other = {
        name: value
        for name, value in read_json(path).items()
        if name in DEFAULTS and value is not None and value != own.get(name, DEFAULTS[name])
    }
    listed = ", ".join(f"{name}={value!r}" for name, value in sorted(other.items()))
    return [f"{path.name} asks for {listed}: BLIP's generate reads text_config in config.json alone"] if listed else []

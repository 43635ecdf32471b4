"""Generation settings of a checkpoint: those in text_config, which BLIP's generate reads, whatever release loads them.

transformers 4 takes them into the text decoder's generation config; 5 drops them without a word, so they are put there.
generation_config.json beside config.json is not read by BLIP's generate in either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BlipForConditionalGeneration

from engine.errors import CheckpointError
from engine.options import GENERATION_SETTINGS
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


WITHOUT_EFFECT = (
    # ids come from text_config, caching and bookkeeping change no caption
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "low_memory"),
    *("_from_model_config", "transformers_version", "return_dict_in_generate", "return_legacy_cache"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("disable_compile", "compile_config", "max_cache_len"),
    # these count only when captions are drawn, and a checkpoint that asks for that is refused
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    # and these only beside a second model, which a checkpoint cannot bring
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight", "target_lookbehind"),
    "max_matching_ngram_size",
)
"""Settings that may differ from Hugging Face's defaults without changing what `generate` says."""


def verdict(setting: str) -> str:
    """Return what becomes of a field of GenerationConfig: "yes", "no effect", or "refused" where it is not neutral."""
    if setting in GENERATION_SETTINGS:
        return "yes"
    return "no effect" if setting in WITHOUT_EFFECT else "refused"


def check_supported(model: BlipForConditionalGeneration, checkpoint: Path) -> None:
    """Raise CheckpointError for settings under which Hugging Face would caption in ways the engine cannot."""
    text = model.config.text_config
    settings = model.text_decoder.generation_config.to_diff_dict()
    unknown = {name: value for name, value in settings.items() if verdict(name) == "refused" and value is not None}
    if getattr(text, "position_embedding_type", "absolute") != "absolute":
        unknown["position_embedding_type"] = text.position_embedding_type
    if unknown:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
        raise CheckpointError(
            f"{checkpoint} asks for what the engine does not do ({listed}): remove it and export again"
        )


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

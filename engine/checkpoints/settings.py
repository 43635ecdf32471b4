"""Read a checkpoint's image processor and generation settings, as transformers 4 and 5 write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.checkpoints.files import GENERATION_FILE, read_config_file, read_generation_file, read_json, rules_at
from engine.checkpoints.rules import DEFAULTS, OTHER_DEFAULTS, Rules, Settings
from engine.errors import CheckpointError
from engine.options import GENERATION_SETTINGS

OWN_FILE, NESTING_FILE = "preprocessor_config.json", "processor_config.json"
"""transformers 4 writes the first file; 5 writes only the second, with the image processor nested in it."""


@dataclass(frozen=True)
class ProcessorSettings:
    """Settings of an image processor, and the file they come from (None if the checkpoint has no such file)."""

    values: dict[str, Any]
    file: Path | None
    rules: Rules

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the encoder gets."""
        return height_width(self.values)

    def for_size(self, side: int) -> dict[str, Any]:
        """Return the settings for square images of `side` px. Before a crop, images keep their share of its size."""
        if self.size == (side, side):
            return self.values
        square = {"height": side, "width": side}
        if not self.values.get("do_center_crop"):
            return self.values | {"size": square}
        factor = side / min(self.size)
        size = {name: round(edge * factor) for name, edge in self.values["size"].items()}
        return self.values | {"size": size, "crop_size": square}


def height_width(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width in pixels after an image processor with these settings has resized and cropped."""
    size = settings["crop_size" if settings.get("do_center_crop") else "size"]
    return size["height"], size["width"]


def size_before_crop(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return ImageSpec.resize for an image processor with these settings: empty if it crops nothing."""
    size = settings["size"]
    if not settings.get("do_center_crop"):
        return ()
    if "shortest_edge" in size:
        return (size["shortest_edge"],)
    resized = size["height"], size["width"]
    return () if resized == height_width(settings) else resized


def read_processor(directory: Path) -> ProcessorSettings:
    """Read the image processor of a checkpoint, or return the family's default settings if it has none.

    Raises CheckpointError if two files differ, if the processor belongs to another model, or if a setting changes
    pixels in a way that the engine does not support.
    """
    files = [(path, raw) for path, raw in _candidates(directory) if raw is not None]
    rules = rules_at(directory)
    config = read_config_file(directory)
    if not files:
        known = rules.processor_for(None, config)
        assert known is not None, "each family has a default"
        return ProcessorSettings({**known.settings, "image_processor_type": known.kind}, None, rules)
    settings = [_checked(path, raw, rules, config) for path, raw in files]
    if any(other != settings[0] for other in settings[1:]):
        differ = sorted(name for name in settings[0] if settings[0][name] != settings[1].get(name))
        raise CheckpointError(
            f"{directory}: {OWN_FILE} and {NESTING_FILE} differ in {', '.join(differ)}: delete the wrong file"
        )
    return ProcessorSettings(settings[0], files[0][0], rules)


def assumed_settings(directory: Path) -> list[str]:
    """Return a note if a checkpoint has no image processor: default settings are used and may be wrong."""
    processor = read_processor(directory)
    if processor.file is not None:
        return []
    return [
        f"{directory} has no {OWN_FILE}: images are resized and normalised with {processor.rules.name}'s default "
        "settings (bicubic, its mean and std). If the model was trained with others, copy the file from the "
        "checkpoint it was trained from"
    ]


def _candidates(directory: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """Return both files that can hold an image processor, each with its settings, or None if it has none."""
    own, nesting = directory / OWN_FILE, directory / NESTING_FILE
    nested = read_json(nesting).get("image_processor") if nesting.is_file() else None
    if nested is not None and not isinstance(nested, dict):
        raise CheckpointError(f"{nesting}: image_processor is not a JSON object")
    return [(own, read_json(own) if own.is_file() else None), (nesting, nested)]


def _checked(path: Path, raw: dict[str, Any], rules: Rules, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file, completed with the defaults. Raises CheckpointError for an unsupported setting."""
    kind = raw.get("image_processor_type") or raw.get("feature_extractor_type")
    known = rules.processor_for(None if kind is None else str(kind), config)
    if known is None:
        needed = rules.processor_for(None, config)
        assert needed is not None, "each family has a default"
        raise CheckpointError(
            f"{path} is for {kind}, but {rules.name} needs {needed.kind}: copy the file from a {rules.name} checkpoint"
        )
    if raw.get("auto_map") and not rules.has_native_code:
        raise CheckpointError(f"{path} asks for custom code (auto_map), which is never run: remove that entry")
    others = sorted(
        name for name, value in raw.items() if name not in known.settings and name not in known.without_effect and value
    )
    if others:
        listed = ", ".join(f"{name}={raw[name]!r}" for name in others)
        raise CheckpointError(f"{path} has settings that the engine does not support ({listed}): remove them")
    values = dict(known.settings) | {name: raw[name] for name in known.settings if raw.get(name) is not None}
    # transformers' slow processors skip a step whose switch is null; the fast ones take the default, as for one missing
    if not str(kind).endswith("Fast"):
        values |= {n: False for n in known.settings if n.startswith("do_") and n in raw and raw[n] is None}
    values["image_processor_type"] = known.kind
    values["size"] = _size(path, values["size"], rules, by_edge="shortest_edge" in known.settings["size"])
    if "crop_size" in values:
        values["crop_size"] = _size(path, values["crop_size"], rules)
    if "shortest_edge" in values["size"] and not values["do_center_crop"]:
        raise CheckpointError(f"{path} keeps the aspect ratio of images (do_center_crop=False): set it to true")
    if values["do_convert_rgb"] is not True:
        values["do_convert_rgb"] = True  # the engine converts every image to RGB, as callers of generate do
    for name in ("image_mean", "image_std"):
        values[name] = _channels(path, name, values[name])
    above_zero = {"image_std": values["image_std"], "rescale_factor": [values["rescale_factor"]]}
    for name, numbers in ({"image_mean": values["image_mean"]} | above_zero).items():
        is_valid = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        if not is_valid or (name in above_zero and min(numbers) <= 0):
            limits = "finite and above 0" if name in above_zero else "finite"
            raise CheckpointError(
                f"{path}: {name} is {values[name]!r}, but it must be {limits}: copy the file from the checkpoint that "
                "the training started from"
            )
    if values["resample"] not in range(6):
        raise CheckpointError(f"{path}: resample {values['resample']!r} is not one of Pillow's filters (0 to 5)")
    if not values["do_resize"]:
        raise CheckpointError(
            f"{path} has a setting that the engine does not support (do_resize=False): remove it and export again"
        )
    return values


def _size(path: Path, size: Any, rules: Rules, *, by_edge: bool = False) -> dict[str, int]:
    """Return a size as height and width in pixels or, if `by_edge`, perhaps as shortest_edge.

    Raises CheckpointError if it is not a size.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        size = {"shortest_edge": size} if by_edge else {"height": size, "width": size}
    is_edge = by_edge and isinstance(size, dict) and set(size) == {"shortest_edge"}
    names = ("shortest_edge",) if is_edge else ("height", "width")
    if not isinstance(size, dict) or not set(names) <= set(size):
        raise CheckpointError(f"{path} has the size {size!r}, but {rules.name} needs a height and a width in pixels")
    if not all(type(size[name]) in (int, float) and 1 <= size[name] < math.inf for name in names):
        raise CheckpointError(f"{path} has the size {size!r}, but height and width must be numbers of at least 1")
    return {name: int(size[name]) for name in names}


def _channels(path: Path, name: str, value: Any) -> list[float]:
    """Return three numbers, one per channel; a single number applies to all channels."""
    values = [value] * 3 if isinstance(value, int | float) else value
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(number, int | float) for number in values)
    ):
        raise CheckpointError(
            f"{path}: {name} is {value!r}, but it must be a number, or three numbers for three channels"
        )
    return [float(number) for number in values]


IGNORED_SETTINGS = (
    # ids come from config.json; caching and bookkeeping do not change captions
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "low_memory"),
    *("_from_model_config", "transformers_version", "return_dict_in_generate", "return_legacy_cache"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("disable_compile", "compile_config", "max_cache_len"),
    # these apply to sampling only, and a checkpoint that asks for sampling is refused
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    # these apply to assisted generation with a second model, which a checkpoint cannot contain
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight", "target_lookbehind"),
    "max_matching_ngram_size",
)
"""Settings that may differ from Hugging Face's defaults without changing the captions of `generate`."""


def verdict(setting: str) -> str:
    """Return whether the engine supports a field of GenerationConfig: "yes", "no effect" or "refused".

    A "refused" field is accepted if it has its neutral value.
    """
    if setting in GENERATION_SETTINGS:
        return "yes"
    return "no effect" if setting in IGNORED_SETTINGS else "refused"


class Setting(NamedTuple):
    """The value of a generation setting and its source, such as "generation_config.json"."""

    value: Any
    source: str


def settings_sources(directory: Path) -> list[Settings]:
    """Return where `generate` reads the settings of a checkpoint, see Rules.settings."""
    raw = read_json(directory / "config.json")
    return rules_at(directory).settings(raw, read_generation_file(directory))


def configured_settings(directory: Path) -> dict[str, Setting]:
    """Return the generation settings of a checkpoint that differ from the defaults, with their sources."""
    found: dict[str, Setting] = {}
    neutral = DEFAULTS | OTHER_DEFAULTS
    for source, values in settings_sources(directory):
        # config.json has many entries that are no generation settings
        for name in values if source == GENERATION_FILE else neutral:
            value = values.get(name)
            if name not in found and value is not None and value != neutral.get(name):
                found[name] = Setting(value, source)
    return {name: setting for name, setting in found.items() if verdict(name) != "no effect"}


def generation_settings(directory: Path) -> dict[str, Any]:
    """Return the generation settings of a checkpoint that the engine honours, as a bundle records them."""
    settings = configured_settings(directory)
    return {name: settings[name].value for name in GENERATION_SETTINGS if name in settings}


def refuse_unsupported(directory: Path, rules: Rules, raw: Mapping[str, Any]) -> None:
    """Raise CheckpointError if config.json has settings, of generation or of the model, that are not supported."""
    settings = configured_settings(directory)
    unknown = {name: value for name, (value, _) in settings.items() if verdict(name) == "refused"}
    refuse_settings(unknown | rules.unsupported(raw), directory)


def refuse_settings(unknown: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointError if there are settings that the engine does not support."""
    if unknown:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
        raise CheckpointError(
            f"{checkpoint} has settings that the engine does not support ({listed}): remove them and export again"
        )


def ignored_settings(directory: Path) -> list[str]:
    """Return a note if the file that `generate` ignores differs from the settings that it reads.

    The file is generation_config.json or, if that is read, config.json.
    """
    sources, generation = settings_sources(directory), read_generation_file(directory)
    if generation is None:
        return []
    file, values = GENERATION_FILE, generation
    if sources[0].source == GENERATION_FILE:
        file, values = "config.json", read_json(directory / "config.json")
    own = configured_settings(directory)
    other = {
        name: value
        for name, value in values.items()
        if name in DEFAULTS and value is not None and value != (own[name].value if name in own else DEFAULTS[name])
    }
    listed = ", ".join(f"{name}={value!r}" for name, value in sorted(other.items()))
    return (
        [
            f"{file} sets {listed}, which is ignored: {rules_at(directory).name}'s generate reads only "
            f"{sources[0].source}"
        ]
        if listed
        else []
    )

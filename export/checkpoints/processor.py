"""What makes pixels of pictures: the image processor's settings, wherever a release of transformers wrote them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from export.checkpoints.files import read_json
from export.checkpoints.releases import BlipImageProcessor

OWN_FILE, NESTING_FILE = "preprocessor_config.json", "processor_config.json"
"""transformers 4 writes the first; 5 writes the second alone, with the image processor nested in it."""

SETTINGS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 384, "width": 384},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
"""What BlipImageProcessor knows, with its defaults (the same in transformers 4.57 and 5)."""
WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "auto_map"),
    *("data_format", "input_data_format", "default_to_square", "device", "disable_grouping", "return_tensors"),
    *("image_seq_length", "num_query_tokens", "crop_size", "pad_size", "size_divisor", "transformers_version"),
}
"""Keys that change no pixel of a BLIP processor."""


@dataclass(frozen=True)
class ProcessorSettings:
    """Settings of an image processor and the file they come from; None without one."""

    values: dict[str, Any]
    file: Path | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in px."""
        return self.values["size"]["height"], self.values["size"]["width"]

    def build(self) -> BlipImageProcessor:
        """Return Hugging Face's processor of these settings."""
        return BlipImageProcessor(**self.values)


def read_processor(directory: Path) -> ProcessorSettings:
    """Read the image processor of a checkpoint, BLIP's own where it has none.

    Raises CheckpointError for two files that differ, for another model's processor, and for settings that change pixels
    in ways the engine does not.
    """
    found = [(path, raw) for path, raw in _candidates(directory) if raw is not None]
    if not found:
        return ProcessorSettings(dict(SETTINGS), None)
    settings = [_checked(path, raw) for path, raw in found]
    if any(other != settings[0] for other in settings[1:]):
        differ = sorted(name for name in SETTINGS if settings[0][name] != settings[1][name])
        raise CheckpointError(
            f"{directory}: {OWN_FILE} and {NESTING_FILE} differ in {', '.join(differ)}: remove the wrong one"
        )
    return ProcessorSettings(settings[0], found[0][0])


def assumed_settings(directory: Path) -> list[str]:
    """Return a line about a checkpoint without an image processor: the settings are BLIP's own, and may be wrong."""
    if read_processor(directory).file is not None:
        return []
    return [
        f"{directory} has no {OWN_FILE}: images are resized and normalised with BLIP's own settings (bicubic, its mean "
        "and std); if the model was trained with others, copy the file from the checkpoint the training started from"
    ]


def _candidates(directory: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    own, nesting = directory / OWN_FILE, directory / NESTING_FILE
    nested = read_json(nesting).get("image_processor") if nesting.is_file() else None
    if nested is not None and not isinstance(nested, dict):
        raise CheckpointError(f"{nesting}: image_processor is not a JSON object")
    return [(own, read_json(own) if own.is_file() else None), (nesting, nested)]


def _checked(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file, completed by the defaults. Raises CheckpointError naming what is not done."""
    kind = raw.get("image_processor_type") or raw.get("feature_extractor_type") or "BlipImageProcessor"
    if not str(kind).startswith("Blip"):
        raise CheckpointError(f"{path} is of a {kind}: BLIP's images are made by BlipImageProcessor")
    if raw.get("auto_map"):
        raise CheckpointError(f"{path} asks for custom code (auto_map), which is never run: remove that entry")
    others = sorted(
        name for name, value in raw.items() if name not in SETTINGS and name not in WITHOUT_EFFECT and value
    )
    if others:
        listed = ", ".join(f"{name}={raw[name]!r}" for name in others)
        raise CheckpointError(f"{path} asks for what is not done to images here ({listed}): remove it")
    values = dict(SETTINGS) | {name: raw[name] for name in SETTINGS if raw.get(name) is not None}
    values["size"] = _size(path, values["size"])
    if values["do_convert_rgb"] is not True:
        values["do_convert_rgb"] = True  # every picture is made RGB, as generate's callers do
    for name in ("image_mean", "image_std"):
        values[name] = _channels(path, name, values[name])
    above_zero = {"image_std": values["image_std"], "rescale_factor": [values["rescale_factor"]]}
    for name, numbers in ({"image_mean": values["image_mean"]} | above_zero).items():
        is_valid = all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)
        if not is_valid or (name in above_zero and min(numbers) <= 0):
            raise CheckpointError(
                f"{path}: {name} is {values[name]!r}, it must be finite{' and above 0' if name in above_zero else ''}: "
                "copy the file from the checkpoint that the training started from"
            )
    if values["resample"] not in range(6):
        raise CheckpointError(f"{path}: resample {values['resample']!r} is no filter of Pillow (0 to 5)")
    if not values["do_resize"]:
        raise CheckpointError(
            f"{path} asks for what the engine does not do (do_resize=False): remove it and export again"
        )
    return values


def _size(path: Path, size: Any) -> dict[str, int]:
    if isinstance(size, int) and not isinstance(size, bool):
        size = {"height": size, "width": size}
    if not isinstance(size, dict) or not {"height", "width"} <= set(size):
        raise CheckpointError(f"{path} gives the size {size!r}: BLIP needs a height and a width in pixels")
    if not all(type(size[name]) in (int, float) and 1 <= size[name] < math.inf for name in ("height", "width")):
        raise CheckpointError(f"{path} gives the size {size!r}: a height and a width are numbers of at least 1")
    return {name: int(size[name]) for name in ("height", "width")}


def _channels(path: Path, name: str, value: Any) -> list[float]:
    """Return three numbers, one a channel; a single one is for all of them."""
    values = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(one, int | float) for one in values):
        raise CheckpointError(f"{path}: {name} is {value!r}, not a number a channel")
    return [float(one) for one in values]

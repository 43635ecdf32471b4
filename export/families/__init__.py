"""Families of captioning models. Each is one module here; the rest of the code asks `family_of` or `family_at`.

What their checkpoints look like is in engine/checkpoints.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from engine.checkpoints.files import rules_at
from export.families.blip import Blip
from export.families.florence2 import Florence2
from export.families.git import Git
from export.families.image_prefix import ImagePrefix
from export.families.modules import Family, PublishedFamily
from export.families.vision_encoder_decoder import VisionEncoderDecoder

ORIGINAL = Blip()
"""The family whose checkpoints in the authors' own layout (one .pth file) are converted."""
FAMILIES: dict[str, Family] = {
    family.rules.model_type: family for family in (ORIGINAL, VisionEncoderDecoder(), Git(), ImagePrefix(), Florence2())
}
"""Families by `model_type` in config.json."""


PUBLISHED: dict[str, PretrainedConfig] = {
    name: config
    for family in FAMILIES.values()
    if isinstance(family, PublishedFamily)
    for name, config in family.published().items()
}
"""Published architectures whose graphs are in the wheel, by name. Their settings come from transformers' default
configurations and conversion scripts."""


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a model."""
    return family_for(model.config)


def family_for(config: PretrainedConfig) -> Family:
    """Return the family of a configuration."""
    return FAMILIES[config.model_type]


def family_at(directory: Path) -> Family:
    """Return the family of a checkpoint. Raises CheckpointError if its config.json names none that is supported."""
    return FAMILIES[rules_at(directory).model_type]

"""Families of captioning models. Each is one module here; the rest of the code asks `family_of` or `family_named`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from engine.errors import CheckpointError
from export.families.blip import Blip
from export.families.modules import Family

ORIGINAL = Blip()
"""The family whose checkpoints in the authors' own layout (one .pth file) are converted."""
FAMILIES: dict[str, Family] = {family.model_type: family for family in (ORIGINAL,)}
"""Families by `model_type` in config.json."""


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a model."""
    return FAMILIES[model.config.model_type]


def family_named(model_type: object, architectures: Sequence[str], source: Path) -> Family:
    """Return the family of a checkpoint by `model_type` and `architectures` in its config.json.

    Raises CheckpointError, which names the known families, for others and for models that do not caption.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (architectures and family.architecture not in architectures):
        known = FAMILIES.values()
        raise CheckpointError(
            f"{source} is not a {' or '.join(family.name for family in known)} captioning checkpoint: model_type "
            f"{model_type!r}, architectures {architectures}; expected "
            f"{' or '.join(f'{family.model_type!r} and {family.architecture}' for family in known)}"
        )
    return family

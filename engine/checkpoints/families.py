"""Model families whose checkpoints can be read. Each is one module here: what its files look like (rules.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.checkpoints.blip import BlipRules
from engine.checkpoints.florence2 import Florence2Rules
from engine.checkpoints.git import GitRules
from engine.checkpoints.image_prefix import ImagePrefixRules
from engine.checkpoints.rules import Rules
from engine.checkpoints.vision_encoder_decoder import VisionEncoderDecoderRules
from engine.errors import CheckpointError

ORIGINAL = BlipRules()
"""The family whose checkpoints in the authors' own layout (one .pth file) are converted."""
RULES: dict[str, Rules] = {
    rules.model_type: rules
    for rules in (ORIGINAL, VisionEncoderDecoderRules(), GitRules(), ImagePrefixRules(), Florence2Rules())
}
"""Families by `model_type` in config.json."""


def rules_named(model_type: object, architectures: Sequence[str], source: Path) -> Rules:
    """Return the rules of a checkpoint's family by `model_type` and `architectures` in its config.json.

    Raises CheckpointError, which names the known families, for others and for models that do not caption.
    """
    rules = RULES.get(model_type) if isinstance(model_type, str) else None
    if rules is None or (architectures and rules.architecture not in architectures):
        known = RULES.values()
        raise CheckpointError(
            f"{source} is not a {' or '.join(rules.name for rules in known)} captioning checkpoint: model_type "
            f"{model_type!r}, architectures {architectures}; expected "
            f"{' or '.join(f'{rules.model_type!r} and {rules.architecture}' for rules in known)}"
        )
    return rules

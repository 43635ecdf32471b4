"""What becomes of the generation settings of a checkpoint, field by field."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import GenerationConfig

from engine.options import GENERATION_SETTINGS
from export.checkpoints.settings import DEFAULTS, WITHOUT_EFFECT, verdict

PAGE = Path(__file__).parents[3] / "docs/generation-config.md"


def test_the_page_names_every_field_with_what_the_export_does():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    missing = (set(GenerationConfig().to_dict()) | set(DEFAULTS)) - set(rows)
    assert not missing
    assert rows == {name: verdict(name) for name in rows}
    assert not set(GENERATION_SETTINGS) & set(WITHOUT_EFFECT)

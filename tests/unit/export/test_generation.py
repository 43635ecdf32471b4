"""How the export treats each generation setting of a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import GenerationConfig

from engine.checkpoints.rules import DEFAULTS
from engine.checkpoints.settings import IGNORED_SETTINGS, verdict
from engine.options import GENERATION_SETTINGS

PAGE = Path(__file__).parents[3] / "docs/generation-config.md"


def test_page_lists_every_field_and_its_effect():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    missing = (set(GenerationConfig().to_dict()) | set(DEFAULTS)) - set(rows)
    assert not missing
    assert rows == {name: verdict(name) for name in rows}
    assert not set(GENERATION_SETTINGS) & set(IGNORED_SETTINGS)

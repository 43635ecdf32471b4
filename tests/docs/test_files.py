"""Compare docs/files.md with the suffixes and column names that the code accepts."""

from __future__ import annotations

import re
from pathlib import Path

from engine.inputs.columns import CAPTION_COLUMNS, ID_COLUMNS
from engine.inputs.kinds import HEIC, SUFFIXES

PAGE = (Path(__file__).parents[2] / "docs/files.md").read_text()


def test_image_suffixes_are_complete():
    table = PAGE.partition("## Images")[2].partition("\n\n*")[0]
    assert set(re.findall(r"\.[a-z0-9]+", table)) == SUFFIXES | HEIC


def test_table_columns_are_complete():
    listed = set(re.findall(r"\w+", PAGE.partition("## Tables")[2].partition("Separated")[0].lower()))
    assert {*ID_COLUMNS, *CAPTION_COLUMNS} <= listed

"""What docs/ says of files is what the code reads."""

from __future__ import annotations

import re
from pathlib import Path

from engine.inputs.columns import CAPTION_COLUMNS, ID_COLUMNS
from engine.inputs.kinds import HEIC, SUFFIXES

PAGE = (Path(__file__).parents[2] / "docs/files.md").read_text()


def test_the_suffixes_of_images_are_those_that_are_read():
    table = PAGE.partition("## Images")[2].partition("\n\n*")[0]
    assert set(re.findall(r"\.[a-z0-9]+", table)) == SUFFIXES | HEIC


def test_the_columns_of_tables_are_those_that_are_read():
    listed = set(re.findall(r"\w+", PAGE.partition("## Tables")[2].partition("Separated")[0].lower()))
    assert {*ID_COLUMNS, *CAPTION_COLUMNS} <= listed

"""Tables of prompts."""

from __future__ import annotations

import pytest

from engine.errors import DataError
from engine.inputs.tables import read_prompts


def test_prompts_by_id_or_file_name_may_be_empty_or_quoted(tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text('ID,modality,Prompt\na.png,ct,"ct of the chest, axial"\nb,mri,\nother,us,us\n')
    assert read_prompts(table, ["b", "a"]) == {"a": "ct of the chest, axial", "b": ""}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ID,prompt\na,x\n", r"prompts.csv has no prompt for 2 of 3 images \(b, c\): add their rows"),
        ("ID,text\na,x\nb,y\nc,z\n", "prompts.csv has no column 'prompt', only text"),
        ("ID,prompt\na,x\na,y\n", "id a is repeated"),
        ("ID,prompt\na,x\na.png,y\nb,\nc,\n", "are two names of a|id a is repeated"),
    ],
)
def test_missing_or_repeated_prompts_are_reported(text, sentence, tmp_path):
    (tmp_path / "prompts.csv").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_prompts(tmp_path / "prompts.csv", ["a", "b", "c"])

"""The tokenizer, detokenising and the rows of run.csv."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bundle.manifest import Bundle
from engine.bundle.tokenizer import CaptionTokenizer, clean_up, detokenise
from engine.errors import BundleError, UsageError
from engine.run.outputs import format_row, write_run

BUNDLE = Bundle.load()
TOKENIZER = CaptionTokenizer(BUNDLE)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("sagittal t2 - weighted mri of the thoracic spine.", "sagittal t2-weighted mri of the thoracic spine."),
        ("contrast - enhanced image ( white arrow ).", "contrast-enhanced image (white arrow)."),
        ("a 3 . 5 cm mass", "a 3.5 cm mass"),
        ("1 , 200 images", "1,200 images"),
        ("images 1, 2 and 3", "images 1, 2 and 3"),
        ("anterior / posterior view", "anterior/posterior view"),
        ("the patient ' s chest", "the patient's chest"),
        ("50 % of the lumen : [ arrow ]", "50% of the lumen: [arrow]"),
        ("l3 - l4 - l5", "l3-l4-l5"),
        ("", ""),
    ],
)
def test_detokenise_removes_spaces_around_punctuation(raw, expected):
    assert detokenise(raw) == expected


@given(st.lists(st.integers(0, 30523), max_size=12))
@settings(max_examples=300, deadline=None)
def test_decode_equals_the_tokenizers_library(ids):
    """Includes special tokens anywhere, captions that start with a word piece, punctuation and unknown ids."""
    tokens = BUNDLE.tokens
    words = [i for i in ids if i not in (tokens.bos, tokens.eos, tokens.pad)]
    assert TOKENIZER.decode(ids) == clean_up(TOKENIZER._tokenizer.decode(words, skip_special_tokens=True))


def test_prompt_outside_the_vocabulary_is_refused():
    size = TOKENIZER.prompt_ids("hippocampus")[-1]
    smaller = CaptionTokenizer(replace(BUNDLE, model=replace(BUNDLE.model, vocab_size=size)))
    with pytest.raises(
        UsageError, match=r"the prompt 'a hippocampus' contains a token that the model of .* no embedding"
    ):
        smaller.prompt_ids("a hippocampus")
    with pytest.raises(UsageError, match="the banned word 'hippocampus' contains a token"):
        smaller.bad_words_ids(["hippocampus"])
    assert len(CaptionTokenizer(replace(BUNDLE, model=replace(BUNDLE.model, vocab_size=30524))).prompt_ids("a")) == 2


def test_tokenizer_with_only_special_tokens_is_refused(tmp_path):
    content = json.loads((BUNDLE.path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {token["content"]: token["id"] for token in content["added_tokens"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"tokenizer\.json: every token is special"):
        CaptionTokenizer(replace(BUNDLE, path=tmp_path))


def test_clean_up_follows_transformers():
    assert clean_up("it ' s a mass , isn ' t it ? no .") == "it's a mass, isn't it? no."


@pytest.mark.parametrize(
    ("image_id", "caption", "row"),
    [
        ("ID1", 'CT, "axial" view', 'ID1,"CT, ""axial"" view"\n'),
        ("ID1", "two\r\nlines\u2028and\x00more\t", 'ID1,"two lines and more"\n'),
        ("ID1", "", 'ID1,""\n'),
        ("a,b", "x", '"a,b","x"\n'),
    ],
)
def test_rows_quote_captions_and_stay_on_one_line(image_id, caption, row):
    assert format_row(image_id, caption) == row


@given(st.text(), st.text(min_size=1))
def test_any_row_is_read_back_as_two_fields(caption, image_id):
    (record,) = csv.reader(io.StringIO(format_row(image_id, caption), newline=""))
    assert len(record) == 2
    assert record[0] == image_id


def test_run_csv_has_header_and_unix_line_ends(tmp_path):
    write_run(tmp_path / "run.csv", [("b", "second é"), ("a", "first")])
    assert (tmp_path / "run.csv").read_bytes() == 'ID,Caption\nb,"second é"\na,"first"\n'.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["run.csv"]


def test_detokenising_gains_what_the_readme_states():
    from tests.helpers.legends import measure

    scores = measure(300)
    assert scores["raw"] <= scores["hugging_face_clean_up"] < 0.8 < 0.97 < scores["ours"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level tokenizer of the engine and transformers' own, whose pad id is an ordinary token."""
    from engine.bundle.manifest import TokenIds
    from tests.helpers.tiny_pairs import tokenizer_for

    folder = tmp_path_factory.mktemp("bytes")
    theirs = tokenizer_for("gpt2", folder)
    (folder / "tokenizer.json").write_text(theirs.backend_tokenizer.to_str())
    model = replace(BUNDLE.model, vocab_size=len(theirs))
    bundle = replace(BUNDLE, path=folder, model=model, tokens=TokenIds(0, 0, 5), clean_up_tokenization_spaces=False)
    return CaptionTokenizer(bundle), theirs


def test_byte_level_text_equals_transformers(byte_level):
    ours, theirs = byte_level
    ids = [0, *theirs("axial ct of the chest, t2-weighted ( 3.5 cm )")["input_ids"], 5, 0]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.tidy(" ct of  the chest ( 3 . 5 cm ) ") == "ct of the chest ( 3 . 5 cm )"


def test_byte_level_banned_words_have_two_spellings(byte_level):
    ours, theirs = byte_level
    first, later = (tuple(theirs(text)["input_ids"]) for text in ("chest", " chest"))
    assert first != later
    assert ours.bad_words_ids(["chest", " chest"]) == (first, later)


def test_word_pieces_have_one_spelling():
    assert len(TOKENIZER.bad_words_ids(["hippocampus"])) == 1

"""Lookup of ids: a name finds its image in any spelling, and never another image."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataError
from engine.inputs.ids import Ids, join_some, shown
from engine.inputs.kinds import SUFFIXES, image_id

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\#\0\n\r", exclude_categories=("Cs",)), min_size=1
).filter(lambda name: not name.startswith(".") and image_id(name) == name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", "a"),
        ("x/y/a.JPEG", "a"),
        ("x\\a.png", "a"),
        ("1.2.840.113619", "1.2.840.113619"),
        ("scan.v2.png", "scan.v2"),
        ("x.jpg#3", "x"),
        ("a#3", "a#3"),
        (".jpg", ".jpg"),
        ("a.heic", "a"),
        ("a.txt", "a.txt"),
    ],
)
def test_only_image_suffixes_are_cut(name, expected):
    assert image_id(name) == expected


@given(st.sets(NAMES, min_size=1, max_size=8), st.sampled_from(sorted(SUFFIXES)), st.sampled_from(["NFC", "NFD"]))
def test_every_spelling_finds_its_own_id(names, suffix, form):
    if len({unicodedata.normalize("NFC", name) for name in names}) < len(names):
        return  # names that differ only in Unicode form are found only as they are written
    ids = Ids(names)
    for name in names:
        for written in (name, name + suffix, f"folder/{name}{suffix}", f"folder\\{name}{suffix}", f"./{name}"):
            assert ids.find(unicodedata.normalize(form, written)) == name


def test_ambiguous_name_matches_no_id():
    ids = Ids(["s1/0001", "s2/0001", "s2/0002"])
    assert ids.find("0001") is None
    assert ids.find("s1\\0001.dcm") == "s1/0001"
    assert ids.find("0002.png") == "s2/0002"


def test_two_names_of_one_id_are_an_error():
    with pytest.raises(DataError, match=r"ids.txt: a and a.png are two names of a"):
        Ids(["a"]).find_all(["a", "a.png"], Path("ids.txt"))


def test_messages_escape_invisible_characters():
    assert shown("plain é") == "plain é"
    assert shown("e\u0301") == "'e\\u0301'"
    assert join_some(["a ", "b"]) == "'a ', b"
    assert Ids(["scan 1"]).hint("scan\u00a01 x") == ""
    assert Ids(["scan1"]).hint("scan1\u200b") == " (there is scan1, not 'scan1\\u200b')"


@pytest.mark.parametrize(
    ("known", "name", "expected"),
    [
        ("cat/1", "dog/1", None),
        ("cat/1", "dog/1.png", None),
        ("cat/1", "1.png", "cat/1"),
        ("1", "dog/1.png", "1"),
        ("cat/1", "data/cat/1.png", "cat/1"),
        ("data/cat/1", "cat\\1.png", "data/cat/1"),
        ("a", "a ", "a"),
        (" a", "a.png", " a"),
    ],
)
def test_name_in_another_folder_is_not_found(known, name, expected):
    assert Ids([known]).find(name) == expected


def test_ids_cut_from_files_keep_their_folder():
    ids = Ids(["1"], files={"1": "patientB/1.png"})
    assert ids.find("patientA/1") is None
    assert ids.find("x", "patientA/1.png") is None
    assert ids.find("patientB/1") == "1"

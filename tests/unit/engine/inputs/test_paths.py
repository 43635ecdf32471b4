"""Inputs of --input: folders, images, patterns, lists of paths, standard input."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import DataError, EngineError, UsageError
from engine.inputs.images import RepeatedIdError, find_images
from engine.inputs.paths import STDIN, find_inputs
from tests.helpers.datasets import picture


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with images in a, b and b/deep, and other files next to them."""
    for name in ("a/1.png", "a/2.jpg", "b/3.png", "b/deep/4.png", "b/.hidden/5.png"):
        picture(tmp_path / name)
    (tmp_path / "a/notes.md").touch()
    (tmp_path / "b/2.txt").write_text("a caption, no list")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*places: str | Path, **how) -> list[str]:
    return [str(image.path) for image in find_inputs([Path(place) for place in places], **how).images]


def ids(*places: str | Path, **how) -> list[str]:
    return [image.id for image in find_inputs([Path(place) for place in places], **how).images]


@pytest.mark.usefixtures("here")
def test_single_folder_is_read_like_find_images():
    for how in ({}, {"recursive": True, "ids": "path"}):
        alone, several = find_images(Path("b"), **how), find_inputs([Path("b")], **how)
        assert several.images == alone.images
        assert several.left_aside == {"b": alone.ignored}


@pytest.mark.usefixtures("here")
def test_inputs_keep_their_order():
    assert found("b", "a/2.jpg", "a/1.png") == ["b/3.png", "a/2.jpg", "a/1.png"]
    assert find_inputs([Path("b"), Path("a")]).left_aside == {
        "b": ["b/.hidden/", "b/2.txt", "b/deep/"],
        "a": ["a/notes.md"],
    }


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/*", ["a/1.png", "a/2.jpg"]),
        ("?/[0-9].png", ["a/1.png", "b/3.png"]),
        ("**/*.png", ["a/1.png", "b/3.png", "b/deep/4.png"]),
        ("b/**", ["b/3.png", "b/deep/4.png"]),
        ("b/.hid*/*", ["b/.hidden/5.png"]),
        ("*/deep/*.png", ["b/deep/4.png"]),
    ],
)
def test_pattern_matches_images(here, pattern, expected):
    assert found(pattern) == expected
    assert found(here / pattern) == [str(here / name) for name in expected]


@pytest.mark.usefixtures("here")
def test_pattern_enters_matched_folders_only_if_recursive():
    assert found("b*/*") == ["b/3.png"]
    assert find_inputs([Path("b*/*")]).left_aside == {"b*/*": ["b/2.txt", "b/deep"]}
    assert found("b*/*", recursive=True) == ["b/3.png", "b/deep/4.png"]
    with pytest.raises(UsageError, match=r"\[ab\] matches no images, but 2 without a suffix; --recursive looks into"):
        find_inputs([Path("[ab]")])


def test_pattern_does_not_follow_links_to_folders(here):
    (here / "b/loop").symlink_to("..")
    assert found("**/*.png") == ["a/1.png", "b/3.png", "b/deep/4.png"]
    assert found("b/*/*.png") == ["b/deep/4.png"]
    assert found("b/loop/a/*.png") == ["b/loop/a/1.png"], "a link that is written out is followed"


def test_existing_name_with_wildcards_matches_itself(here):
    picture(here / "a/[12].png")
    assert found("a/[12].png") == ["a/[12].png"]
    picture(here / "[x]/6.png")
    assert found("[x]/*.png") == ["[x]/6.png"]


def test_list_is_relative_to_its_folder_and_keeps_its_order(here):
    (here / "b/list.txt").write_bytes(b"\xef\xbb\xbf3.png\r\n\r\n../a/2.jpg\n" + os.fsencode(here / "a/1.png"))
    assert [Path(p).resolve() for p in found("b/list.txt")] == [here / n for n in ("b/3.png", "a/2.jpg", "a/1.png")]
    assert find_inputs([Path("b/list.txt")]).lists == [Path("b/list.txt")]
    (here / "b/list.txt").write_text("deep\n3.png\n", encoding="utf-16")
    assert found("b/list.txt") == ["b/deep/4.png", "b/3.png"]


@pytest.mark.parametrize("separator", ["\n", "\0"])
def test_paths_on_stdin_are_relative_to_working_directory(here, monkeypatch, separator):
    odd = "a/line\nbreak.png" if separator == "\0" else "a/\udcff *.png"
    picture(here / "a/x.png").rename(here / odd)
    listed = separator.join(["b/3.png", odd, ""]).encode("utf-8", "surrogateescape")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(listed)))
    assert found(STDIN) == ["b/3.png", odd]


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        (["nowhere"], "nowhere does not exist: give a folder, an image, a pattern or a list of paths"),
        (["a/*.tif"], r"nothing matches a/\*\.tif"),
        (["nowhere/*.png"], "nothing matches nowhere"),
        (["a/notes.md"], "notes.md is not a readable image$"),
        (["a/x.heic"], "HEIC needs the extra"),
        (["pipe.png"], "pipe.png is not a readable image"),
        (["pipe"], "pipe is not a readable image"),
        (["a", "a/1.png"], "a/1.png is named twice by the inputs"),
        (["b/empty.txt"], "empty.txt lists no paths"),
        (
            ["b/list.txt"],
            r"list.txt, line 3: gone.png does not exist \(and 1 more\): paths are relative to its folder b$",
        ),
        (["b/links.txt"], "links.txt, line 2: b/2.txt is not a readable image"),
        ([], "no input: give a folder"),
    ],
)
def test_invalid_inputs_give_one_line(here, places, sentence):
    os.mkfifo("pipe")
    os.mkfifo("pipe.png")
    (here / "a/x.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 200)
    (here / "b/empty.txt").write_text("\n\n")
    (here / "b/list.txt").write_text("3.png\n\ngone.png\nlost\n")
    (here / "b/links.txt").write_text("3.png\n2.txt\n")
    with pytest.raises((UsageError, DataError), match=sentence) as raised:
        find_inputs([Path(place) for place in places])
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, EngineError)


def test_ids_are_unique_and_paths_relative_to_each_input(here):
    picture(here / "b/1.png")
    with pytest.raises(RepeatedIdError, match=r"hold two images with the id '1': a/1.png and b/1.png; ids are paths"):
        find_inputs([Path("a"), Path("b")])
    for how in ("path", "file"):
        with pytest.raises(RepeatedIdError, match="ids are paths relative to each --input: give their common folder"):
            find_inputs([Path("a"), Path("b")], ids=how)
    assert ids("?/1.png", ids="path") == ["a/1", "b/1"]
    assert ids("a/1.png", "b/1.png", ids="path") == ["a/1", "b/1"]
    (here / "b/list.txt").write_text("1.png\n../a/1.png\n")
    assert ids("b/list.txt", ids="path") == ["1", (here / "a/1").as_posix().lstrip("/")]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [("p.zip", b"PK\x03\x04", "it is a zip archive: unpack it"), ("p.jp", b"<html>", "it is an HTML page instead")],
)
def test_error_names_the_kind_of_a_file_that_is_no_image(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        find_inputs((tmp_path / name,))

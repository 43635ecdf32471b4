"""`engine duplicates`: files, page and refused input."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from engine.cli.app import main
from tests.helpers.tiny import random_pictures


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    train, test = tmp_path / "train", tmp_path / "test"
    train.mkdir()
    test.mkdir()
    for i, image in enumerate(random_pictures(6, size=(80, 70))):
        image.save(train / f"train_{i}.png")
        if i == 1:
            image.resize((160, 140)).save(test / "resized.jpg", quality=60)
        if i == 2:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(test / "mirrored.png")
    shutil.copy(train / "train_0.png", test / "same.png")
    random_pictures(9, size=(80, 70))[8].save(test / "new.png")
    (test / "bad<b>.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def test_duplicates_against_training_images(folders):
    out, page = folders / "twins.csv", folders / "twins.html"
    given = ("--input", folders / "test", "--against", folders / "train", "--out", out, "--page", page)
    result = run("duplicates", *given)
    assert result.exit_code == 0, result.output
    rows = [(row["ID"], row["twin"], row["kind"]) for row in csv.DictReader(out.read_text().splitlines())]
    expected = [("mirrored", "train_2", "mirrored"), ("resized", "train_1", "copy"), ("same", "train_0", "file")]
    assert rows == expected
    assert "bad<b>.png (not an image, or damaged)" in result.output
    assert "3 of 5 images have a twin in" in result.output
    assert "(file 1, copy 1, mirrored 1); 0 others have only a near image" in result.output
    text = page.read_text()
    assert len(re.findall("<img alt=", text)) == 6
    assert "<script" not in text
    assert "default-src 'none'; img-src data:" in text


def test_duplicates_within_a_folder_with_hostile_names(folders):
    shutil.copy(folders / "test" / "bad<b>.png", folders / "test" / "x&y.png")
    page = folders / "twins.html"
    result = run("duplicates", "--input", folders / "test", "--out", folders / "twins.csv", "--page", page)
    assert result.exit_code == 0, result.output
    assert (folders / "twins.csv").read_text().splitlines()[1:] == ["x&y,bad<b>,file,0.00000,1"]
    assert "bad&lt;b&gt;" in page.read_text()
    assert "<b>" not in page.read_text()
    assert page.read_text().count("cannot be read") == 2


def test_no_pair_gives_a_table_and_a_page_that_say_so(folders):
    result = run("duplicates", "--input", folders / "train", "--out", folders / "t.csv", "--page", folders / "t.html")
    assert result.exit_code == 0, result.output
    assert (folders / "t.csv").read_text() == "ID,twin,kind,distance,group\n"
    assert "No pair was found." in (folders / "t.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "nowhere", "--out", "t.csv"), "nowhere does not exist"),
        (("--input", "test", "--out", "test"), "--out test is a directory"),
        (("--input", "test", "--out", "t.csv", "--page", "t.csv"), "--page t.csv would overwrite --out"),
        (("--input", "broken", "--out", "t.csv"), "broken: none of 1 image can be read"),
        (("--input", "test", "--high-bit-depth", "x", "--out", "t.csv"), "high bit depth 'x'"),
    ],
)
def test_refused_input(folders, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    Path("broken").mkdir()
    Path("broken", "a.png").write_bytes(b"no image")
    result = run("duplicates", *arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert not Path("t.csv").exists()

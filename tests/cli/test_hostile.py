"""Folders from strangers: every file is captioned or named with its reason, and nothing that is short looks
complete.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from benchmarks.faults import UNREADABLE, UNUSUAL, write_unreadable
from engine import captioner
from engine.cli.app import main
from engine.inputs import pixels
from engine.inputs.pixels import read_image
from tests.helpers.tiny import random_pictures


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    for i, picture in enumerate(random_pictures(2)):
        picture.save(directory / f"good {i}.png")
    return directory


@pytest.fixture
def run(image_dir, tiny_bundle, tmp_path):
    def call(*more: str) -> Result:
        arguments = ["caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "run.csv", *more]
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return call


def captions(out: Path) -> dict[str, str]:
    text = out.read_bytes().decode("utf-8", "surrogateescape")
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert header == ["ID", "Caption"]
    return dict(rows)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_file_is_named_and_no_run_written(kind, run, image_dir, tmp_path):
    path = write_unreadable(kind, image_dir, "x")
    result = run()
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("unreadable: ")]
    assert str(path) in line
    assert UNREADABLE[kind][2] in line
    assert "1 of 3 images cannot be read and no run was written" in result.stderr
    assert not (tmp_path / "run.csv").exists()
    assert run("--allow-missing").exit_code == 0
    found = captions(tmp_path / "run.csv")
    assert found.pop("x") == ""
    assert len(found) == 2
    assert all(found.values())


def test_file_without_read_permission_is_named(run, image_dir, monkeypatch):
    """The error is simulated: tests may run as root, which can read everything."""
    opened = pixels.open_file

    def refuse(path):
        if path.name == "good 0.png":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path)

    monkeypatch.setattr(pixels, "open_file", refuse)
    assert f"{image_dir / 'good 0.png'}: Permission denied" in run().stderr


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_files_are_captioned(kind, run, image_dir, tmp_path):
    extension, content = UNUSUAL[kind]
    (image_dir / f"x{extension}").write_bytes(content)
    result = run()
    assert result.exit_code == 0, result.output
    assert "unreadable" not in result.stderr
    assert "x" in captions(tmp_path / "run.csv")


def test_exif_rotation_is_ignored_and_first_frame_used(tmp_path):
    corners = np.zeros((40, 80, 3), np.uint8)
    corners[:20, :40] = 255  # the upper left is white; turned by 90 degrees it would be the upper right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(corners).save(tmp_path / "x.png", exif=exif)
    pixels = read_image(tmp_path / "x.png", 10, 10, "nearest")
    assert pixels[:5, :5].min() == 255
    assert pixels[:, 5:].max() == 0
    frames = [Image.fromarray(np.full((20, 20, 3), value, np.uint8)) for value in (200, 10)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif", 10, 10, "nearest").min() > 150


@pytest.mark.parametrize(("kind", "expected"), [("1 bit", "1"), ("CMYK", "CMYK"), ("grey with alpha", "LA")])
def test_odd_modes_keep_their_picture(kind, expected, tmp_path):
    extension, content = UNUSUAL[kind]
    (tmp_path / f"x{extension}").write_bytes(content)
    with Image.open(tmp_path / f"x{extension}") as picture:
        assert picture.mode == expected
        whole = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / f"x{extension}", 48, 48, "nearest"), whole)
    assert whole.std() > 10


def test_bad_links_are_named_and_leak_nothing(run, image_dir):
    (image_dir / "folder.jpg").symlink_to(image_dir)
    (image_dir / "long.jpg").symlink_to("y" * 300)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        result = run()
        assert "folder.jpg: not a file but a folder" in result.stderr
        assert "long.jpg: File name too long" in result.stderr
        assert result.exit_code == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 1


NAMES = ["a b", "a,b", 'a"b', "a\nb", "a\r\nb", "\udcff\udcfe", "ä é 漢", "'; drop", "=1+1", "-rf", "a.b.c", "<b>"]


def test_names_are_unchanged_in_the_output(run, image_dir, tmp_path):
    picture = random_pictures(1)[0]
    for name in NAMES:
        with open(image_dir / f"{name}.png", "wb") as stream:  # noqa: PTH123 (Pillow cannot open names of other bytes)
            picture.save(stream, "PNG")
    result = run("--n-best", "1", "--n-best-out", str(tmp_path / "n.jsonl"))
    assert result.exit_code == 0, result.output
    found = captions(tmp_path / "run.csv")
    assert set(found) == {*NAMES, "good 0", "good 1"}
    assert len((tmp_path / "run.csv").read_bytes().split(b"\n")) - 2 == len(found) + sum("\n" in n for n in NAMES)


def test_folders_pipes_and_other_files_are_skipped(run, image_dir, tmp_path):
    (image_dir / "x.jpg").mkdir()
    os.mkfifo(image_dir / "y.jpg")
    (image_dir / "notes.txt").touch()
    result = run()
    assert result.exit_code == 0, result.output
    assert ": 1 .jpg, 1 .txt, 1 folder" in result.stderr
    assert len(captions(tmp_path / "run.csv")) == 2


def test_one_image_is_a_run(run, image_dir, tmp_path):
    (image_dir / "good 1.png").unlink()
    assert run().exit_code == 0
    assert list(captions(tmp_path / "run.csv")) == ["good 0"]


def test_recursive_enters_subfolders(run, image_dir, tmp_path):
    (image_dir / "b").mkdir()
    (image_dir / "b" / "loop").symlink_to("..")
    (image_dir / ".hidden").mkdir()
    random_pictures(1)[0].save(image_dir / "b" / "deep.png")
    random_pictures(1)[0].save(image_dir / ".hidden" / "unseen.png")
    assert run().exit_code == 0
    assert "deep" not in captions(tmp_path / "run.csv")
    result = run("--recursive")
    assert result.exit_code == 0, result.output
    assert list(captions(tmp_path / "run.csv")) == ["deep", "good 0", "good 1"]
    assert ": 1 folder, 1 hidden" in result.stderr
    random_pictures(1)[0].save(image_dir / "b" / "good 0.jpg")
    result = run("--recursive")
    assert result.exit_code == 2
    assert f"two images with the id 'good 0': {Path('b', 'good 0.jpg')} and good 0.png" in result.stderr


def test_a_file_that_vanishes_after_listing_is_named(run, tmp_path, monkeypatch):
    listed = captioner.read_image

    def late(path, *arguments, **options):
        Path(path).unlink()
        return listed(path, *arguments, **options)

    monkeypatch.setattr(captioner, "read_image", late)
    result = run()
    assert result.exit_code == 1
    assert "good 0.png: No such file or directory" in result.stderr
    assert not (tmp_path / "run.csv").exists()


def test_file_that_changes_during_a_run_is_captioned_again(run, image_dir, tmp_path, monkeypatch):
    read = captioner.read_image
    others = random_pictures(3)

    def replaced(path, *arguments, **options):
        pixels = read(path, *arguments, **options)
        if "good 1" in str(path):
            others[2].save(image_dir / "good 1.png")
        return pixels

    monkeypatch.setattr(captioner, "read_image", replaced)
    result = run()
    assert result.exit_code == 1
    assert "1 image changed during the run (good 1.png) and no run was written" in result.stderr
    assert not (tmp_path / "run.csv").exists()
    monkeypatch.undo()
    result = run()
    assert "1 caption of an earlier run is taken from" in result.stderr
    after = captions(tmp_path / "run.csv")
    (tmp_path / "run.csv").unlink()
    assert run().exit_code == 0
    assert captions(tmp_path / "run.csv") == after


@pytest.mark.parametrize("death", [SystemExit, RuntimeError])
def test_a_reader_that_dies_ends_the_run_and_keeps_its_captions(run, image_dir, tmp_path, monkeypatch, death):
    for i, picture in enumerate(random_pictures(40)):
        picture.save(image_dir / f"more {i:02}.png")
    read = captioner.read_image

    def dies(path, *arguments, **options):
        if "more 39" in str(path):
            raise death("the reader died")
        return read(path, *arguments, **options)

    monkeypatch.setattr(captioner, "read_image", dies)
    result = run("--rows", "3", "--beams", "3")
    assert result.exit_code == 1
    assert "captions are kept in" in result.stderr
    assert not (tmp_path / "run.csv").exists()
    assert (tmp_path / "run.csv.journal").exists()


def test_too_few_file_handles_stop_the_run(run, monkeypatch):
    def none_left(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("engine.inputs.pixels.open_file", none_left)
    result = run()
    assert result.exit_code == 1
    assert "cannot be read: Too many open files: raise the limit (ulimit -n)" in result.stderr
    assert "unreadable" not in result.stderr


def test_read_only_output_folder_is_refused_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    result = run()
    assert result.exit_code == 2
    assert f"{tmp_path} is not writable" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_two_names_of_one_output_share_its_lock_and_journal(tmp_path):
    from engine.files.lock import lock_path
    from engine.run.journal import journal_path

    (tmp_path / "other").symlink_to("run.csv")
    assert lock_path(tmp_path / "other") == lock_path(tmp_path / "run.csv")
    assert journal_path(tmp_path / "other") == journal_path(tmp_path / "run.csv")

"""`engine caption --attention`: the files of a run, with processes, Ray, shards and resumed runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engine.attention import read_attention
from engine.cli.app import main
from tests.helpers.cores import two_cores
from tests.helpers.tiny import save_pictures

IMAGES = 24


def caption(images: Path, bundle: Path, folder: Path, *more: object) -> Result:
    arguments = ["caption", "--input", images, "--bundle", bundle, "--beams", 3, "--threads", 2, *more]
    arguments += ["--out", folder / "run.csv", "--attention", folder / "maps"]
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def files(folder: Path) -> dict[str, bytes]:
    maps = folder / "maps"
    return {str(path.relative_to(maps)): path.read_bytes() for path in maps.rglob("*") if path.is_file()}


def assert_same_files(folder: Path, other: Path) -> None:
    """Compare two folders of maps. Their last bit depends on which images share a step, as that of scores does."""
    assert sorted(files(folder)) == sorted(files(other))
    for name in files(folder):
        with np.load(folder / "maps" / name) as found, np.load(other / "maps" / name) as expected:
            assert set(found) == set(expected)
            for key, array in expected.items():
                if key == "maps":
                    np.testing.assert_allclose(found[key], array, rtol=2**-10, atol=1e-6)
                else:
                    np.testing.assert_array_equal(found[key], array)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_pictures(tmp_path_factory.mktemp("attention") / "images", IMAGES)
    shutil.copy(folder / "7.png", folder / "twin.png")
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    result = caption(images, tiny_bundle, folder, "--threads", 1)
    assert result.exit_code == 0, result.output
    return folder


def test_one_file_per_image(whole, images, tiny_bundle, tmp_path):
    assert sorted(files(whole)) == sorted(f"{path.stem}.npz" for path in images.iterdir())
    assert files(whole)["7.npz"] == files(whole)["twin.npz"]
    rows = dict(line.split(",", 1) for line in (whole / "run.csv").read_text().splitlines()[1:])
    for name, text in rows.items():
        with np.load(whole / "maps" / f"{name}.npz") as arrays:
            found = dict(arrays)
        count = len(found["tokens"])
        assert found["maps"].shape == (count, *found["grid"])
        assert {key: value.dtype.str for key, value in found.items() if key != "words"} == {
            "tokens": "<i8", "grid": "<i8", "maps": "<f2", "layers": "<i8", "word_of": "<i8", "crop": "<i8",
        }  # fmt: skip
        assert found["layers"].tolist() == [0, 1]
        assert 0 < found["maps"].astype(np.float32).sum((1, 2)).min() <= 1.001
        assert " ".join(found["words"]) == text.strip('"').replace('""', '"')
    plain = tmp_path / "plain.csv"
    arguments = ["caption", "--input", images, "--bundle", tiny_bundle, "--beams", 3, "--out", plain]
    assert CliRunner().invoke(main, list(map(str, arguments))).exit_code == 0
    assert plain.read_bytes() == (whole / "run.csv").read_bytes()


@two_cores
@pytest.mark.parametrize("workers", [("--processes", "2"), ("--ray", "local", "--ray-actors", "1")], ids=str)
def test_workers_give_the_same_files(workers, images, tiny_bundle, whole, tmp_path):
    if "--ray" in workers:
        pytest.importorskip("ray", reason="ray is not installed: it comes with the extra [ray]")
    result = caption(images, tiny_bundle, tmp_path, *workers)
    assert result.exit_code == 0, result.output
    assert_same_files(tmp_path, whole)
    assert (tmp_path / "run.csv").read_bytes() == (whole / "run.csv").read_bytes()


def test_shards_share_a_folder(images, tiny_bundle, whole, tmp_path):
    for number in (1, 2, 3):
        result = caption(images, tiny_bundle, tmp_path, "--shard", f"{number}/3", "--no-resume")
        assert result.exit_code == 0, result.output
    assert_same_files(tmp_path, whole)


def test_resumed_run_makes_missing_files_again(images, tiny_bundle, whole, tmp_path):
    own = shutil.copytree(images, tmp_path / "images")
    (own / "broken.png").write_bytes(b"not an image")
    first = caption(own, tiny_bundle, tmp_path)
    assert first.exit_code == 1
    assert "1 of 26 images cannot be read and no run was written" in first.output
    maps = tmp_path / "maps"
    (maps / "3.npz").unlink()
    shutil.copy(maps / "5.npz", maps / "4.npz")  # those of another caption
    shutil.copy(maps / "twin.npz", maps / "7.npz")
    (own / "broken.png").unlink()
    again = caption(own, tiny_bundle, tmp_path)
    assert again.exit_code == 0, again.output
    assert f"2 images are captioned again, because {maps} lacks their attention" in again.output
    assert "2 captions in" in again.output
    assert_same_files(tmp_path, whole)
    assert (tmp_path / "run.csv").read_bytes() == (whole / "run.csv").read_bytes()


def test_update_makes_files_for_other_layers(images, tiny_bundle, tmp_path):
    assert caption(images, tiny_bundle, tmp_path, "--update").exit_code == 0
    before, old = files(tmp_path), tmp_path / "before"
    shutil.copytree(tmp_path / "maps", old / "maps")
    same = caption(images, tiny_bundle, tmp_path, "--update")
    assert "0 of 25 images to caption" in same.output
    (tmp_path / "maps" / "9.npz").unlink()
    one = caption(images, tiny_bundle, tmp_path, "--update")
    assert "1 of 25 images to caption" in one.output
    assert_same_files(tmp_path, old)
    last = caption(images, tiny_bundle, tmp_path, "--update", "--attention-layers", "1")
    assert "25 of 25 images to caption" in last.output
    assert read_attention(tmp_path / "maps" / "9.npz").layers == (1,)
    assert all(files(tmp_path)[name] != content for name, content in before.items())


def test_ids_with_folders(images, tiny_bundle, tmp_path):
    own = tmp_path / "images"
    for folder in ("a", "b/c"):
        (own / folder).mkdir(parents=True)
        shutil.copy(images / "1.png", own / folder / "same.png")
    result = caption(own, tiny_bundle, tmp_path, "--recursive", "--ids", "path")
    assert result.exit_code == 0, result.output
    assert sorted(files(tmp_path)) == ["a/same.npz", "b/c/same.npz"]


REFUSED = {
    "layers alone": (["--attention-layers", "0"], "--attention-layers has no effect without --attention"),
    "no numbers": (["--attention", "maps", "--attention-layers", "last"], "expects numbers such as 0,5,11, not 'last'"),
    "no such layer": (["--attention", "maps", "--attention-layers", "0,7"], "--attention-layers 7: the decoder of "),
    "no folder": (["--attention", "none/maps"], "--attention none/maps: none does not exist, create it first"),
    "a file": (["--attention", "file"], "--attention file: file is not a writable folder"),
    "openvino": (
        ["--attention", "maps", "--backend", "openvino"],
        "backends cpu and torch, not by openvino: add --backend cpu or --backend torch",
    ),
    "in the bundle": (["--attention", "bundle"], "--attention bundle would be inside the bundle"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, images, tiny_bundle, tmp_path, monkeypatch):
    options, message = REFUSED[case]
    if "openvino" in options:
        pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    arguments = ["caption", "--input", images, "--bundle", tiny_bundle, "--out", "run.csv", *options]
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run.csv").exists()
    assert not list(tiny_bundle.glob("*.npz.tmp"))


def test_foreign_files_and_links_are_not_overwritten(images, tiny_bundle, tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    np.savez(maps / "0.npz", features=np.zeros(3))
    content = (maps / "0.npz").read_bytes()
    result = caption(images, tiny_bundle, tmp_path)
    assert result.exit_code == 1
    assert f"{maps / '0.npz'} exists and is not a file of --attention: move it away" in result.output
    assert (maps / "0.npz").read_bytes() == content
    own = tmp_path / "images" / "a"
    own.mkdir(parents=True)
    shutil.copy(images / "1.png", own)
    (tmp_path / "elsewhere").mkdir()
    (maps / "a").symlink_to(tmp_path / "elsewhere")
    result = caption(own.parent, tiny_bundle, tmp_path, "--recursive", "--ids", "path")
    assert result.exit_code == 2
    assert f"{maps / 'a'} is a link, which could lead out of {maps}" in result.output
    assert not list((tmp_path / "elsewhere").iterdir())


def test_explain_draws_each_word(images, tiny_bundle, whole, tmp_path):
    out = tmp_path / "explained"
    arguments = ["explain", images / "3.png", "--bundle", tiny_bundle, "--beams", 3, "--out", out]
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] in (whole / "run.csv").read_text()
    found = read_attention(out / "attention.npz")
    expected = read_attention(whole / "maps" / "3.npz")
    assert (found.tokens, found.words) == (expected.tokens, expected.words)
    np.testing.assert_array_equal(found.maps, expected.maps)
    names = {path.name for path in out.iterdir()}
    assert {"overview.png", "attention.npz"} < names
    assert len(names) == 2 + len(found.words)
    (out / "word_99_old.png").touch()
    again = CliRunner().invoke(main, [*map(str, arguments), "--attention-layers", "0"], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert {path.name for path in out.iterdir()} == names
    assert read_attention(out / "attention.npz").layers == (0,)
    for other, message in (
        (tmp_path, "--out .* is a file or contains other files: name a new folder"),
        (tmp_path / "none" / "out", "does not exist, create it first"),
    ):
        arguments[-1] = other
        result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 2
        assert re.search(message, result.output)
    arguments[1], arguments[-1] = out / "overview.png", out
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert "is inside --out" in result.output
    assert (out / "overview.png").exists()

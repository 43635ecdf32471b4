"""Shards of a run, merged, are the bytes of one run; `engine merge` refuses everything else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engine.cli.app import main
from tests.helpers.cores import two_cores
from tests.helpers.tiny import save_pictures

NUMBER = r"-?\d+\.\d+"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_pictures(tmp_path_factory.mktemp("shards") / "images", 7, name="{}, a\nb.png")
    (directory / "5 broken.png").write_bytes(b"no picture")
    return directory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def caption(images: Path, bundle: Path, out: Path, *more: object) -> Result:
    n_best = ("--n-best", 2, "--n-best-out", out.with_suffix(".n_best"), "--timings-out", out.with_suffix(".timings"))
    arguments = ("--input", images, "--bundle", bundle, "--out", out, "--allow-missing", "--beams", 2, *n_best, *more)
    return run("caption", *arguments)


@pytest.fixture
def shards(images: Path, tiny_bundle: Path, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.csv" for number in (1, 2, 3)]
    for number, path in enumerate(paths, 1):
        result = caption(images, tiny_bundle, path, "--shard", f"{number}/3")
        assert result.exit_code == 0, result.stderr
    return paths


@pytest.mark.parametrize("form", [(), ("--jsonl",)])
def test_merged_shards_are_the_bytes_of_one_run(images, tiny_bundle, tmp_path, form):
    assert caption(images, tiny_bundle, tmp_path / "whole", *form, "--prefix", "Seen: ").exit_code == 0
    for number in (1, 2, 3):
        result = caption(
            images, tiny_bundle, tmp_path / f"{number}", *form, "--prefix", "Seen: ", "--shard", f"{number}/3"
        )
        assert result.exit_code == 0, result.stderr
    for suffix, lines in (("", 8), (".n_best", 7), (".timings", 8)):
        merged, whole = tmp_path / f"merged{suffix}", tmp_path / f"whole{suffix}"
        result = run("merge", *(tmp_path / f"{number}{suffix}" for number in (3, 1, 2)), "--out", merged)
        assert result.exit_code == 0, result.stderr
        assert f"{lines} lines of 3 shards -> {merged}" in result.stderr
        if not suffix:
            assert merged.read_bytes() == whole.read_bytes()
        # scores depend on the batch in their last digit, latencies on the machine
        assert re.split(NUMBER, merged.read_text()) == re.split(NUMBER, whole.read_text())


def test_captions_are_kept_until_the_shard_is_noted(images, tiny_bundle, tmp_path):
    (tmp_path / "1.csv.shard").mkdir()
    result = caption(images, tiny_bundle, tmp_path / "1.csv", "--shard", "1/3")
    assert result.exit_code == 1
    assert "captions are kept in" in result.stderr
    (tmp_path / "1.csv.shard").rmdir()
    result = caption(images, tiny_bundle, tmp_path / "1.csv", "--shard", "1/3")
    assert result.exit_code == 0
    assert "captions of an earlier run are taken from" in result.stderr
    assert not (tmp_path / "1.csv.journal").exists()


def test_a_shard_may_have_only_unreadable_images(tiny_bundle, tmp_path):
    images = save_pictures(tmp_path / "images", 2)
    (images / "zz.png").write_bytes(b"no picture")
    for number in (1, 2, 3):
        result = caption(images, tiny_bundle, tmp_path / f"{number}.csv", "--shard", f"{number}/3")
        assert result.exit_code == 0, result.stderr
    result = run("merge", *(tmp_path / f"{number}.csv" for number in (1, 2, 3)), "--out", tmp_path / "merged.csv")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "merged.csv").read_text().splitlines()[-1] == 'zz,""'


@two_cores
def test_int8_captions_do_not_depend_on_shards_processes_or_resume(rounded_bundles, tmp_path):
    images, bundle = save_pictures(tmp_path / "images", 9, seed=5), rounded_bundles["int8"]

    def captions(name: str, *more: object) -> bytes:
        out = tmp_path / name
        result = run("caption", "--input", images, "--bundle", bundle, "--out", out, "--beams", 3, *more)
        assert result.exit_code == 0, result.stderr
        return out.read_bytes()

    whole = captions("whole", "--rows", 3, "--threads", 1)
    assert len(set(whole.splitlines())) > 7, "too few different captions: agreement proves nothing"
    assert captions("parallel", "--processes", 2, "--threads", 2) == whole
    for number in (1, 2, 3):
        captions(f"{number}", "--shard", f"{number}/3")
    assert run("merge", *(tmp_path / f"{number}" for number in (1, 2, 3)), "--out", tmp_path / "merged").exit_code == 0
    assert (tmp_path / "merged").read_bytes() == whole

    intact = (images / "4.png").read_bytes()
    (images / "4.png").write_bytes(b"broken")
    arguments = ("caption", "--input", images, "--bundle", bundle, "--out", tmp_path / "resumed", "--beams", 3)
    assert run(*arguments).exit_code == 1
    (images / "4.png").write_bytes(intact)
    resumed = run(*arguments, "--json")
    assert json.loads(resumed.stdout.splitlines()[-1])["resumed"] == 8
    assert (tmp_path / "resumed").read_bytes() == whole


def test_missing_and_double_shards_are_refused(shards, tmp_path):
    for given, said in (
        (shards[:1], "2 of 3 shards are missing: 2/3, 3/3: add their files"),
        ([*shards, shards[0].with_name("again.csv")], "are both shard 1/3: give each shard once"),
        ([shards[0], shards[1], shards[2].with_suffix(".n_best")], "is from --out and"),
    ):
        for suffix in ("", ".shard"):
            content = shards[0].with_name(shards[0].name + suffix).read_bytes()
            (tmp_path / f"again.csv{suffix}").write_bytes(content)
        result = run("merge", *given, "--out", tmp_path / "run.csv")
        assert result.exit_code == 1
        assert said in result.stderr
        assert not (tmp_path / "run.csv").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--beams", 1, "--n-best", 1), "num_beams:2 and num_beams:1"),
        (("--suffix", "."), "they differ in images, prompts, shards or the options for the text"),
        (("--shard", "2/4"), "they differ in images, prompts, shards or the options for the text"),
        (("--prompts", "prompts"), "they differ in images, prompts, shards or the options for the text"),
        (("--input", "more"), "they differ in images, prompts, shards or the options for the text"),
    ],
)
def test_shards_of_different_runs_are_refused(images, tiny_bundle, shards, tmp_path, change, said):
    more = save_pictures(tmp_path / "more", 2, name="more {}.png")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("ID,prompt\n" + "".join(f'"{path.stem}",the\n' for path in sorted(images.iterdir())))
    files = {"more": more, "prompts": prompts}
    change = tuple(files.get(value, value) for value in change)
    assert caption(images, tiny_bundle, shards[1], "--shard", "2/3", *change).exit_code == 0
    result = run("merge", *shards, "--out", tmp_path / "run.csv")
    assert result.exit_code == 1
    assert f"error: {shards[0]} and {shards[1]} are not of one run: {said}" in result.stderr


def test_changed_and_foreign_files_are_refused(shards, tmp_path):
    note = shards[1].with_name("2.csv.shard")
    whole = note.read_text()
    for content in ("", "[]", "{}", json.dumps(json.loads(whole) | {"shard": "4/3"})):
        note.write_text(content)
        assert "2.csv.shard is damaged" in run("merge", *shards, "--out", tmp_path / "run.csv").stderr
    note.write_text(json.dumps(json.loads(whole) | {"places": [1]}))
    assert "2.csv.shard does not fit" in run("merge", *shards, "--out", tmp_path / "run.csv").stderr
    note.unlink()
    assert "only files that --shard wrote can be merged" in run("merge", *shards, "--out", tmp_path / "r").stderr
    note.write_text(whole)
    shards[1].write_bytes(shards[1].read_bytes().replace(b'"', b"'"))
    assert "2.csv was changed after --shard wrote it" in run("merge", *shards, "--out", tmp_path / "run.csv").stderr
    result = run("merge", *shards, "--out", shards[0])
    assert (result.exit_code, "would overwrite the input" in result.stderr) == (2, True)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b", "1/3/", "٣/٤"])
def test_impossible_shards_are_refused(images, tiny_bundle, tmp_path, text):
    result = caption(images, tiny_bundle, tmp_path / "run.csv", "--shard", text)
    assert result.exit_code == 2
    assert f"--shard expects I/N with I from 1 to N, such as 3/8, not {text!r}" in result.stderr


def test_more_shards_than_images_and_a_stream_are_refused(images, tiny_bundle, tmp_path):
    result = caption(images, tiny_bundle, tmp_path / "run.csv", "--shard", "1/9")
    assert (result.exit_code, "more shards than images: use at most 8 shards" in result.stderr) == (2, True)
    result = run("caption", "--input", images, "--bundle", tiny_bundle, "--out", "-", "--shard", "1/2")
    assert (result.exit_code, "--shard needs a file for --out" in result.stderr) == (2, True)

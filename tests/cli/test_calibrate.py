"""`engine calibrate` and what `engine caption --calibration` adds: to resumed, divided and merged runs as well."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engine.calibration import Calibration
from engine.captions import Caption
from engine.cli.app import main
from engine.run.record import RunRecord
from tests.helpers.cores import two_cores
from tests.helpers.tiny import save_pictures

IMAGES = 24
LIMIT = 0.5


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a run of them, and references that the surer half of the captions equals."""
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module")
def caption(folder, tiny_bundle):
    images = save_pictures(folder / "images", IMAGES, name="{:02}.png")

    def call(out: Path, *more: object) -> Result:
        n_best = ("--n-best", 2, "--n-best-out", out.with_suffix(".jsonl"))
        settings = ("--beams", 2, "--min-new-tokens", 4, "--rows", 8, "--threads", 2)
        return run("caption", "--input", images, "--bundle", tiny_bundle, "--out", out, *settings, *n_best, *more)

    return call


@pytest.fixture(scope="module")
def plain(folder, caption) -> list[dict]:
    assert caption(folder / "run.csv").exit_code == 0
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    order = sorted(lines, key=lambda line: line["confidence"]["mean_token_prob"])
    with (folder / "references.csv").open("w", newline="") as stream:
        rows = [(line["id"], "x" if i < IMAGES / 2 else line["hypotheses"][0]["text"]) for i, line in enumerate(order)]
        csv.writer(stream).writerows([("ID", "Caption"), *rows])
    return lines


def calibrate(folder: Path, *more: object) -> Result:
    return run("calibrate", "--run", folder / "run.jsonl", "--references", folder / "references.csv", *more)


@pytest.fixture(scope="module")
def calibrated(folder, plain, caption) -> Path:  # noqa: ARG001
    """A run with expected scores, of which half are marked for review."""
    result = calibrate(folder, "--out", folder / "map.json")
    assert result.exit_code == 0, result.stderr
    assert "mean_token_prob 0.867" in result.stderr  # Spearman's correlation with scores of 0 and 1, half each
    assert "follows chance" in result.stderr
    result = caption(folder / "whole.csv", *added(folder), "--review-out", folder / "whole.review")
    assert result.exit_code == 0, result.stderr
    assert f"{IMAGES // 2} of {IMAGES} captions marked for review" in result.stderr
    return folder / "whole.csv"


def added(folder: Path) -> tuple[object, ...]:
    return ("--calibration", folder / "map.json", "--abstain-below", LIMIT)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_confidence_of_each_caption(plain):
    for line in plain:
        assert list(line) == ["id", "drawn", "confidence", "hypotheses"]
        best, second = line["hypotheses"]
        assert line["confidence"]["score"] == best["score"]
        assert line["confidence"]["margin"] == pytest.approx(best["score"] - second["score"])
        chances = np.exp(best["token_log_probs"])
        assert len(chances) == len(best["ids"]) - 1
        assert line["confidence"]["mean_token_prob"] == pytest.approx(chances.mean())
        assert line["confidence"]["min_token_prob"] == pytest.approx(chances.min())
    assert len({line["confidence"]["agreement"] for line in plain}) > 1


def test_calibrated_run(folder, plain, calibrated):
    assert calibrated.read_bytes() == (folder / "run.csv").read_bytes()
    lines = lines_of(calibrated.with_suffix(".jsonl"))
    assert list(lines[0]) == ["id", "drawn", "confidence", "expected_score", "review", "hypotheses"]
    knots = Calibration.read(folder / "map.json")
    for line, before in zip(lines, plain, strict=True):
        expected = np.interp(line["confidence"]["mean_token_prob"], knots.knots, knots.expected)
        assert line["expected_score"] == pytest.approx(expected, abs=1e-6)
        assert line["review"] == (expected < LIMIT)
        # not the numbers, whose last digits depend on the batch
        assert [one["ids"] for one in line["hypotheses"]] == [one["ids"] for one in before["hypotheses"]]
    marked = [f"{line['id']},{line['expected_score']}" for line in lines if line["review"]]
    assert calibrated.with_suffix(".review").read_text().splitlines() == ["ID,expected_score", *marked]
    assert len(marked) == IMAGES // 2


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-\d+)?")


def assert_same(folder: Path, calibrated: Path) -> None:
    """Assert that two runs have the same files, except for the last digits of numbers, which depend on the batch."""
    assert (folder / "run.csv").read_bytes() == calibrated.read_bytes()
    for suffix in (".jsonl", ".review"):
        found, expected = (folder / f"run{suffix}").read_text(), calibrated.with_suffix(suffix).read_text()
        assert NUMBER.split(found) == NUMBER.split(expected)
        # an expected score is less precise than the rest: the map is steep between two knots
        numbers = [np.array(NUMBER.findall(text), np.float64) for text in (found, expected)]
        np.testing.assert_allclose(*numbers, atol=5e-3)


def test_resumed_run_has_all_keys(folder, calibrated, caption, tmp_path, monkeypatch):
    """The journal keeps what the confidence is computed from, with or without --calibration when it was written."""
    add = RunRecord.add

    def stop_at_nine(record: RunRecord, one: Caption) -> None:
        if record.done >= 9:
            raise KeyboardInterrupt
        add(record, one)

    monkeypatch.setattr(RunRecord, "add", stop_at_nine)
    assert caption(tmp_path / "run.csv").exit_code != 0
    monkeypatch.undo()
    result = caption(tmp_path / "run.csv", *added(folder), "--review-out", tmp_path / "run.review")
    assert "9 captions of an earlier run are taken" in result.stderr
    assert_same(tmp_path, calibrated)


@pytest.mark.usefixtures("plain")
def test_other_metrics_and_confidences(folder, tmp_path):
    out = tmp_path / "map.json"
    assert calibrate(folder, "--out", out, "--metric", "bleu1", "--confidence", "score").exit_code == 0
    found = Calibration.read(out)
    assert (found.metric, found.confidence, found.images, found.n_best) == ("bleu1", "score", IMAGES, 2)
    assert found.signature.startswith("bleu1")


@two_cores
def test_processes_have_all_keys(folder, calibrated, caption, tmp_path):
    result = caption(tmp_path / "run.csv", *added(folder), "--review-out", tmp_path / "run.review", "--processes", 2)
    assert result.exit_code == 0, result.stderr
    assert_same(tmp_path, calibrated)


def test_merged_shards_have_all_keys(folder, calibrated, caption, tmp_path):
    for number in (1, 2, 3):
        out = tmp_path / f"{number}.csv"
        result = caption(out, *added(folder), "--review-out", out.with_suffix(".review"), "--shard", f"{number}/3")
        assert result.exit_code == 0, result.stderr
    for suffix in (".csv", ".jsonl", ".review"):
        parts = [tmp_path / f"{number}{suffix}" for number in (2, 3, 1)]
        assert run("merge", *parts, "--out", tmp_path / f"run{suffix}").exit_code == 0
    assert_same(tmp_path, calibrated)
    assert caption(tmp_path / "2.csv", "--shard", "2/3").exit_code == 0
    mixed = run("merge", *(tmp_path / f"{number}.jsonl" for number in (1, 2, 3)), "--out", tmp_path / "mixed")
    assert "are not of one run" in mixed.stderr


@pytest.mark.usefixtures("calibrated")
def test_unusable_input_is_refused(folder, caption, tmp_path):
    lines = (folder / "references.csv").read_text().splitlines()
    ids = [line.partition(",")[0] for line in lines[1:]]
    (tmp_path / "same.csv").write_text("ID,Caption\n" + "".join(f"{name},x\n" for name in ids))
    given = ("calibrate", "--references", tmp_path / "same.csv", "--out", tmp_path / "map.json", "--run")
    assert "rouge1 does not increase with the mean_token_prob" in run(*given, folder / "run.jsonl").stderr
    assert "run.csv is not a file of `engine caption --n-best-out`" in run(*given, folder / "run.csv").stderr
    assert not (tmp_path / "map.json").exists()
    out, review = tmp_path / "run.csv", ("--review-out", tmp_path / "review.csv")
    for more, sentence in (
        (("--abstain-below", 1), "--calibration, which it needs"),
        (review, "add --abstain-below"),
        (("--calibration", folder / "run.csv"), "run.csv is not a file of `engine calibrate`"),
        (("--calibration", tmp_path / "none.json"), "none.json cannot be read"),
        (("--calibration", folder / "map.json", "--abstain-below", "nan"), "--abstain-below is a number"),
        ((*added(folder), "--review-out", folder / "map.json"), "would overwrite"),
    ):
        result = caption(out, *more)
        assert result.exit_code in (1, 2)
        assert sentence in result.stderr
        assert not out.exists()
    images = ("caption", "--input", folder / "images", "--out", out)
    assert "--calibration has no effect without" in run(*images, "--calibration", folder / "map.json").stderr

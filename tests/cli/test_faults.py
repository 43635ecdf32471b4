"""The soak in small: kills, a full disk and hostile files in one run, judged by the code that judges 17,237 images."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.faults import compare_runs, engine_command, mix_in_unreadable, run_disturbed
from tests.helpers.tiny import random_pictures

FAULTS = ["kill", "full disk", "term", "kill", "full disk", "kill"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults") / "pictures"
    directory.mkdir()
    for i, picture in enumerate(random_pictures(60)):
        picture.save(directory / f"picture_{i:02d}.png")
    return directory


def test_disturbed_run_equals_the_undisturbed_one(pictures, tiny_bundle, tmp_path):
    options = ("--bundle", tiny_bundle, "--beams", 3, "--rows", 12, "--threads", 1)
    subprocess.run(engine_command(pictures, tmp_path / "a.csv", *options), check=True, capture_output=True)
    unreadable = mix_in_unreadable(pictures, 15, tmp_path / "mixed")
    command = engine_command(tmp_path / "mixed", tmp_path / "b.csv", *options)
    result = run_disturbed(command, 75, tmp_path / "b.csv", unreadable, FAULTS)
    assert not result.problems
    assert [kind for _, kind, _ in result.faults] == FAULTS
    assert result.skipped == 0
    assert compare_runs(tmp_path / "a.csv", tmp_path / "b.csv", unreadable) == []


def test_lost_doubled_changed_and_moved_captions_are_detected(tmp_path):
    whole = 'ID,Caption\na,"x"\nb,"y"\n'
    (tmp_path / "whole.csv").write_text(whole)
    turned = 'ID,Caption\nb,"y"\na,"x"\n'
    for wrong in (whole[:-6], whole + 'b,"y"\n', whole.replace("y", "z"), whole.replace("ID", "Id"), turned):
        (tmp_path / "wrong.csv").write_text(wrong)
        assert compare_runs(tmp_path / "whole.csv", tmp_path / "wrong.csv", []) != []
    (tmp_path / "right.csv").write_text(whole + 'c,""\n')
    assert compare_runs(tmp_path / "whole.csv", tmp_path / "right.csv", ["c"]) == []
    assert compare_runs(tmp_path / "whole.csv", tmp_path / "whole.csv", ["c"]) != []


def test_run_that_loses_captions_is_detected(pictures, tiny_bundle, tmp_path):
    """The judge itself must be able to fail: --no-resume throws the journal's captions away."""
    options = ("--bundle", tiny_bundle, "--beams", 3, "--rows", 12, "--threads", 1, "--no-resume")
    out = tmp_path / "run.csv"
    result = run_disturbed(engine_command(pictures, out, *options), 60, out, [], ["kill", "term", "kill"])
    assert result.problems

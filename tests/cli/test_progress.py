"""Speed and time left, for runs whose images finish in waves; what --progress, --quiet and --verbose print."""

from __future__ import annotations

import heapq
import json
import random
import re

import pytest
from click.testing import CliRunner

from engine.cli.app import main
from engine.cli.caption import Pace, in_words
from tests.helpers.tiny import save_pictures
from train.__main__ import main as train

IMAGES, IN_PARALLEL = 1000, 32


def finish_times(shortest: int, longest: int) -> list[float]:
    """Return when each image is done, in seconds, if a token takes one: captions are handed out in order."""
    chance = random.Random(0)
    free, latest, times = [0.0] * IN_PARALLEL, 0.0, []
    for _ in range(IMAGES):
        end = heapq.heappop(free) + chance.randint(shortest, longest)
        heapq.heappush(free, end)
        latest = max(latest, end)
        times.append(latest)
    return times


@pytest.mark.parametrize(("shortest", "longest"), [(20, 20), (8, 20), (5, 40)])
def test_time_left_is_right_from_the_start(shortest, longest):
    times, now = finish_times(shortest, longest), 0.0
    pace, shown, done = Pace(IMAGES, lambda: now), [], 0
    for second in range(int(0.9 * times[-1])):
        now = float(second)
        while times[done] <= now:
            done += 1
            pace.update(done)
        if (left := pace.left_s) is not None:
            shown.append((second, left / (times[-1] - now)))
    assert shown[0][0] < 0.25 * times[-1]
    assert all(0.5 < share < 2 for _, share in shown), "within a factor of two; images / seconds would be wrong by ten"
    assert shown[-1][1] == pytest.approx(1, abs=0.35)


def test_no_speed_before_the_first_wave_is_over():
    now = 0.0
    pace = Pace(600, lambda: now)
    assert str(pace) == ""
    now = 10.0
    pace.update(1)
    assert str(pace) == ""
    for wave in range(1, 6):
        now = 10.0 * wave
        for done in range(20 * wave - 18, 20 * wave + 1):
            pace.update(done)
    assert str(pace) == "2.00 images/s, about 4 min left"


def test_durations_in_words():
    assert [in_words(seconds) for seconds in (40, 89, 720, 12600)] == ["40 s", "89 s", "12 min", "3.5 h"]


@pytest.fixture
def run(tiny_bundle, tmp_path):
    folder = save_pictures(tmp_path / "images", 3)
    words = [
        "caption",
        "--input",
        folder,
        "--bundle",
        tiny_bundle,
        "--max-new-tokens",
        3,
        "--out",
        tmp_path / "run.csv",
    ]

    def call(*more):
        return CliRunner().invoke(main, [str(word) for word in (*words, *more)])

    return call


def test_json_lines_of_progress(run, monkeypatch):
    monkeypatch.setattr("engine.cli.caption.JSON_EVERY_S", 0.001)
    done = run("--progress", "json", "--quiet")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert len(lines) > 1, "one a period, while no image is finished"
    assert all(list(line) == ["done", "total", "images_per_s", "seconds_left"] for line in lines)
    assert {line["total"] for line in lines} == {3}
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines)
    last = lines[-1]
    assert (last["done"], last["seconds_left"]) == (3, 0.0)
    assert last["images_per_s"] > 0


def test_quiet_keeps_what_a_user_must_know(run, tmp_path):
    assert run("-q").stderr == ""
    (tmp_path / "images/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "images/notes.txt").write_text("x")
    (tmp_path / "images/folder").mkdir()
    done = run("-q", "--without-prompt", "--allow-missing")
    assert done.exit_code == 0
    starts = [line.split(" ")[0] for line in done.stderr.splitlines()]
    assert starts == ["skipped", "note:", "unreadable:"]
    assert "1 folder" in done.stderr.splitlines()[0]
    assert "(--recursive looks into folders)" in done.stderr.splitlines()[0]
    assert run("-q").stderr.splitlines()[-1].startswith("error: 1 of 4 images cannot be read")


def test_verbose_adds_details_times_and_tracebacks(run):
    usual, verbose = run(), run("--verbose")
    lines = verbose.stderr.splitlines()
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in lines)
    details = [line for line in lines if "] detail: " in line]
    assert any("max_new_tokens=3" in line for line in details)
    assert len(lines) == len(usual.stderr.splitlines()) + len(details)
    assert "detail:" not in run().stderr, "the level of one command is not that of the next"
    failed = run("--verbose", "--input", "nowhere")
    assert "Traceback (most recent call last)" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: nowhere does not exist")
    assert "Traceback" not in run("--input", "nowhere").stderr
    assert run("-q", "-v").stderr == "error: --quiet and --verbose exclude each other: remove one of them\n"


@pytest.mark.parametrize(
    ("group", "words", "hint"),
    [
        (main, ["bench", "--images", "photos"], "--images is the number of images: did you mean --input?"),
        (main, ["verify", "--num-beams", "3"], "--help lists the options of this command"),
        (main, ["--jsonl", "caption"], "give it after the command: caption"),
        (train, ["finetune", "--checkpoint", "x"], "did you mean --model?"),
        (train, ["finetune", "--images", "x"], "did you mean --data?"),
    ],
)
def test_hint_for_an_option_of_another_command(group, words, hint):
    refused = CliRunner().invoke(group, words)
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1].endswith(hint)

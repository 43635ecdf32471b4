"""The first commands of a new user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from engine.cli.app import main
from engine.cli.caption import EXAMPLE
from tests.helpers.tiny import random_pictures
from train.__main__ import main as train

CACHES = ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME")
NOTE = "the embedded demo model is used, which only knows T1-weighted head MRI"


def run(*arguments: object) -> click.testing.Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_engine_without_a_command_shows_first_steps():
    shown = run()
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert [line.split()[1] for line in shown.stderr.splitlines() if line.startswith("  engine ")] == [
        *("caption", "report", "models", "info")
    ]
    assert f"--model {EXAMPLE} --input photos --out captions.csv" in shown.stderr
    assert "engine --help" in shown.stderr
    assert run("--version").exit_code == 0


@pytest.mark.parametrize(("group", "words"), [(main, []), (main, ["score"]), (train, [])])
def test_no_summary_is_cut_off(group, words):
    shown = CliRunner().invoke(group, [*words, "--help"], terminal_width=60)
    assert shown.exit_code == 0
    assert "..." not in shown.output.partition("Commands:")[2]


def with_empty_home(folder: Path, module: str, *arguments: object) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run `python -m module` with an empty home and no word about telemetry in its environment; return both."""
    home = folder / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", *CACHES)}
    paths = {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return home, subprocess.run(
        command, env=environment | paths, cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    random_pictures(1)[0].save(tmp_path / "images/a.png")
    return tmp_path / "images"


def test_note_on_captions_of_the_demo_model(images, tiny_bundle, tmp_path):
    demo = run("caption", "--input", images, "--beams", 1, "--max-new-tokens", 2, "--out", tmp_path / "demo.csv")
    assert demo.exit_code == 0, demo.output
    assert NOTE in demo.stderr
    assert f"add --model {EXAMPLE}" in demo.stderr
    own = run("caption", "--input", images, "--bundle", tiny_bundle, "--out", tmp_path / "own.csv")
    assert NOTE not in own.stderr


def test_captioning_stores_no_device_id_and_sends_nothing(images, tiny_bundle, tmp_path):
    """ONNX Runtime would store one in the cache folder."""
    arguments = ("caption", "--input", images, "--bundle", tiny_bundle)
    home, done = with_empty_home(tmp_path, "engine", *arguments, "--backend", "cpu", "--out", tmp_path / "run.csv")
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize(
    ("module", "arguments", "exit_code"),
    [
        ("export", ("--checkpoint", "nowhere", "--out", "bundle"), 1),  # imports all there is before it looks
        ("export.restore", ("--help",), 0),
    ],
)
def test_export_leaves_no_telemetry(module, arguments, exit_code, tmp_path):
    home, done = with_empty_home(tmp_path, module, *arguments)
    assert done.returncode == exit_code, done.stderr
    assert list(home.rglob("*")) == []


def test_an_error_without_a_bundle_stays_one_line(tmp_path):
    failed = run("caption", "--input", tmp_path / "nowhere", "--out", tmp_path / "run.csv")
    assert failed.exit_code == 2
    assert [line for line in failed.stderr.splitlines() if line != "backend: cpu"] == [
        f"error: {tmp_path}/nowhere does not exist: give a folder, an image, a pattern or a list of paths"
    ]

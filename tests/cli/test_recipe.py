"""The README's recipe from pictures to a submission, on the bundled examples and the demo bundle."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import one_at_a_time


def recipe() -> list[list[str]]:
    """The commands of `make recipe` as make would run them, with this interpreter."""
    dry = subprocess.run(["make", "-n", "recipe"], check=True, capture_output=True, text=True).stdout
    commands = []
    for line in dry.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words and words[0].endswith("/venv-full/bin/engine"):
            commands.append([sys.executable, "-m", "engine", *words[1:]])
        elif words and words[0].endswith("/venv-full/bin/python") and words[1:3] == ["-m", "train"]:
            commands.append([sys.executable, *words[1:]])
    return commands


def test_recipe_from_images_to_a_valid_submission():
    commands = recipe()
    assert [command[3] for command in commands] == ["caption", "small-bert", "score", "submit", "check", "report"]
    Path("build/recipe").mkdir(parents=True, exist_ok=True)
    said = ""
    for command in commands:
        with one_at_a_time(Path("build/small-bert.lock")):  # other tests fetch that model, too
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    scores = json.loads(Path("build/recipe/scores.json").read_text())
    assert scores["score"] == scores["bertscore"] > 0.9
    assert "proxy:not the organisers' model" in scores["details"]["scores"]["bertscore"]["signature"]
    assert scores["meteor"] > 0.5
    assert "unavailable" in scores["details"]["scores"]["medbertscore"]
    assert "a valid imageclef2026 submission" in said
    assert "icbm09a_axial_095" in Path("build/recipe/report/index.html").read_text(encoding="utf-8")

"""Every command that needs a GPU reports at once, in one sentence, that there is none."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from tests.helpers.gpu import missing_gpu

pytestmark = pytest.mark.skipif(missing_gpu() is None, reason="this machine has a GPU")

COMMANDS = {
    "caption, cuda": ["caption", "--input", "examples/images", "--out", "OUT", "--backend", "cuda"],
    "caption, tensorrt": ["caption", "--input", "examples/images", "--out", "OUT", "--backend", "tensorrt"],
    "caption, trt": ["caption", "--input", "examples/images", "--out", "OUT", "--backend", "trt", "--cuda-graphs"],
    "verify": ["verify", "--backend", "cuda"],
    "bench": ["bench", "--backend", "trt", "--plans", "OUT"],
    "plan": ["plan", "--out", "OUT"],
    "plan, rtx": ["plan", "--builder", "tensorrt-rtx", "--out", "OUT"],
}
WITHIN_S = 2.0
"""Limit in seconds of processor time, so that a busy machine makes no difference."""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_missing_gpu_is_named_at_once(name, tmp_path):
    out = str(tmp_path / "out")
    arguments = [out if argument == "OUT" else argument for argument in COMMANDS[name]]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", "from engine.cli.app import main; main()", *arguments], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 1  # a crash would be negative
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no NVIDIA driver on this machine")
    assert ("--builder" in line) == ("plan" in name)
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < WITHIN_S


def test_plans_are_only_for_trt():
    result = subprocess.run(
        [sys.executable, "-c", "from engine.cli.app import main; main()", "verify", "--backend", "cpu", "--plans", "x"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "for the backend trt" in result.stderr

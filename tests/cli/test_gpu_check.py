"""benchmarks.gpu.check, run on the CPU backend: its comparisons, its report, its errors."""

from __future__ import annotations

import contextlib
import json
import types

import pytest
import torch
from click.testing import CliRunner

from benchmarks import workload
from benchmarks.gpu import check, first, parts, runs
from benchmarks.gpu.check import compare, in_process, main
from engine.backends.providers import Gpu
from tests.helpers.gpu import missing_gpu
from tests.helpers.stand_in import RecordingDevice


def test_different_captions_are_counted():
    cpu = {"said": {"greedy": [{"ids": [1, 2], "score": -1.0}, {"ids": [1, 3], "score": -2.0}]}}
    mine = {"said": {"greedy": [{"ids": [1, 2], "score": -1.1}, {"ids": [1, 4], "score": -2.0}]}}
    found = compare(mine, cpu)["greedy"]
    assert (found["images"], found["identical"]) == (2, 1)
    assert found["max_score_difference"] == pytest.approx(0.1)


def test_crashing_backend_is_reported(tiny_bundle, monkeypatch):
    def crash(command, **_):
        return check.subprocess.CompletedProcess(command, -11, "", "")

    monkeypatch.setattr(check.subprocess, "run", crash)
    entry = in_process(tiny_bundle, "trt+graphs", 8, [], 10)
    assert entry["exit_code"] == -11
    assert "failed" in check.summary(entry)


def test_parts_before_the_backends_run_here():
    found = parts.memory(RecordingDevice())
    assert found.pop("too_much").startswith(("was given", "refused"))
    assert found.pop("blocks_equal")
    assert found.pop("replays_equal")
    assert all(one == {"zero": True, "equal": True} for one in found.values())
    assert len(found) == 3
    times = parts.kernels("cpu", repeats=1)
    assert len(times) == 10
    assert all(ms > 0 for ms in times.values())


def test_parts_after_the_backends_run_on_the_cpu(tiny_bundle):
    found = runs.profile(tiny_bundle, "cpu", 6)
    assert list(found["nodes_by_provider"]) == ["CPUExecutionProvider"]
    assert found["memcpy_nodes"] == 0
    assert len(found["host_ms"]) == 10
    assert list(found["kernels"]) == ["not_measured"]
    sides = runs.side_by_side(tiny_bundle, "cpu", 8)
    assert all(images_per_s > 0 for images_per_s in sides.values())
    whole = runs.minute(tiny_bundle, "cpu", 24)
    assert whole["same_after_kill_9"]
    assert whole["images_per_s"] > 0


def test_kernel_times_leave_out_the_host(monkeypatch):
    """Events as of torch's profiler; on a GPU this was never run."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        ("flash", cuda, 300.0),
        ("cudaLaunchKernel", cpu, 9000.0),
        ("copy", cuda, 1500.0),
        ("flash", cuda, 2000.0),
    ]
    profiled = types.SimpleNamespace(
        events=lambda: [
            types.SimpleNamespace(name=name, device_type=device, device_time_total=us) for name, device, us in events
        ]
    )
    done = []
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(profiled))
    found = runs.kernel_times(lambda: done.append("captions"))
    assert done == ["captions"]
    assert found["slowest"] == [("flash", 2.3, 2), ("copy", 1.5, 1)]
    assert (found["gpu_s"], found["launches"]) == (pytest.approx(0.0038), 3)
    assert found["wall_s"] > 0


def test_failing_part_is_reported_and_the_others_run(monkeypatch):
    def crash(command, **_):
        return check.subprocess.CompletedProcess(command, 1, "", "x" * 20_000 + "the reason")

    monkeypatch.setattr(check.subprocess, "run", crash)
    found = check.run_part("kernels", 10)
    assert found["error"] == "exit code 1"
    assert found["stderr"].endswith("the reason")
    assert len(found["stderr"]) == check.KEPT_BYTES


def test_failing_backend_keeps_the_other_results(tiny_bundle, tmp_path, monkeypatch):
    """The CPU passes its own check."""
    monkeypatch.setattr(check, "find_gpu", lambda *_: Gpu("NVIDIA A100-SXM4-40GB", "8.0", 40 << 30))
    monkeypatch.setattr(check, "FIRST", {"probe": None})
    out = tmp_path / "out.json"
    arguments = ["--bundle", tiny_bundle, "--json", out, "--backends", "cuda,cpu", "--images", 12, "--rows", "8,16"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert "8/8 greedy" in result.stderr
    report = json.loads(out.read_text())
    assert "no NVIDIA driver" in report["parts"]["probe"]["stderr"]
    failed, passed = report["entries"]
    assert failed["error"].startswith("no NVIDIA driver")
    assert passed["used"] == "cpu"
    assert {c["identical"] for c in passed["against_cpu"].values()} == {8}
    assert all(check["passed"] for check in passed["golden"])
    assert [speed["rows"] for speed in passed["speed"]] == [8, 16]
    assert all(speed["images_per_s"] > 0 for speed in passed["speed"])
    assert passed["second_load_s"] > 0
    assert passed["share_of_paper_floor"] > 0


@pytest.mark.skipif(missing_gpu() is None, reason="this machine has a GPU")
def test_without_a_gpu_is_reported_at_once(tmp_path):
    result = CliRunner().invoke(main, ["--json", str(tmp_path / "out.json")])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no NVIDIA driver")
    assert not (tmp_path / "out.json").exists()


def test_an_unknown_backend_is_refused(tmp_path):
    result = CliRunner().invoke(main, ["--json", str(tmp_path / "out.json"), "--backends", "tpu"])
    assert result.exit_code == 1
    assert "tpu" in result.stderr


def test_first_parts_run_on_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(workload.SHAPES, "tiny", None)  # `make` replaces both; they are restored after the test
    monkeypatch.setattr(workload, "TEXT_WIDTH", workload.TEXT_WIDTH)
    for name, value in {"W": tmp_path, "DEVICE": "cpu", "SHAPE": "tiny", "SECONDS": 0.1, "IMAGES": 8}.items():
        monkeypatch.setattr(first, name, value)
    first.make()
    first.ids("cpu", "fp32", "4")
    first.ids("cpu", "fp16", "4")
    first.engine("cpu", "fp32", "8")
    first.generate("2")
    first.live("8")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["part"] for line in lines[-6:]] == ["ids", "ids", "engine", "generate", "generate", "live"]
    assert lines[-6]["same_as"] == {"cpu_fp32": "4/4"}
    assert all(line["images_per_s"] > 0 for line in lines[-6:])

"""The stand-ins for CUDA's libraries: memory, copies and event log, and a bundle on the real onnxruntime-gpu.

They are loaded in separate processes only: other tests of this process must not find them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import onnx
import pytest

from engine.bundle.manifest import Bundle, cache_names
from tests.nvidia.fake.build import build, missing_tools

MEMORY = """
import ctypes, json
from tests.nvidia.fake.events import peak_bytes, recorded

cudart = ctypes.CDLL("libcudart.so.13")
cudart.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
cudart.cudaFree.argtypes = [ctypes.c_void_p]
codes = []

def allocate(size):
    address = ctypes.c_void_p()
    codes.append(cudart.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size)))
    return address

allocate(1)  # not recorded
sent, back = ctypes.create_string_buffer(b"x" * 1000), ctypes.create_string_buffer(1000)
with recorded() as events:
    first, second, none = allocate(1000), allocate(1000), allocate(1 << 20)
    cudart.cudaMemcpy(first, sent, 1000, 1)
    cudart.cudaMemcpy(second, first, 1000, 3)
    cudart.cudaMemcpy(back, second, 1000, 2)
    codes += [cudart.cudaFree(first), cudart.cudaFree(second)]
    allocate((1 << 20) - 1)
allocate(1)  # not recorded, and nothing is left
calls = [(event.kind, event.name, *event.values[:2]) for event in events]
print(json.dumps({"codes": codes, "back": back.value.decode(), "calls": calls, "peak": peak_bytes()}))
"""
DEVICE = """
import json
from dataclasses import asdict
from benchmarks.gpu.parts import _blocks_are_equal
from engine.backends.device import CudaDevice
from engine.backends.providers import find_gpu
from engine.errors import OutOfMemoryError

device = CudaDevice()
try:
    device.allocate((2 << 30) + 1)
except OutOfMemoryError as error:
    refused = str(error)
print(json.dumps({"gpu": asdict(find_gpu()), "blocks": _blocks_are_equal(device), "refused": refused}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    missing = missing_tools()
    if missing:
        pytest.skip(missing)
    return os.environ | build(tmp_path_factory.mktemp("fake"))


def run(environment: dict[str, str], *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment | variables, capture_output=True, text=True)


def report_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_memory_and_copies_are_recorded(environment):
    report = report_of(run(environment, "-c", MEMORY, FAKE_MEM=str(1 / 1024)))
    out_of_memory = 2
    assert report["codes"] == [0, 0, 0, out_of_memory, 0, 0, 0, out_of_memory]
    assert report["back"] == 1000 * "x"
    assert report["peak"] == 1 << 20
    assert report["calls"] == [
        ["allocate", "cudaMalloc", 1000, 0],
        ["allocate", "cudaMalloc", 1000, 0],
        ["allocate", "cudaMalloc", 1 << 20, 0],
        *(["copy", "cudaMemcpy", 1000, direction] for direction in (1, 3, 2)),
        ["free", "cudaFree", 0, 0],
        ["free", "cudaFree", 0, 0],
        ["allocate", "cudaMalloc", (1 << 20) - 1, 0],
    ]


def test_copies_within_the_device_can_be_left_out(environment):
    assert report_of(run(environment, "-c", MEMORY, FAKE_MEM=str(1 / 1024), FAKE_FAST="1"))["back"] == ""


def test_the_engine_sees_the_device(environment):
    report = report_of(run(environment, "-c", DEVICE, FAKE_MEM="2", FAKE_SM="9.0"))
    name = "stand-in (no GPU)"
    assert report["gpu"] == {"name": name, "compute_capability": "9.0", "memory_bytes": 2 << 30, "driver_cuda": 13000}
    assert report["blocks"]
    assert "out of memory" in report["refused"]


@pytest.mark.parametrize(("tools", "reason"), [([], "gcc is not installed"), (["gcc"], "cuda_runtime_api.h")])
def test_missing_tools_are_named_in_one_line(tools, reason, tmp_path):
    for tool in tools:
        (tmp_path / tool).touch(mode=0o755)
    variables = {"PATH": str(tmp_path), "CUDA_INCLUDE": str(tmp_path)}
    result = run(dict(os.environ), "-m", "tests.nvidia.fake.build", str(tmp_path / "lib"), **variables)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert reason in line
    assert not (tmp_path / "lib").exists()


@pytest.fixture
def wheel(environment) -> dict[str, str]:
    """The environment, if it has the real onnxruntime-gpu."""
    if "ENGINE_ORT_GPU" not in os.environ:
        pytest.skip("ENGINE_ORT_GPU does not name a folder with an unzipped onnxruntime-gpu wheel")
    return environment


def test_launches_of_a_bundle_are_counted(wheel, tiny_bundle):
    count = ("-m", "tests.nvidia.fake.count", "--bundle", str(tiny_bundle), "--rows", "32", "--images", "24")
    report = report_of(run(wheel, *count))
    nodes = Counter(node.op_type for node in onnx.load(tiny_bundle / "decoder.onnx").graph.node)
    step = report["step"]
    assert step["events"]["product"] == sum(step["products"].values()) == nodes["MatMul"] + nodes["Gemm"]
    assert step["events"]["kernel"] == sum(step["kernels"].values()) > step["events"]["product"]
    assert [count for name, count in step["kernels"].items() if "TopK" in name]
    assert step["events"]["copy to the host"] == 2  # scores and ids
    layers = Bundle.load(tiny_bundle).model.num_layers
    assert report["admit"]["events"] == {"copy on the device": len(cache_names(layers, "cross"))}
    assert report["regroup"]["products"] == {}
    assert 0 < step["ort_ms"] < step["cpu_ms"]
    assert report["run"]["images"] == 24
    assert report["run"]["peak_mib"] >= sum(report["load"]["allocated_mib"]) > 0
    assert all("8.0" in capabilities for capabilities in report["run"]["machine_code"])


def test_too_little_memory_ends_in_one_line(wheel, tiny_bundle):
    count = ("-m", "tests.nvidia.fake.count", "--bundle", str(tiny_bundle))
    result = run(wheel, *count, FAKE_MEM=str(1 / 1024))
    assert result.returncode == 1
    assert "memory" in result.stderr.splitlines()[-1]


def test_attention_becomes_one_kernel(wheel):
    report = report_of(run(wheel, "-m", "tests.nvidia.fake.operators"))
    (call,) = report["Attention (23), encoder"]
    assert "flash_fwd_kernel" in call
    assert not [call for calls in report.values() for call in calls if call.startswith("failed")]

"""The stand-ins for CUDA's libraries: memory, copies and event log, and a bundle on the real onnxruntime-gpu.

They are loaded in separate processes only: other tests of this process must not find them.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

from engine.backends.providers import CUDNN, MACHINE_CODE, PROVIDER_LIBRARIES
from engine.bundle.manifest import Bundle, cache_names
from export.bundle import export_bundle
from tests.helpers.tiny import make_checkpoint
from tests.nvidia.fake.build import build, missing_tools
from tests.nvidia.fake.events import FAT_BINARY, capabilities_of

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
REFUSED_OPTION = """
from engine.backends import open_backend, providers
from engine.bundle.manifest import Bundle
from engine.errors import BackendError
from engine.runtime import Runtime

providers.CUDA_OPTIONS["no_such_option"] = "1"
try:
    open_backend(Bundle.load(), Runtime("cuda"))
except BackendError as error:
    print(error)
"""
RETRIES = """
import gc, json, sys
from pathlib import Path
from unittest import mock
from benchmarks.host_worker import pictures
from engine.backends import open_backend
from engine.backends.ort import OrtBackend
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import OutOfMemoryError
from engine.runtime import Runtime
from tests.nvidia.fake.count import SEARCH, random_step

slots, bundle = int(sys.argv[1]), Bundle.load()
captioner = Captioner(bundle, open_backend(bundle, Runtime("cuda")))
images, tried = list(pictures(200, bundle.image.height, bundle.image.width)), []
with mock.patch.object(OrtBackend, "step", random_step(bundle.tokens.eos)):
    while slots:  # as caption_within_memory does
        tried.append(slots)
        gc.collect()
        try:
            captions = list(captioner.caption(images, rows=4 * slots, num_beams=4, **SEARCH))
            break
        except OutOfMemoryError:
            slots //= 2
print(json.dumps({"tried": tried, "captions": len(captions)}))
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


def test_attention_and_layer_norms_of_fp16_are_one_kernel_each(wheel, tmp_path):
    heads = {"hidden_size": 32, "num_attention_heads": 2}  # 16 wide, as kernels need
    checkpoint = make_checkpoint(tmp_path / "wide", text=heads | {"encoder_hidden_size": 32}, vision=heads)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", lambda _: None, precision="fp16")
    count = ("-m", "tests.nvidia.fake.count", "--bundle", str(bundle.path), "--rows", "32", "--images", "24")
    report = report_of(run(wheel, *count))

    def launched(call: str, name: str) -> int:
        return sum(count for kernel, count in report[call]["kernels"].items() if name in kernel)

    layers = bundle.model.num_layers
    assert launched("encode", "flash_fwd") == launched("step", "flash_fwd") == layers
    assert launched("step", "SkipLayerNorm") == 3 * layers + 1  # and one of the embeddings
    assert launched("encode", "softmax") == 0


def test_too_little_memory_ends_in_one_line(wheel, tiny_bundle):
    count = ("-m", "tests.nvidia.fake.count", "--bundle", str(tiny_bundle))
    result = run(wheel, *count, FAKE_MEM=str(1 / 1024))
    assert result.returncode == 1
    assert "memory" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("library", ["libcublas.so.13", "libcurand.so.10", CUDNN])
def test_missing_library_is_named_and_auto_uses_the_cpu(library, wheel, tmp_path):
    shutil.copytree(wheel["LD_LIBRARY_PATH"], tmp_path / "lib")
    (tmp_path / "lib" / library).unlink()
    there = {"LD_LIBRARY_PATH": str(tmp_path / "lib")}
    image = sorted(Path("examples/images").iterdir())[0]
    caption = ("-m", "engine", "caption", "--input", str(image), "--out", str(tmp_path / "run.csv"))
    state = report_of(run(wheel, "-m", "engine", "info", "--json", **there))["backends"]["cuda"]
    assert state.startswith(f"missing: ONNX Runtime's CUDAExecutionProvider cannot load a library ({library}: ")
    named = run(wheel, *caption, "--backend", "cuda", **there)
    assert (named.returncode, named.stderr.splitlines()) == (1, [state.replace("missing: ", "error: ", 1)])
    auto = run(wheel, *caption, **there)
    assert (auto.returncode, [line for line in auto.stderr.splitlines() if library in line]) == (
        0,
        [state.replace("missing: ", "--backend auto uses the CPU, not the GPU: ", 1)],
    )
    assert "onnxruntime" not in auto.stderr.replace("onnxruntime-gpu", "")  # ONNX Runtime's own log


def test_refused_option_is_named(wheel):
    result = run(wheel, "-c", REFUSED_OPTION)
    (line,) = result.stdout.splitlines()
    assert line.endswith('Unknown provider option: "no_such_option".')


def test_gpu_without_kernels_is_named(wheel):
    state = report_of(run(wheel, "-m", "engine", "info", "--json", FAKE_SM="10.0"))["backends"]["cuda"]
    assert "stand-in (no GPU) has compute capability 10.0, but onnxruntime-gpu" in state


def test_known_machine_code_is_that_of_the_wheel(wheel):
    release = run(wheel, "-c", "import onnxruntime; print(onnxruntime.__version__)").stdout
    known = MACHINE_CODE.get(tuple(map(int, release.split(".")[:2])))
    if known is None:
        pytest.skip(f"MACHINE_CODE has no entry for onnxruntime-gpu {release}")
    path = Path(os.environ["ENGINE_ORT_GPU"], "onnxruntime", "capi", PROVIDER_LIBRARIES["CUDAExecutionProvider"])
    found, place = set(), 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as library:
        start = ctypes.c_char.from_buffer(library)
        while (place := library.find(FAT_BINARY, place)) >= 0:
            found.update(capabilities_of(ctypes.addressof(start) + place))
            place += len(FAT_BINARY)
        del start
    assert found == set(known[platform.machine()])


def test_memory_returns_after_too_many_slots(wheel):
    """The second run has the memory of a first one: it fits with as many slots."""
    limits = {"FAKE_MEM": "1", "FAKE_FAST": "1"}
    fitting = 48
    assert report_of(run(wheel, "-c", RETRIES, str(fitting), **limits)) == {"tried": [fitting], "captions": 200}
    report = report_of(run(wheel, "-c", RETRIES, str(8 * fitting), **limits))
    assert report == {"tried": [8 * fitting, 4 * fitting, 2 * fitting, fitting], "captions": 200}


def test_attention_becomes_one_kernel(wheel):
    report = report_of(run(wheel, "-m", "tests.nvidia.fake.operators"))
    (call,) = report["Attention (23), encoder"]
    assert "flash_fwd_kernel" in call
    assert not [call for calls in report.values() for call in calls if call.startswith("failed")]

"""ONNX Runtime's NVIDIA providers: their options, and the errors for missing parts."""

from __future__ import annotations

import ctypes
import importlib.metadata
import types
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

from engine.backends import plans, providers, trt
from engine.backends.ort import LONGEST_REASON, open_session, ort_errors
from engine.backends.plans import PORTABLE
from engine.backends.shapes import profiles
from engine.errors import BackendError
from tests.helpers.gpu import missing_gpu


@pytest.fixture(autouse=True)
def _fresh_probes():
    """Providers are probed once per process; each test has another machine."""
    for cached in (providers._probe, providers.choose):
        cached.cache_clear()
    yield
    for cached in (providers._probe, providers.choose):
        cached.cache_clear()


# ONNX Runtime's providers, as data


@pytest.mark.parametrize("name", providers.KINDS)
@pytest.mark.parametrize("graph", plans.GRAPHS)
def test_provider_options_are_strings(name, graph, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = providers.providers_for(name, bundle, graph, providers.bounds_for(name, bundle))
    assert [provider for provider, _ in chosen] == list(providers.KINDS[name].providers)
    for _, options in chosen:
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in options.items())


def test_tensorrt_options_have_profile_cache_and_precision(bundle, bounds, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (_, options), *_ = providers.providers_for("tensorrt", bundle, "decoder", bounds)
    for kind in ("min", "opt", "max"):
        shapes = dict(entry.rsplit(":", 1) for entry in options[f"trt_profile_{kind}_shapes"].split(","))
        assert set(shapes) == set(profiles(bundle, bounds)["decoder"]) - {"num_candidates"}
        assert all("0" not in shape.split("x") for shape in shapes.values())
    assert shapes["ancestry"] == f"{bounds.slots}x{bounds.beams}x{bounds.settled + bounds.recent + bounds.beams}"
    assert options["trt_fp16_enable"] == "0"
    (_, half), *_ = providers.providers_for("tensorrt", replace(bundle, precision="fp16"), "decoder", bounds)
    assert half["trt_fp16_enable"] == "1"
    assert "TopK" in half["trt_op_types_to_exclude"]
    folder = tmp_path / "blip-caption-engine" / bundle.digest[:16] / "onnxruntime-unknown-unknown"
    assert options["trt_engine_cache_path"] == str(folder)
    assert folder.stat().st_mode & 0o077 == 0


# errors, without a GPU


@pytest.fixture
def with_gpu(monkeypatch):
    """A driver that reports an A100, so that the checks after it are reached."""
    gpu = providers.Gpu("NVIDIA A100-SXM4-40GB", "8.0", 40 << 30, 13000)
    for module in (providers, plans, trt):
        monkeypatch.setattr(module, "find_gpu", lambda *_: gpu)


@pytest.mark.usefixtures("with_gpu")
def test_both_runtimes_in_one_folder_are_refused(monkeypatch, tmp_path):
    """If they are in separate folders, as in a container image with the CPU package, Python imports the first one."""
    folders = {"onnxruntime": tmp_path / "one", "onnxruntime-gpu": tmp_path / "one"}

    def distribution(name: str):
        return types.SimpleNamespace(locate_file=lambda file: folders[name] / file, version="1.31.1")

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    for name in ("cuda", "tensorrt"):
        with pytest.raises(BackendError, match="overwrite each other"):
            providers.require_provider(name)
    providers.require_provider("cpu")
    folders["onnxruntime-gpu"] = tmp_path / "other"
    assert providers.clashing_runtimes() is None


@pytest.mark.parametrize(
    ("release", "driver", "is_refused"),
    [
        ("1.31.1", 12040, True),
        ("1.31.1", 13000, False),
        ("1.26.0", 12040, False),
        ("1.26.0", 11080, True),
    ],
)
def test_old_driver_is_refused_before_loading(release, driver, is_refused, monkeypatch):
    monkeypatch.setattr(providers.importlib.metadata, "version", lambda _: release)
    gpu = providers.Gpu("NVIDIA A100-SXM4-40GB", "8.0", 40 << 30, driver)
    if is_refused:
        with pytest.raises(
            BackendError, match=rf"supports CUDA {driver // 1000}\..*onnxruntime-gpu {release[:4]} needs .* r580"
        ):
            providers.refuse_old_driver(gpu)
    else:
        providers.refuse_old_driver(gpu)


@pytest.mark.usefixtures("with_gpu")
def test_missing_packages_are_named(monkeypatch):
    with pytest.raises(BackendError, match=r"onnxruntime-gpu\[cuda,cudnn\]"):
        providers.require_provider("cuda")
    with pytest.raises(BackendError, match=r"needs tensorrt, .*tensorrt-cu13"):
        providers.require_provider("tensorrt")
    monkeypatch.setitem(plans.MODULES, PORTABLE, "no_such_module")
    with pytest.raises(BackendError, match=r"pip install 'tensorrt>="):
        trt.require_tensorrt()
    with pytest.raises(BackendError, match=r"pip install 'tensorrt-rtx>="):
        plans.import_builder(PORTABLE)


@pytest.mark.usefixtures("with_gpu")
def test_auto_reports_why_the_gpu_is_not_used(capsys):
    for _ in range(2):
        assert providers.choose("auto") == "cpu"  # this onnxruntime has no CUDA provider
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--backend auto uses the CPU, not the GPU: backend cuda needs ONNX Runtime's CUDAExecution")


@pytest.mark.parametrize(("count", "code"), [(0, 0), (1, providers.NO_DEVICE), (None, 0)])
def test_auto_without_a_gpu_is_silent(count, code, monkeypatch, capsys):
    class Driver:
        cuInit = cuGetErrorString = staticmethod(lambda *_: code)  # noqa: N815 (NVIDIA's names)

        @staticmethod
        def cuDeviceGetCount(where) -> int:  # noqa: N802
            where._obj.value = count
            return 0

    def load(name: str) -> Driver:
        if count is None:
            raise OSError(name)
        return Driver()

    monkeypatch.setattr(providers.ctypes, "CDLL", load)
    assert providers.choose("auto") == "cpu"
    assert capsys.readouterr().err == ""


@pytest.fixture
def gpu_runtime(monkeypatch, tmp_path) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """ONNX Runtime with the CUDA provider in tmp_path. Returns the libraries that were loaded, and a dictionary of
    those that do not load, with the loader's message.
    """
    runtime = types.SimpleNamespace(
        __file__=str(tmp_path / "__init__.py"),
        get_available_providers=lambda: [providers.CUDA, providers.CPU],
        preload_dlls=lambda: print("Failed to load libcublas.so.13"),
    )
    loaded: list[tuple[str, int]] = []
    broken: dict[str, str] = {}

    def load(path: str, mode: int = ctypes.DEFAULT_MODE) -> None:
        loaded.append((path, mode))
        if Path(path).name in broken:
            raise OSError(broken[Path(path).name])

    gpu = providers.Gpu("NVIDIA A100-SXM4-40GB", "8.0", 40 << 30, 13000)
    monkeypatch.setattr(providers, "find_gpu", lambda *_: gpu)
    monkeypatch.setattr(providers, "import_onnxruntime", lambda _: runtime)
    monkeypatch.setattr(providers.ctypes, "CDLL", load)
    return loaded, broken


LIBRARY = "libonnxruntime_providers_cuda.so"


def test_libraries_are_loaded_once(gpu_runtime, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(providers, "CudaDevice", lambda: None)
    for name in ("auto", "cuda", "auto"):
        assert providers.choose(name) == "cuda"
        providers.require_provider("cuda")
    capi = tmp_path / "capi"
    assert gpu_runtime[0] == [
        (str(capi / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL),
        (str(capi / LIBRARY), ctypes.DEFAULT_MODE),
        (providers.CUDNN, ctypes.DEFAULT_MODE),
    ]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (LIBRARY, "libcublas.so.13: cannot open shared object file"),
        (providers.CUDNN, "libcudnn.so.9: cannot open shared object file"),
    ],
)
def test_missing_library_is_named(library, message, gpu_runtime, capsys):
    gpu_runtime[1][library] = message
    for _ in range(2):
        with pytest.raises(BackendError, match=rf"CUDAExecutionProvider cannot load a library \({message}\): pip"):
            providers.require_provider("cuda")
        assert providers.choose("auto") == "cpu"
    assert len([path for path, _ in gpu_runtime[0] if path.endswith(LIBRARY)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.usefixtures("gpu_runtime")
def test_missing_cuda_bindings_are_named(monkeypatch):
    find_spec = providers.importlib.util.find_spec

    def without_bindings(name: str):
        if name.startswith("cuda"):
            raise ModuleNotFoundError(name)
        return find_spec(name)

    monkeypatch.setattr(providers.importlib.util, "find_spec", without_bindings)
    with pytest.raises(BackendError, match=r"cuda\.bindings\.runtime, which is not installed: .*cuda-bindings"):
        providers.require_provider("cuda")


@pytest.mark.parametrize(
    ("capability", "machine", "release", "is_refused"),
    [
        *((capability, "x86_64", "1.31.1", False) for capability in ("7.5", "8.0", "8.7", "9.0", "12.0", "12.1")),
        *((capability, "x86_64", "1.31.1", True) for capability in ("6.1", "7.0", "10.0", "10.3", "11.0")),
        *((capability, "aarch64", "1.31.1", capability in ("7.5", "8.0")) for capability in ("7.5", "8.0", "9.0")),
        ("10.0", "x86_64", "1.99.0", False),
        ("7.0", "riscv", "1.31.1", False),
    ],
)
def test_gpu_without_kernels_is_refused(capability, machine, release, is_refused, monkeypatch):
    monkeypatch.setattr(providers.importlib.metadata, "version", lambda _: release)
    monkeypatch.setattr(providers.platform, "machine", lambda: machine)
    monkeypatch.setattr(providers, "find_gpu", lambda *_: providers.Gpu("NVIDIA B200", capability, 1 << 37, 13000))
    with pytest.raises(BackendError) as raised:
        providers.require_provider("cuda")
    assert is_refused == (f"NVIDIA B200 has compute capability {capability}, but" in str(raised.value))


def test_missing_kernels_and_long_errors():
    """A long message keeps its end, because it begins with places in ONNX Runtime's C++ code."""
    text = f"/onnxruntime_src/{'x' * LONGEST_REASON} no kernel image is available for execution on the device"
    with pytest.raises(BackendError, match="machine code for this GPU") as raised, ort_errors("cuda"):
        raise RuntimeError(text)
    assert str(raised.value).endswith("on the device")
    assert "onnxruntime_src" not in str(raised.value)


def test_fallback_to_another_provider_is_an_error(bundle):
    """If a library is missing, ONNX Runtime only logs a line. For refused options it also falls back, unless told not
    to, and prints the reason to standard output. The stub does both.
    """
    session, reasons = types.SimpleNamespace(get_providers=lambda: [providers.CPU]), []

    def open_stub(*_, enable_fallback: int = 1, **__):
        if reasons and not enable_fallback:
            raise RuntimeError(reasons[0])
        return session

    runtime = types.SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=open_stub)
    wanted = [(providers.CUDA, {}), (providers.CPU, {})]
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        open_session(runtime, bundle.path / "regroup.onnx", wanted, 1, is_optimised=True, has_patterns=True)
    reasons.append("Unknown provider option")
    with pytest.raises(BackendError, match=r"regroup\.onnx cannot be loaded: Unknown provider option"):
        open_session(runtime, bundle.path / "regroup.onnx", wanted, 1, is_optimised=True, has_patterns=True)


def test_missing_driver_is_reported(monkeypatch):
    if missing_gpu() is None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(providers, "DRIVER", "libcuda-that-is-not-there.so")
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        providers.find_gpu()


def test_driver_without_devices_and_failing_driver(monkeypatch):
    class Driver:
        def __init__(self, codes: dict[str, int]) -> None:
            self._codes = codes

        def __getattr__(self, name: str):
            return lambda *_: self._codes.get(name, 0)

    monkeypatch.setattr(providers.ctypes, "CDLL", lambda _: Driver({}))
    with pytest.raises(BackendError, match="sees no GPU"):
        providers.find_gpu()
    monkeypatch.setattr(providers.ctypes, "CDLL", lambda _: Driver({"cuInit": 100}))
    with pytest.raises(BackendError, match=r"cuInit.*100"):
        providers.find_gpu()

"""ONNX Runtime's NVIDIA providers: their options, and the errors for missing parts."""

from __future__ import annotations

import importlib.metadata
import types
from dataclasses import replace

import onnxruntime
import pytest

from engine.backends import plans, providers, trt
from engine.backends.ort import open_session
from engine.backends.plans import PORTABLE
from engine.backends.shapes import profiles
from engine.errors import BackendError
from tests.helpers.gpu import missing_gpu

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
def test_auto_needs_the_cuda_provider():
    assert providers.choose("auto") == "cpu"  # this onnxruntime has no CUDA provider


def test_fallback_to_another_provider_is_an_error(bundle):
    """ONNX Runtime itself only logs a line and uses the CPU, like the stub here."""
    session = types.SimpleNamespace(get_providers=lambda: [providers.CPU])
    runtime = types.SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions, InferenceSession=lambda *_, **__: session
    )
    wanted = [(providers.CUDA, {}), (providers.CPU, {})]
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
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

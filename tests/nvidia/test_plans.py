"""Plans on disk: what decides that one is kept, built anew or refused. Building itself is replaced by a few bytes."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from dataclasses import replace

import onnxruntime
import pytest

from engine.backends import nvidia, plans, providers, trt
from engine.backends.execution import PlanRunner
from engine.backends.plans import ANY_GPU, PORTABLE, Target, build_plans, read_plan
from engine.backends.sessions import open_session
from engine.backends.shapes import Bounds, profiles
from engine.bundle.manifest import Bundle
from engine.errors import BackendError, UsageError
from engine.files.lock import OutputLock
from tests.helpers.gpu import missing_gpu
from tests.helpers.stand_in import RecordingDevice

TARGET = Target(PORTABLE, "1.7.1", "8.0", ANY_GPU)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load()


@pytest.fixture(scope="module")
def bounds(bundle) -> Bounds:
    return Bounds.of(bundle)


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The graphs that were built, in order."""
    made: list[str] = []

    def build(_bundle, graph, *_):
        made.append(graph)
        return f"{graph} {len(made)}".encode()

    monkeypatch.setattr(plans, "build_plan", build)
    return made


def here(builder: str) -> Target:
    return replace(TARGET, builder=builder)


def make(bundle, folder, bounds, target=TARGET, **given):
    return build_plans(bundle, folder, bounds, target, lambda _: None, **given)


def test_plans_are_built_once(bundle, bounds, built, tmp_path):
    paths = make(bundle, tmp_path / "plans", bounds)
    assert [path.name for path in paths] == ["encoder.plan", "decoder.plan", "regroup.plan"]
    make(bundle, tmp_path / "plans", bounds)
    assert built == ["encoder", "decoder", "regroup"]
    for graph in plans.GRAPHS:
        plan = read_plan(tmp_path / "plans", bundle, graph, here)
        assert plan.content.startswith(graph.encode())
        assert (plan.bounds, plan.target) == (bounds, TARGET)
    assert not list((tmp_path / "plans").glob("*.tmp"))


@pytest.mark.parametrize(
    "other",
    [
        {"target": replace(TARGET, version="1.8")},
        {"target": replace(TARGET, compute_capability="8.6")},
        {"target": replace(TARGET, gpu="NVIDIA A100")},
        {"target": replace(TARGET, builder="tensorrt")},
        {"bounds": {"beams": 10}},
        {"bounds": {"slots": 8}},
        {"precision": "fp16"},
        {"files": {"decoder.onnx": "0" * 64}},
        {"files": {"decoder.onnx.data": "0" * 64}},
    ],
)
def test_whatever_decides_what_a_plan_is_makes_it_another(other, bundle, bounds, built, tmp_path):
    make(bundle, tmp_path, bounds)
    built.clear()
    changed = replace(
        bundle, files={**bundle.files, **other.get("files", {})}, precision=other.get("precision", bundle.precision)
    )
    wider = replace(bounds, **other.get("bounds", {}))
    make(changed, tmp_path, wider, other.get("target", TARGET))
    assert "decoder" in built
    assert built == (["decoder"] if "files" in other else ["encoder", "decoder", "regroup"])


def damage_plan(folder):
    (folder / "decoder.plan").write_bytes(b"something else")


def damage_note(folder):
    (folder / "decoder.json").write_text("{")


def lose_note(folder):
    (folder / "decoder.json").unlink()


@pytest.mark.parametrize("damage", [damage_plan, damage_note, lose_note])
def test_damaged_plans_are_refused_and_built_again(damage, bundle, bounds, built, tmp_path):
    make(bundle, tmp_path, bounds)
    built.clear()
    damage(tmp_path)
    with pytest.raises(BackendError, match="engine plan"):
        read_plan(tmp_path, bundle, "decoder", here)
    make(bundle, tmp_path, bounds)
    assert built == ["decoder"]
    assert read_plan(tmp_path, bundle, "decoder", here).content == b"decoder 1"


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("machine", "named"),
    [
        (replace(TARGET, compute_capability="9.0"), "compute_capability"),
        (replace(TARGET, version="1.9"), "version"),
        (replace(TARGET, gpu="another"), "gpu"),
    ],
)
def test_plans_of_another_machine_are_refused(machine, named, bundle, bounds, tmp_path):
    make(bundle, tmp_path, bounds)
    with pytest.raises(BackendError, match=f"another {named}"):
        read_plan(tmp_path, bundle, "encoder", lambda _: machine)


@pytest.mark.usefixtures("built")
def test_plans_of_another_bundle_are_refused(bundle, bounds, tmp_path):
    make(bundle, tmp_path, bounds)
    other = replace(bundle, files={**bundle.files, "encoder.onnx": "f" * 64})
    with pytest.raises(BackendError, match="another graph_sha256"):
        read_plan(tmp_path, other, "encoder", here)


def test_one_process_builds_at_a_time(bundle, bounds, built, tmp_path):
    with OutputLock(tmp_path / "plans"), pytest.raises(UsageError, match="process"):
        make(bundle, tmp_path / "plans", bounds)
    assert built == []


@pytest.mark.usefixtures("built")
def test_plans_are_code_so_others_may_not_write_them(bundle, bounds, tmp_path):
    make(bundle, tmp_path, bounds)
    tmp_path.chmod(0o777)
    try:
        for attempt in (
            lambda: make(bundle, tmp_path, bounds, anew=True),
            lambda: read_plan(tmp_path, bundle, "decoder", here),
        ):
            with pytest.raises(BackendError, match="executable code"):
                attempt()
    finally:
        tmp_path.chmod(0o700)


class Engine:
    """ICudaEngine as far as loading goes."""

    num_io_tensors = 2

    def get_tensor_name(self, i: int) -> str:
        return ("input_ids", "num_candidates")[i]

    def get_tensor_location(self, name: str) -> str:
        return "host" if name == "num_candidates" else "device"

    def create_runtime_config(self):
        return types.SimpleNamespace()

    def create_execution_context(self, settings) -> str:
        assert settings.dynamic_shapes_kernel_specialization_strategy == "none"  # TensorRT-RTX's own default: lazy
        return "context"


def runtime_that_takes(accepted):
    """Return a module whose runtime loads only plans that `accepted` holds for."""

    class Runtime:
        def __init__(self, logger) -> None: ...

        def deserialize_cuda_engine(self, content: bytes):
            return Engine() if accepted(content) else None

    class Logger:
        Severity = types.SimpleNamespace(ERROR=2, INTERNAL_ERROR=1)

        def __init__(self) -> None: ...

    return types.SimpleNamespace(
        Runtime=Runtime,
        ILogger=Logger,
        TensorLocation=types.SimpleNamespace(HOST="host"),
        DynamicShapesKernelSpecializationStrategy=types.SimpleNamespace(NONE="none"),
    )


@pytest.mark.parametrize(("accepted", "rebuilt"), [(b"decoder 2", []), (b"decoder 4", ["decoder"])])
def test_a_plan_that_does_not_load_is_built_once_more(accepted, rebuilt, bundle, bounds, built, tmp_path, monkeypatch):
    make(bundle, tmp_path, bounds)
    built[:] = built[:3]
    plan = read_plan(tmp_path, bundle, "decoder", here)
    monkeypatch.setattr(trt, "import_builder", lambda _: runtime_that_takes(lambda content: content == accepted))
    new_context, on_host, _ = trt._loaded(plan, tmp_path, bundle, "decoder")
    assert new_context() == "context"
    assert on_host == {"num_candidates"}
    assert built[3:] == rebuilt


def test_a_plan_that_never_loads_is_an_error(bundle, bounds, built, tmp_path, monkeypatch):
    make(bundle, tmp_path, bounds)
    monkeypatch.setattr(trt, "import_builder", lambda _: runtime_that_takes(lambda _: False))
    with pytest.raises(BackendError, match="does not load"):
        trt._loaded(read_plan(tmp_path, bundle, "decoder", here), tmp_path, bundle, "decoder")
    assert built == ["encoder", "decoder", "regroup", "decoder"]


def test_an_old_tensorrt_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    sys.modules["tensorrt"].__version__ = "10.9.0"
    sys.modules["tensorrt"].__spec__ = types.SimpleNamespace()
    with pytest.raises(BackendError, match="too old"):
        plans.import_builder("tensorrt")


# ONNX Runtime's providers, as data


@pytest.mark.parametrize("name", providers.KINDS)
@pytest.mark.parametrize("graph", plans.GRAPHS)
def test_provider_options_are_strings(name, graph, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = providers.providers_for(name, bundle, graph, providers.bounds_for(name, bundle))
    assert [provider for provider, _ in chosen] == list(providers.KINDS[name].providers)
    for _, options in chosen:
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in options.items())


def test_tensorrts_provider_gets_profile_cache_and_precision(bundle, bounds, tmp_path, monkeypatch):
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


# refusals, without a GPU


@pytest.fixture
def with_gpu(monkeypatch):
    """A driver that reports an A100, so that what is asked after it comes to light."""
    gpu = nvidia.Gpu("NVIDIA A100-SXM4-40GB", "8.0", 40 << 30, 13000)
    for module in (providers, plans, trt):
        monkeypatch.setattr(module, "find_gpu", lambda *_: gpu)


@pytest.mark.usefixtures("with_gpu")
def test_both_runtimes_in_one_folder_are_a_trap_that_is_named(monkeypatch, tmp_path):
    """Where each has a folder of its own, as in an image that holds the CPU's, the first one is simply used."""
    folders = {"onnxruntime": tmp_path / "one", "onnxruntime-gpu": tmp_path / "one"}

    def distribution(name: str):
        return types.SimpleNamespace(locate_file=lambda file: folders[name] / file, version="1.31.1")

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    for name in ("cuda", "tensorrt"):
        with pytest.raises(BackendError, match="overwrite each other"):
            providers.require_provider(name)
    providers.require_provider("cpu")
    folders["onnxruntime-gpu"] = tmp_path / "other"
    assert nvidia.clashing_runtimes() is None


@pytest.mark.parametrize(
    ("release", "driver", "is_refused"),
    [
        ("1.31.1", 12040, True),
        ("1.31.1", 13000, False),
        ("1.26.0", 12040, False),
        ("1.26.0", 11080, True),
    ],
)
def test_a_driver_that_is_too_old_is_told_before_anything_is_loaded(release, driver, is_refused, monkeypatch):
    monkeypatch.setattr(nvidia.importlib.metadata, "version", lambda _: release)
    gpu = nvidia.Gpu("NVIDIA A100-SXM4-40GB", "8.0", 40 << 30, driver)
    if is_refused:
        with pytest.raises(
            BackendError, match=rf"runs CUDA {driver // 1000}\..*onnxruntime-gpu {release[:4]} needs .* r580"
        ):
            nvidia.refuse_old_driver(gpu)
    else:
        nvidia.refuse_old_driver(gpu)


def test_a_kind_of_gpu_the_portable_builder_has_no_name_for_gets_a_plan_for_many(monkeypatch):
    monkeypatch.setattr(plans, "find_gpu", lambda *_: nvidia.Gpu("NVIDIA H100", "9.0", 80 << 30, 13000))
    target = plans.target_for(PORTABLE)
    assert (target.compute_capability, target.gpu) == ("portable", "any")
    with pytest.raises(BackendError, match=r"does not build for 9\.0"):
        plans.target_for(PORTABLE, "9.0")


def test_a_capture_that_fails_ends_capturing_and_not_the_run(capsys):
    class Device(RecordingDevice):
        def capture(self, _):
            raise BackendError("the GPU refuses: operation not permitted when stream is capturing")

    done = []

    class Context:
        def set_input_shape(self, *_):
            return True

        set_tensor_address = set_input_shape

        def execute_async_v3(self, _):
            done.append(1)
            return True

    runner = PlanRunner(Context, Device(), capturing=True)
    for _ in range(4):
        runner.run({"x": (1,)}, {"x": 256})
    assert len(done) == 4
    assert capsys.readouterr().err.count("no more CUDA graphs are captured") == 1


def test_what_tensorrt_said_is_in_the_error_and_all_of_it_on_request(monkeypatch, capsys):
    class Context:
        def execute_async_v3(self, _):
            return False

    runner = PlanRunner(Context, RecordingDevice(), last_error=lambda: "CUDA error 700")
    with pytest.raises(BackendError, match=r"could not run a plan \(CUDA error 700\)"):
        runner.run({}, {})
    module = plans.import_builder(PORTABLE)
    logger = plans.make_logger(module)
    logger.log(module.ILogger.Severity.WARNING, "quiet")
    monkeypatch.setenv(plans.LOG_VARIABLE, "1")
    logger.log(module.ILogger.Severity.WARNING, "a hint")
    assert capsys.readouterr().err == "TensorRT WARNING: a hint\n"


def test_numbers_for_tensorrt_lie_where_it_takes_them():
    numbers = trt._aligned(3)
    assert numbers.ctypes.data % 256 == 0
    assert numbers.tolist() == [0, 0, 0]


@pytest.mark.usefixtures("with_gpu")
def test_what_is_missing_is_named_with_its_extra(monkeypatch):
    with pytest.raises(BackendError, match=r"\[cuda\]"):
        providers.require_provider("cuda")
    with pytest.raises(BackendError, match=r"tensorrt.*\[tensorrt\]"):
        providers.require_provider("tensorrt")
    monkeypatch.setitem(plans.MODULES, PORTABLE, "no_such_module")
    with pytest.raises(BackendError, match=r"\[trt\]"):
        trt.require_tensorrt()
    with pytest.raises(BackendError, match=r"\[rtx\]"):
        plans.import_builder(PORTABLE)


@pytest.mark.usefixtures("with_gpu")
def test_auto_takes_the_gpu_only_with_the_provider_for_it():
    assert providers.choose("auto") == "cpu"  # this onnxruntime has no CUDA provider


def test_a_provider_that_was_asked_for_and_not_got_is_an_error(bundle):
    """ONNX Runtime goes on with the CPU and one line in a log, as its stand-in does here."""
    session = types.SimpleNamespace(get_providers=lambda: [providers.CPU])
    runtime = types.SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions, InferenceSession=lambda *_, **__: session
    )
    wanted = [(providers.CUDA, {}), (providers.CPU, {})]
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        open_session(runtime, bundle.path / "regroup.onnx", wanted, 1, is_optimised=True, has_patterns=True)


def test_a_machine_without_a_driver_is_told_by_the_driver_library(monkeypatch):
    if missing_gpu() is None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(nvidia, "DRIVER", "libcuda-that-is-not-there.so")
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        nvidia.find_gpu()


def test_a_driver_without_devices_and_one_that_fails_are_told_apart(monkeypatch):
    class Driver:
        def __init__(self, codes: dict[str, int]) -> None:
            self._codes = codes

        def __getattr__(self, name: str):
            return lambda *_: self._codes.get(name, 0)

    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda _: Driver({}))
    with pytest.raises(BackendError, match="sees no GPU"):
        nvidia.find_gpu()
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda _: Driver({"cuInit": 100}))
    with pytest.raises(BackendError, match=r"cuInit.*100"):
        nvidia.find_gpu()

"""Plans on disk: when they are kept, rebuilt or refused. Building is replaced by a stub that returns a few bytes."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest

from engine.backends import plans, providers, trt
from engine.backends.plans import ANY_GPU, PORTABLE, Target, build_plans, read_plan
from engine.backends.trt import PlanRunner
from engine.errors import BackendError, UsageError
from engine.files.lock import OutputLock
from tests.helpers.stand_in import RecordingDevice

TARGET = Target(PORTABLE, "1.7.1", "8.0", ANY_GPU)


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
def test_plans_are_rebuilt_if_their_key_changes(other, bundle, bounds, built, tmp_path):
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


def damage_key(folder):
    (folder / "decoder.json").write_text("{")


def delete_key(folder):
    (folder / "decoder.json").unlink()


@pytest.mark.parametrize("damage", [damage_plan, damage_key, delete_key])
def test_damaged_plans_are_refused_and_rebuilt(damage, bundle, bounds, built, tmp_path):
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
def test_plans_in_a_shared_folder_are_refused(bundle, bounds, tmp_path):
    make(bundle, tmp_path, bounds)
    tmp_path.chmod(0o777)
    try:
        for attempt in (
            lambda: make(bundle, tmp_path, bounds, force=True),
            lambda: read_plan(tmp_path, bundle, "decoder", here),
        ):
            with pytest.raises(BackendError, match="executable code"):
                attempt()
    finally:
        tmp_path.chmod(0o700)


class Engine:
    """The part of ICudaEngine that loading a plan needs."""

    num_io_tensors = 2

    def get_tensor_name(self, i: int) -> str:
        return ("input_ids", "num_candidates")[i]

    def get_tensor_location(self, name: str) -> str:
        return "host" if name == "num_candidates" else "device"

    def create_runtime_config(self):
        return types.SimpleNamespace()

    def create_execution_context(self, settings) -> str:
        assert settings.dynamic_shapes_kernel_specialization_strategy == "none"  # the default of TensorRT-RTX is lazy
        return "context"


def runtime_that_accepts(accepted):
    """Return a module whose runtime only loads plans for which `accepted` returns true."""

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
def test_plan_that_does_not_load_is_rebuilt_once(accepted, rebuilt, bundle, bounds, built, tmp_path, monkeypatch):
    make(bundle, tmp_path, bounds)
    built[:] = built[:3]
    plan = read_plan(tmp_path, bundle, "decoder", here)
    monkeypatch.setattr(trt, "import_builder", lambda _: runtime_that_accepts(lambda content: content == accepted))
    new_context, on_host, _ = trt._loaded(plan, tmp_path, bundle, "decoder")
    assert new_context() == "context"
    assert on_host == {"num_candidates"}
    assert built[3:] == rebuilt


def test_plan_that_never_loads_is_an_error(bundle, bounds, built, tmp_path, monkeypatch):
    make(bundle, tmp_path, bounds)
    monkeypatch.setattr(trt, "import_builder", lambda _: runtime_that_accepts(lambda _: False))
    with pytest.raises(BackendError, match="does not load"):
        trt._loaded(read_plan(tmp_path, bundle, "decoder", here), tmp_path, bundle, "decoder")
    assert built == ["encoder", "decoder", "regroup", "decoder"]


def test_old_tensorrt_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    sys.modules["tensorrt"].__version__ = "10.9.0"
    sys.modules["tensorrt"].__spec__ = types.SimpleNamespace()
    with pytest.raises(BackendError, match="too old"):
        plans.import_builder("tensorrt")


def test_gpu_unknown_to_the_portable_builder(monkeypatch):
    monkeypatch.setattr(plans, "find_gpu", lambda *_: providers.Gpu("NVIDIA H100", "9.0", 80 << 30, 13000))
    target = plans.target_for(PORTABLE)
    assert (target.compute_capability, target.gpu) == ("portable", "any")
    with pytest.raises(BackendError, match=r"does not build for 9\.0"):
        plans.target_for(PORTABLE, "9.0")


def test_failed_capture_does_not_end_the_run(capsys):
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
    assert capsys.readouterr().err.count("CUDA graphs are disabled") == 1


def test_tensorrt_messages_in_errors_and_log(monkeypatch, capsys):
    class Context:
        def execute_async_v3(self, _):
            return False

    runner = PlanRunner(Context, RecordingDevice(), last_error=lambda: "CUDA error 700")
    with pytest.raises(BackendError, match=r"could not run a plan \(CUDA error 700\)"):
        runner.run({}, {})
    module = plans.import_builder(PORTABLE)
    logger = plans.make_logger(module)
    logger.log(module.ILogger.Severity.WARNING, "not logged")
    monkeypatch.setenv(plans.LOG_VARIABLE, "1")
    logger.log(module.ILogger.Severity.WARNING, "a hint")
    assert capsys.readouterr().err == "TensorRT WARNING: a hint\n"


def test_host_buffers_for_tensorrt_are_aligned():
    numbers = trt._aligned(3)
    assert numbers.ctypes.data % 256 == 0
    assert numbers.tolist() == [0, 0, 0]


@pytest.mark.parametrize("text", ["8.0", "80", "sm_80", "SM80", " sm80"])
def test_compute_capability_spellings(text, monkeypatch):
    names = {"SM80": 80, "SM121": 121}
    builder = types.SimpleNamespace(__version__="1", ComputeCapability=types.SimpleNamespace(__members__=names))
    monkeypatch.setattr(plans, "import_builder", lambda _: builder)
    assert plans.target_for(PORTABLE, text).compute_capability == "8.0"
    assert plans.canonical_capability("sm_121") == "12.1"
    with pytest.raises(BackendError, match=r"does not build for 7\.9: choose one of 8\.0, 12\.1"):
        plans.target_for(PORTABLE, "sm_79")


@pytest.mark.parametrize("text", ["", "A100", "8", "8.0.0", "sm"])
def test_invalid_compute_capability_is_refused(text):
    with pytest.raises(UsageError, match=r"takes a number such as 8\.0, or sm_80"):
        plans.target_for(PORTABLE, text)

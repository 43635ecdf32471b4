"""Plans: what NVIDIA's builder makes of a bundle's graphs for one kind of GPU. Builds, keeps and checks them.

FOLDER/encoder.plan ... and beside each a JSON file with its key: everything that decides whether it may be used. The
builder is TensorRT, which needs the GPU it builds for, or TensorRT-RTX, its sibling, which needs none and finishes on
the user's machine. Only the latter has run here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.backends.providers import find_gpu
from engine.backends.shapes import Bounds, ShapeRange, profiles
from engine.bundle.manifest import GRAPHS, Bundle
from engine.errors import BackendError, UsageError, install_command
from engine.files.atomic import cache_folder, file_sha256, replace_file, require_private
from engine.files.lock import OutputLock

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Builder -> the module that brings it."""
PORTABLE = "tensorrt-rtx"
"""The builder that needs no GPU, and whose plans run on every GPU of a compute capability."""
ANY_GPU = "any"
MANY_KINDS = "portable"
"""Instead of a compute capability: PORTABLE's own choice of kinds, made where none is set. Never tried on a GPU."""
REASON = "plans are executable code"
PRIVATE_MODE = 0o600
"""Nobody else may read or write what will be executed."""
LOG_VARIABLE = "ENGINE_TRT_LOG"
"""Environment variable: with any value, everything the builder and its runtime say goes to standard error."""
OLDEST = (10, 12)
"""TensorRT: older ones do not type networks strongly in every operator used here."""


@dataclass(frozen=True)
class Target:
    """What a plan is built with and for."""

    builder: str
    version: str
    compute_capability: str
    gpu: str


@dataclass(frozen=True)
class Plan:
    """A plan read from disk and checked."""

    content: bytes
    bounds: Bounds
    target: Target


def import_builder(builder: str) -> Any:
    """Import a builder's module. Raises BackendError when it is missing or too old.

    Some of its functions end the process where there is no driver: see find_gpu.
    """
    name = MODULES[builder]
    if importlib.util.find_spec(name) is None:
        extra = "trt" if builder != PORTABLE else "rtx"
        raise BackendError(f"{name} is not installed: {install_command(extra)}")
    module = importlib.import_module(name)
    if builder != PORTABLE and tuple(map(int, module.__version__.split(".")[:2])) < OLDEST:
        raise BackendError(f"TensorRT {module.__version__} is too old: install {'.'.join(map(str, OLDEST))} or later")
    return module


def target_for(builder: str, compute_capability: str | None = None) -> Target:
    """Return what to build for: the GPU of this machine, or with PORTABLE any of `compute_capability`.

    A capability may be written `8.0`, `80`, `sm_80` or `SM80`. Raises UsageError for any other spelling, BackendError
    where a GPU is needed and there is none, or the capability is not one the builder knows.
    """
    if compute_capability is not None:
        compute_capability = canonical_capability(compute_capability)
    if builder == PORTABLE and compute_capability is not None:
        return _portable(compute_capability)
    gpu = find_gpu(f"build for another with --builder {PORTABLE} --compute-capability 8.0")
    if compute_capability not in (None, gpu.compute_capability):
        raise BackendError(
            f"{builder} builds for the GPU of this machine ({gpu.compute_capability}): leave --compute-capability out, "
            f"or take --builder {PORTABLE}"
        )
    if builder == PORTABLE:
        module = import_builder(PORTABLE)
        if _capability(module, gpu.compute_capability) is None:  # such as 9.0: a plan for many kinds may run there
            return Target(PORTABLE, module.__version__, MANY_KINDS, ANY_GPU)
        return _portable(gpu.compute_capability)
    return Target(builder, import_builder(builder).__version__, gpu.compute_capability, gpu.name)


def canonical_capability(text: str) -> str:
    """Return a compute capability as plans have it: `8.0` for `8.0`, `80`, `sm_80` and `SM80`. Raises UsageError."""
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"--compute-capability takes a number such as 8.0, or sm_80, not {text!r}")
    return f"{found[1]}.{found[2]}"


def _portable(compute_capability: str) -> Target:
    module = import_builder(PORTABLE)
    if _capability(module, compute_capability) is None:
        names = [name for name in module.ComputeCapability.__members__ if name.startswith("SM")]
        known = [canonical_capability(name) for name in names if name[2:].isdecimal()]
        raise BackendError(f"{PORTABLE} does not build for {compute_capability}: it knows {', '.join(known)}")
    return Target(PORTABLE, module.__version__, compute_capability, ANY_GPU)


def default_folder(bundle: Bundle) -> Path:
    """Return where plans of a bundle are put and looked for when nobody says otherwise."""
    return cache_folder(bundle.digest, "plans", REASON)


def build_plans(
    bundle: Bundle,
    folder: Path,
    bounds: Bounds,
    target: Target,
    log: Callable[[str], None],
    *,
    graphs: tuple[str, ...] = GRAPHS,
    anew: bool = False,
) -> list[Path]:
    """Build the plans of a bundle into `folder`, keeping those that fit already unless `anew`; return all.

    Raises BackendError when the builder refuses a graph, or when the folder is not this user's own, UsageError when
    another process is building there.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(folder, REASON)
    paths = []
    with OutputLock(folder):
        for graph in graphs:
            path, key = folder / f"{graph}.plan", plan_key(bundle, graph, bounds, target)
            if not anew and _is_whole(path, key):
                log(f"{path} is there already")
            else:
                log(f"building {path}")
                timings = folder / f"timings-{target.version}-{target.compute_capability}.cache"
                plan = build_plan(bundle, graph, bounds, target, timings)
                replace_file(path, plan, mode=PRIVATE_MODE)
                kept = key | {"plan_sha256": hashlib.sha256(plan).hexdigest()}
                note = json.dumps(kept, indent=1, sort_keys=True) + "\n"
                replace_file(path.with_suffix(".json"), note.encode(), mode=PRIVATE_MODE)
            paths.append(path)
    return paths


def plan_key(bundle: Bundle, graph: str, bounds: Bounds, target: Target) -> dict[str, Any]:
    """Return everything that decides what a plan does and where it runs."""
    return {
        "graph": graph,
        "graph_sha256": bundle.files[f"{graph}.onnx"],
        "weights_sha256": bundle.files.get(f"{graph}.onnx.data"),
        "precision": bundle.precision,
        "bounds": bounds.settings(),
        "flags": ["STRONGLY_TYPED", "NO_TF32"],
        **asdict(target),
    }


def build_plan(bundle: Bundle, graph: str, bounds: Bounds, target: Target, timings: Path | None = None) -> bytes:
    """Build one graph's plan, strongly typed: every precision is the graph's own.

    Raises BackendError with the parser's or builder's own words.
    """
    trt = import_builder(target.builder)
    return build_network(
        trt, bundle.path / f"{graph}.onnx", profiles(bundle, bounds)[graph], target.compute_capability, timings
    )


def build_network(
    trt: Any, path: Path, profile: ShapeRange, compute_capability: str, timings: Path | None = None
) -> bytes:
    """Parse an ONNX file strongly typed, and build it for `profile`; see build_plan."""
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network, _ = parse(trt, builder, logger, path)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and float32 here means float32
    shapes = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        three = profile.get(tensor.name)
        if three is None:
            continue
        if tensor.is_shape_tensor:
            shapes.set_shape_input(tensor.name, *three)
        elif -1 in tuple(tensor.shape):
            shapes.set_shape(tensor.name, *three)
    config.add_optimization_profile(shapes)
    capability = _capability(trt, compute_capability)
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
        timings = None  # ahead of time nothing is timed
    elif timings is not None and compute_capability != MANY_KINDS:
        known = timings.read_bytes() if timings.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"{path} cannot be built: {logger.last()}")
    kept = config.get_timing_cache() if timings is not None and compute_capability != MANY_KINDS else None
    if timings is not None and kept is not None:
        replace_file(timings, bytes(kept.serialize()), mode=PRIVATE_MODE)
    return bytes(plan)


def parse(trt: Any, builder: Any, logger: Any, path: Path) -> tuple[Any, Any]:
    """Return (network, parser) of an ONNX file, strongly typed. Raises BackendError where the parser refuses it."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"{error.node_name()}: {error.desc()}" for error in errors)
        raise BackendError(f"{path} is not for TensorRT: {' '.join(reasons.split())[:400] or logger.last()}")
    return network, parser


def read_plan(folder: Path, bundle: Bundle, graph: str, here: Callable[[str], Target] = target_for) -> Plan:
    """Read a plan after checking that it is this bundle's and this machine's.

    `here` gives this machine's target for a builder. Raises BackendError saying what differs.
    """
    path = folder / f"{graph}.plan"
    note = path.with_suffix(".json")
    if not path.is_file() or not note.is_file():
        raise BackendError(f"{folder} has no plan of the {graph}: make it with `engine plan --bundle {bundle.path}`")
    for one in (folder, path, note):
        require_private(one, REASON)
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        bounds = Bounds(**kept["bounds"])
        target = here(kept["builder"])
        wanted = plan_key(bundle, graph, bounds, target)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{note} is not the note of a plan ({error}): run `engine plan` again") from error
    other = [name for name, value in wanted.items() if kept.get(name) != value]
    if other:
        raise BackendError(
            f"{path} was built for another {other[0]} ({kept.get(other[0])!r}, here {wanted[other[0]]!r}): "
            "run `engine plan` again"
        )
    plan = path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != kept.get("plan_sha256"):
        raise BackendError(f"{path} has changed since it was built: run `engine plan` again")
    return Plan(plan, bounds, target)


def _is_whole(path: Path, key: dict[str, Any]) -> bool:
    """Return whether a plan is there, undamaged, and was built for `key`."""
    try:
        kept = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return bool(kept == key | {"plan_sha256": file_sha256(path)})
    except (OSError, ValueError):
        return False


def _capability(trt: Any, text: str) -> Any:
    """Return the builder's own constant for a compute capability such as "8.0", None where it has none."""
    known = getattr(trt, "ComputeCapability", None)
    return known.__members__.get("SM" + text.replace(".", "")) if known is not None else None


def make_logger(trt: Any) -> Any:
    """Return a logger of a builder's module that keeps errors for our own messages instead of printing them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if os.environ.get(LOG_VARIABLE):
                print(f"TensorRT {severity.name}: {message}", file=sys.stderr)
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def last(self) -> str:
            return " ".join(self.errors[-1].split())[:400] if self.errors else "no reason given"

    return Logger()

"""ONNX Runtime's providers as data: options by backend name, and why one cannot be had.

Every option is a string, as ONNX Runtime wants them. Nothing of CUDA and TensorRT here has ever run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from engine.backends.device import CudaDevice
from engine.backends.nvidia import clashing_runtimes, find_gpu, refuse_old_driver
from engine.backends.shapes import Bounds, ShapeRange, profiles
from engine.bundle.manifest import Bundle
from engine.errors import BackendError, install_command
from engine.files.cache import cache_folder
from engine.host import processor

Provider = tuple[str, dict[str, str]]
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


@dataclass(frozen=True)
class Kind:
    """A backend that is ONNX Runtime with some providers, in order of preference; the first is the one asked for.

    `device` is where keys and values stay, in ONNX Runtime's words.
    """

    providers: tuple[str, ...]
    device: str = "cuda"
    modules: tuple[str, ...] = ()
    options: dict[str, dict[str, str]] = field(default_factory=dict)


CUDA_OPTIONS = {
    "use_tf32": "0",
    "cudnn_conv_algo_search": "HEURISTIC",
    "enable_skip_layer_norm_strict_mode": "1",
}
"""torch multiplies float32 without TF32, too. The convolution is not chosen by a stopwatch, which may choose another in
the next run, and half precision sums layer norms in float32.
"""
WIDEST_BEAMS = 10
"""Beams the TensorRT provider is built for where a bundle's own search has fewer."""
TENSORRT_OPTIONS = {
    "trt_engine_cache_enable": "1",
    "trt_timing_cache_enable": "1",
    "trt_builder_optimization_level": "3",
    # this provider builds weakly typed networks: selection must stay float32, so it stays out of them; the few
    # operators between those three would be networks of their own, with inputs that no profile knows
    "trt_op_types_to_exclude": "LogSoftmax,TopK,ScatterElements",
    "trt_min_subgraph_size": "50",
}
ARM_BF16 = "bf16"
"""Linux's name of the instructions that ONNX Runtime's fast math takes."""
KINDS: dict[str, Kind] = {
    "cpu": Kind((CPU,), device="cpu"),
    "cuda": Kind((CUDA, CPU), options={CUDA: CUDA_OPTIONS}),
    "tensorrt": Kind(
        (TENSORRT, CUDA, CPU), modules=("tensorrt",), options={TENSORRT: TENSORRT_OPTIONS, CUDA: CUDA_OPTIONS}
    ),
}
"""Backend name -> what it takes."""


def import_onnxruntime(extra: str) -> Any:
    """Import onnxruntime or raise BackendError naming the extra that brings it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"onnxruntime is not installed ({error}): {install_command(extra)}") from error
    return onnxruntime


def import_libraries(name: str) -> Any:
    """Import onnxruntime and load what a backend's providers link, for which a driver must be there."""
    if name == "tensorrt":  # its provider has no option for it, and cuBLAS asks when it is loaded
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    ort = import_onnxruntime(name)
    if KINDS[name].device != "cpu":
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()
    for module in KINDS[name].modules:
        importlib.import_module(module)
    return ort


def choose(name: str) -> str:
    """Resolve `auto`: cuda where nothing is missing for it, else cpu."""
    if name != "auto":
        return name
    try:
        require_provider("cuda")
        CudaDevice()
    except BackendError:
        return "cpu"
    return "cuda"


def require_provider(name: str) -> None:
    """Raise BackendError, in one sentence, where the backend `name` cannot work on this machine.

    Quick, and asks the driver before anything of NVIDIA's is imported.
    """
    kind = KINDS[name]
    if kind.device != "cpu":
        refuse_old_driver(find_gpu())
        clash = clashing_runtimes()
        if clash:
            raise BackendError(clash)
    for module in kind.modules:
        if importlib.util.find_spec(module) is None:
            raise BackendError(f"backend {name} needs {module}, which is not installed: {install_command(name)}")
    available = import_libraries(name).get_available_providers()
    wanted = kind.providers[0]
    if wanted not in available:
        raise BackendError(
            f"backend {name} needs ONNX Runtime's {wanted}, and the one installed has only {', '.join(available)}: "
            f"pip uninstall onnxruntime, then {install_command(name)}"
        )


def require_cpu_precision(cpu_precision: str) -> None:
    """Raise BackendError where ONNX Runtime cannot multiply so here: it has bf16 on ARM and Linux alone."""
    if cpu_precision == "bf16" and ARM_BF16 not in processor().flags:
        raise BackendError(
            "ONNX Runtime multiplies bf16 on ARM processors with instructions for it alone, and this is none: take "
            "--backend openvino, or leave --cpu-precision out"
        )


def bounds_for(name: str, bundle: Bundle) -> Bounds | None:
    """Return what a backend is built for before it is known which searches will be run; None where anything goes."""
    if KINDS[name].providers[0] != TENSORRT:
        return None
    own = bundle.options().num_beams
    return Bounds.of(bundle, beams=max(WIDEST_BEAMS, own), usual_beams=own)


def providers_for(name: str, bundle: Bundle, graph: str, bounds: Bounds | None = None) -> list[Provider]:
    """Return the providers with their options for one graph of a bundle; TensorRT needs `bounds` for its profile."""
    kind = KINDS[name]
    chosen = []
    for provider in kind.providers:
        options = dict(kind.options.get(provider, {}))
        if provider == TENSORRT:
            assert bounds is not None
            folder = str(
                cache_folder(
                    bundle.digest,
                    f"onnxruntime-{_version('onnxruntime-gpu')}-{_version('tensorrt')}",
                    "TensorRT's engines are executable code",
                )
            )
            options |= {"trt_engine_cache_path": folder, "trt_timing_cache_path": folder}
            options["trt_engine_cache_prefix"] = graph
            options["trt_fp16_enable"] = "1" if bundle.precision == "fp16" else "0"
            options |= profile_options(profiles(bundle, bounds)[graph])
        chosen.append((provider, options))
    return chosen


def profile_options(profile: ShapeRange) -> dict[str, str]:
    """Write a profile as TensorRT's provider wants it: name:AxBxC,name:AxB."""
    texts = []
    for which in range(3):
        shapes = {name: three[which] for name, three in profile.items() if name != "num_candidates"}
        texts.append(",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items()))
    return dict(zip(("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"), texts, strict=True))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

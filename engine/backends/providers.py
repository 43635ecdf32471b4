"""Detect NVIDIA GPUs, and choose ONNX Runtime's execution providers and their options.

GPUs are detected through the driver, before any of NVIDIA's packages is imported: some of these packages crash with a
segmentation fault on machines without a driver, and ONNX Runtime lists a provider that was compiled in even if it
cannot work.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from engine.backends.device import CudaDevice
from engine.backends.shapes import Bounds, ShapeRange, profiles
from engine.bundle.manifest import Bundle
from engine.errors import BackendError, install_command
from engine.files.atomic import cache_folder
from engine.host import processor

DRIVER = "libcuda.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable that limits the GPUs a process sees."""
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
"""Values of CUdevice_attribute in the CUDA driver API."""
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Two packages that install into the same folder: the last one overwrites the other, and removing one breaks both."""
NO_DEVICE = 100
"""The code of CUDA_ERROR_NO_DEVICE."""
MACHINE_CODE: dict[tuple[int, ...], dict[str, tuple[str, ...]]] = {
    (1, 31): {
        "x86_64": ("7.5", "8.0", "8.6", "8.9", "9.0", "12.0"),
        "aarch64": ("8.9", "9.0", "12.0", "12.1"),
    }
}
"""Release of onnxruntime-gpu -> machine -> compute capabilities that its CUDA library has machine code for, read from
the wheels (tests/nvidia/test_fake.py). There is no PTX in it that a driver could compile for others. Other releases are
not checked here: their first kernel fails with "no kernel image".
"""


class NoGpuError(BackendError):
    """There is no driver or no GPU, as opposed to a GPU that cannot be used."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability such as "8.0", and memory in bytes."""

    name: str
    compute_capability: str
    memory_bytes: int
    driver_cuda: int = 0
    """Newest CUDA release that the driver supports; 13000 is 13.0 (cuDriverGetVersion)."""


def find_gpu(otherwise: str = "use --backend cpu") -> Gpu:
    """Return the first GPU.

    Raises BackendError that names what is missing (driver, permission or device) and ends with `otherwise`, the advice
    for machines without a GPU.
    """
    driver, _ = _open_driver(otherwise)
    newest, device = ctypes.c_int(), ctypes.c_int()
    _call(driver, "cuDriverGetVersion", ctypes.byref(newest))
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    version = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        version.append(str(value.value))
    return Gpu(name.value.decode(errors="replace"), ".".join(version), memory.value, newest.value)


def visible_gpus() -> list[str]:
    """Return the names in CUDA_VISIBLE_DEVICES of the GPUs that this process sees, in order. Raises like find_gpu."""
    _, count = _open_driver("remove --devices")
    listed = os.environ.get(VISIBLE)
    return [name.strip() for name in listed.split(",")][:count] if listed else list(map(str, range(count)))


def _open_driver(otherwise: str) -> tuple[ctypes.CDLL, int]:
    """Return the driver and the number of GPUs that this process sees, at least one. Raises BackendError."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise NoGpuError(
            f"no NVIDIA driver on this machine ({DRIVER} cannot be loaded): start a container with access to the GPU, "
            f"or {otherwise}"
        ) from None
    _call(driver, "cuInit", 0)
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise NoGpuError(f"the NVIDIA driver sees no GPU: check {VISIBLE}, or {otherwise}")
    return driver, count.value


def refuse_old_driver(gpu: Gpu) -> None:
    """Raise BackendError if the driver is older than the CUDA release of onnxruntime-gpu: 13 since its release 1.27."""
    release = _release()
    if release is None:
        return
    needed = 13000 if release >= (1, 27) else 12000
    if gpu.driver_cuda < needed:
        raise BackendError(
            f"the NVIDIA driver of {gpu.name} supports CUDA {gpu.driver_cuda // 1000}.{gpu.driver_cuda % 1000 // 10}, "
            f"onnxruntime-gpu {'.'.join(map(str, release))} needs {needed // 1000}.0: install a driver of r580 or "
            "later, or the packages for CUDA 12 that the documentation names"
        )


def refuse_gpu_without_code(gpu: Gpu) -> None:
    """Raise BackendError if onnxruntime-gpu is known to have no machine code for the GPU.

    Machine code runs on its own compute capability and on later ones of the same major version: 8.6 on 8.9.
    """
    release = _release()
    if release is None:
        return
    known = MACHINE_CODE.get(release, {}).get(platform.machine())
    major, minor = map(int, gpu.compute_capability.split("."))
    if known and not any(int(a) == major and int(b) <= minor for a, b in (code.split(".") for code in known)):
        raise BackendError(
            f"{gpu.name} has compute capability {gpu.compute_capability}, but onnxruntime-gpu "
            f"{'.'.join(map(str, release))} has kernels for {', '.join(known)} only: use --backend cpu, or "
            "trt if TensorRT supports the GPU"
        )


def _release() -> tuple[int, ...] | None:
    """Return major and minor version of onnxruntime-gpu, or None if it is not installed."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("onnxruntime-gpu").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def clashing_runtimes() -> str | None:
    """Return a warning if both ONNX Runtime packages are installed into the same folder, else None."""
    try:
        folders = {
            Path(str(importlib.metadata.distribution(package).locate_file("onnxruntime"))).resolve()
            for package in RUNTIMES
        }
    except importlib.metadata.PackageNotFoundError:
        return None
    if len(folders) > 1:  # separate folders: Python imports the first one, which is complete
        return None
    return (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall both, then install "
        "the extra [cuda]"
    )


def _call(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(driver, function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        is_known = driver.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value
        reason = text.value.decode(errors="replace") if is_known and text.value else f"error {code}"
        kind = NoGpuError if code == NO_DEVICE else BackendError
        raise kind(f"the NVIDIA driver reports for {function}: {reason}: check nvidia-smi")


Provider = tuple[str, dict[str, str]]
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


@dataclass(frozen=True)
class Kind:
    """A backend that runs ONNX Runtime: its execution providers in order of preference; the first one is required.

    `device` is ONNX Runtime's name of the device that holds the KV cache. `modules` must be importable.
    """

    providers: tuple[str, ...]
    device: str = "cuda"
    modules: tuple[str, ...] = ("cuda.bindings.runtime",)
    options: dict[str, dict[str, str]] = field(default_factory=dict)


CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
"""TF32 is off, as in torch's float32 matrix products. The convolution algorithm is chosen by a heuristic, because
measuring (the default) may choose another one in the next run.
"""
PROVIDER_LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
"""Provider -> its library in ONNX Runtime's folder, which needs libonnxruntime_providers_shared.so."""
CUDNN = "libcudnn.so.9"
"""The CUDA provider loads it when the first convolution runs, so it is checked here. BLIP's graphs have none."""
WIDEST_BEAMS = 10
"""The TensorRT provider is built for at least so many beams, even if the bundle's own search has fewer."""
TENSORRT_OPTIONS = {
    "trt_engine_cache_enable": "1",
    "trt_timing_cache_enable": "1",
    "trt_builder_optimization_level": "3",
    # This provider builds weakly typed networks, which may compute in half precision. The choice of candidates must be
    # float32, so its operators are excluded. The few operators between them would become separate small networks with
    # inputs that have no profile, hence the minimum size.
    "trt_op_types_to_exclude": "LogSoftmax,TopK,ScatterElements",
    "trt_min_subgraph_size": "50",
}
ARM_BF16 = "bf16"
"""Linux's flag of the ARM instructions that ONNX Runtime's bf16 fast math uses."""
KINDS: dict[str, Kind] = {
    "cpu": Kind((CPU,), device="cpu", modules=()),
    "cuda": Kind((CUDA, CPU), options={CUDA: CUDA_OPTIONS}),
    "tensorrt": Kind(
        (TENSORRT, CUDA, CPU),
        modules=("tensorrt", "cuda.bindings.runtime"),
        options={TENSORRT: TENSORRT_OPTIONS, CUDA: CUDA_OPTIONS},
    ),
}
"""Backend name -> its providers, device, modules and options."""


def import_onnxruntime(extra: str) -> Any:
    """Import onnxruntime. Raises BackendError with the command that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"onnxruntime is not installed ({error}): {install_command(extra)}") from error
    return onnxruntime


def import_libraries(name: str) -> Any:
    """Import onnxruntime and load the libraries of a backend's providers. On a GPU, check for a driver first."""
    if name == "tensorrt":  # the provider has no TF32 option, and cuBLAS reads this variable when it is loaded
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    ort = import_onnxruntime(name)
    if KINDS[name].device != "cpu":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what is missing, which load_provider reports
            ort.preload_dlls()
    for module in KINDS[name].modules:
        importlib.import_module(module)
    return ort


@cache
def choose(name: str) -> str:
    """Resolve `auto`: `cuda` if nothing is missing for it, else `cpu`. Return other names unchanged.

    A GPU that cannot be used is reported on standard error, once per process.
    """
    if name != "auto":
        return name
    try:
        require_provider("cuda")
        CudaDevice()
    except NoGpuError:
        return "cpu"
    except BackendError as error:
        print(f"--backend auto uses the CPU, not the GPU: {error}", file=sys.stderr)
        return "cpu"
    return "cuda"


def require_provider(name: str) -> None:
    """Raise BackendError if the backend `name` cannot run on this machine. The check runs once per process.

    It checks the driver before any of NVIDIA's packages is imported.
    """
    problem = _probe(name)
    if problem is not None:
        kind, text = problem
        raise kind(text)


@cache
def _probe(name: str) -> tuple[type[BackendError], str] | None:
    """Return type and text of the error of a backend that cannot run on this machine, or None.

    The error itself would keep the frames alive that it was raised in.
    """
    try:
        _check_provider(name)
    except BackendError as error:
        return type(error), str(error)
    return None


def _check_provider(name: str) -> None:
    """Check driver, GPU, packages and libraries of a backend. Raises BackendError that names what is missing."""
    kind = KINDS[name]
    if kind.device != "cpu":
        gpu = find_gpu()
        refuse_old_driver(gpu)
        refuse_gpu_without_code(gpu)
        clash = clashing_runtimes()
        if clash:
            raise BackendError(clash)
    for module in kind.modules:
        if not _is_installed(module):
            raise BackendError(f"backend {name} needs {module}, which is not installed: {install_command(name)}")
    ort = import_libraries(name)
    available = ort.get_available_providers()
    wanted = kind.providers[0]
    if wanted not in available:
        raise BackendError(
            f"backend {name} needs ONNX Runtime's {wanted}, but the installed one has only {', '.join(available)}: "
            f"pip uninstall onnxruntime, then {install_command(name)}"
        )
    for provider in kind.providers:
        if provider in PROVIDER_LIBRARIES:
            load_provider(name, provider, Path(ort.__file__).parent / "capi")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that contains it is missing
        return False


def load_provider(name: str, provider: str, folder: Path) -> None:
    """Load the library of a provider from `folder`. Raises BackendError that names a library it lacks.

    ONNX Runtime lists a provider that was compiled in. If its library does not load, a session only logs a warning and
    uses the CPU. Calls of ONNX Runtime find the library loaded.
    """
    try:
        # The provider's library uses symbols of this one without naming it, so they must be global.
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / PROVIDER_LIBRARIES[provider]))
        if provider == CUDA:
            ctypes.CDLL(CUDNN)
    except OSError as error:
        raise BackendError(
            f"ONNX Runtime's {provider} cannot load a library ({error}): {install_command(name)}, or add the library's "
            "folder to LD_LIBRARY_PATH"
        ) from None


def require_cpu_precision(cpu_precision: str) -> None:
    """Raise BackendError if ONNX Runtime does not support a precision here: it has bf16 only on ARM with Linux."""
    if cpu_precision == "bf16" and ARM_BF16 not in processor().flags:
        raise BackendError(
            "ONNX Runtime supports bf16 only on ARM processors with bf16 instructions: use --backend openvino, or "
            "remove --cpu-precision"
        )


def bounds_for(name: str, bundle: Bundle) -> Bounds | None:
    """Return the bounds that a backend is built for before its searches are known, or None if it has no bounds."""
    if KINDS[name].providers[0] != TENSORRT:
        return None
    usual = bundle.options().num_beams
    return Bounds.of(bundle, beams=max(WIDEST_BEAMS, usual), usual_beams=usual)


def providers_for(name: str, bundle: Bundle, graph: str, bounds: Bounds | None = None) -> list[Provider]:
    """Return (provider, options) for one graph of a bundle; TensorRT needs `bounds` for its profile."""
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
    """Return a profile in the format of ONNX Runtime's TensorRT provider: `name:AxBxC,name:AxB`."""
    texts = []
    for i in range(3):  # smallest, usual, largest
        shapes = {name: sizes[i] for name, sizes in profile.items() if name != "num_candidates"}
        texts.append(",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items()))
    return dict(zip(("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"), texts, strict=True))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

"""Detects NVIDIA GPUs through the driver, before any of NVIDIA's packages is imported.

Some of these packages crash with a segmentation fault on machines without a driver, and ONNX Runtime lists a provider
that was compiled in even if it cannot work.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BackendError

DRIVER = "libcuda.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable with the GPUs that are visible to a process."""
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
"""CUdevice_attribute of the CUDA driver API."""
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Two packages that install into the same folder: the last one overwrites the other, and removing one breaks both."""


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

    Raises BackendError that names what is missing (driver, permission or device) and ends in `otherwise`, the advice
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
        raise BackendError(
            f"no NVIDIA driver on this machine ({DRIVER} cannot be loaded): start a container with access to the GPU, "
            f"or {otherwise}"
        ) from None
    _call(driver, "cuInit", 0)
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise BackendError(f"the NVIDIA driver sees no GPU: check {VISIBLE}, or {otherwise}")
    return driver, count.value


def refuse_old_driver(gpu: Gpu) -> None:
    """Raise BackendError if the driver is older than the CUDA release of onnxruntime-gpu: 13 since its release 1.27."""
    try:
        release = tuple(int(part) for part in importlib.metadata.version("onnxruntime-gpu").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return
    needed = 13000 if release >= (1, 27) else 12000
    if gpu.driver_cuda < needed:
        raise BackendError(
            f"the NVIDIA driver of {gpu.name} supports CUDA {gpu.driver_cuda // 1000}.{gpu.driver_cuda % 1000 // 10}, "
            f"onnxruntime-gpu {'.'.join(map(str, release))} needs {needed // 1000}.0: install a driver of r580 or "
            "later, or the packages for CUDA 12 that the documentation names"
        )


def clashing_runtimes() -> str | None:
    """Return a warning if both ONNX Runtime packages are installed into the same folder, else None."""
    try:
        places = {
            Path(str(importlib.metadata.distribution(package).locate_file("onnxruntime"))).resolve()
            for package in RUNTIMES
        }
    except importlib.metadata.PackageNotFoundError:
        return None
    if len(places) > 1:  # separate folders: the first on the path is used, and complete
        return None
    return (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall both, then install "
        "the extra [cuda]"
    )


def _call(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(driver, function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        known = driver.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value
        reason = text.value.decode(errors="replace") if known and text.value else f"error {code}"
        raise BackendError(f"the NVIDIA driver reports for {function}: {reason}: check nvidia-smi")

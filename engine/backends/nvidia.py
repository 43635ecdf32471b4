"""Is there an NVIDIA GPU, asked of the driver itself, before any of NVIDIA's packages is imported.

Some of them end the process with a segmentation fault where there is no driver, and ONNX Runtime lists a provider that
was compiled in whether or not it can work.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from dataclasses import dataclass

from engine.errors import BackendError

DRIVER = "libcuda.so.1"
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
"""CUdevice_attribute of the CUDA driver API."""
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Two packages that install into one folder: whichever came last is there, and removing either breaks both."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, compute capability such as "8.0", and memory in bytes."""

    name: str
    compute_capability: str
    memory_bytes: int


def find_gpu(otherwise: str = "use --backend cpu") -> Gpu:
    """Return the first GPU.

    Raises BackendError with what is missing, driver, permission or device, and `otherwise`, what to do without it.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise BackendError(
            f"no NVIDIA driver on this machine ({DRIVER} cannot be loaded): start a container with access to the GPU, "
            f"or {otherwise}"
        ) from None
    _call(driver, "cuInit", 0)
    count, device = ctypes.c_int(), ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise BackendError(f"the NVIDIA driver sees no GPU: look at CUDA_VISIBLE_DEVICES, or {otherwise}")
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    version = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        version.append(str(value.value))
    return Gpu(name.value.decode(errors="replace"), ".".join(version), memory.value)


def clashing_runtimes() -> str | None:
    """Return a warning when both ONNX Runtime packages are installed, else None."""
    try:
        for package in RUNTIMES:
            importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
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
        raise BackendError(f"the NVIDIA driver refuses {function}: {reason}: look at nvidia-smi")

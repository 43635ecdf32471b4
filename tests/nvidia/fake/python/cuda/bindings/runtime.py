"""Stand-in for cuda.bindings.runtime: the calls that engine/backends/device.py makes, on the stand-in of libcudart."""
# ruff: noqa: N801, N802, N815, N816 (NVIDIA's names)

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from typing import Any

_library = ctypes.CDLL("libcudart.so.13")
_library.cudaGetErrorString.restype = ctypes.c_char_p
_ADDRESS, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

cudaStreamNonBlocking = 1


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


def _wrap(name: str, *inputs: Any, returns: tuple[Any, ...] = ()) -> Callable[..., tuple[Any, ...]]:
    """Return a function as in cuda-bindings: it returns (error code, *values), which C writes to addresses."""
    function = getattr(_library, name)
    function.argtypes = [*map(ctypes.POINTER, returns), *inputs]

    def call(*given: Any) -> tuple[Any, ...]:
        values = [kind() for kind in returns]
        code = function(*map(ctypes.byref, values), *given)
        return code, *(value.value for value in values)

    return call


cudaStreamCreateWithFlags = _wrap("cudaStreamCreateWithFlags", _INT, returns=(_ADDRESS,))
cudaStreamSynchronize = _wrap("cudaStreamSynchronize", _ADDRESS)
cudaMemGetInfo = _wrap("cudaMemGetInfo", returns=(_SIZE, _SIZE))
cudaMalloc = _wrap("cudaMalloc", _SIZE, returns=(_ADDRESS,))
cudaFree = _wrap("cudaFree", _ADDRESS)
cudaMemsetAsync = _wrap("cudaMemsetAsync", _ADDRESS, _INT, _SIZE, _ADDRESS)
cudaMemcpyAsync = _wrap("cudaMemcpyAsync", _ADDRESS, _ADDRESS, _SIZE, _INT, _ADDRESS)
cudaMemcpy2DAsync = _wrap("cudaMemcpy2DAsync", _ADDRESS, _SIZE, _ADDRESS, _SIZE, _SIZE, _SIZE, _INT, _ADDRESS)


def cudaGetErrorString(code: int) -> tuple[int, bytes]:
    return 0, _library.cudaGetErrorString(code)

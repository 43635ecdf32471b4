"""Memory of the device a backend computes on, by address: the host's own, or a GPU's.

One interface, so that whatever moves keys and values about is written once and tested on the host.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import BackendError, OutOfMemoryError

OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""
GONE = (4, 709)
"""cudaErrorCudartUnloading, cudaErrorContextIsDestroyed."""


class Device(Protocol):
    """`name` is ONNX Runtime's: cpu or cuda. Work is done in order; only `wait` and `download` wait for it."""

    name: str

    @property
    def stream(self) -> int:
        """What TensorRT queues its work on; 0 on the host."""
        ...

    def free_bytes(self) -> int | None:
        """Return how much memory is free, None for the host's, which engine.backends.capacity knows more about."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """Return the address of zeroed memory. Raises OutOfMemoryError."""
        ...

    def free(self, address: int) -> None:
        """Give memory back, once what was queued before is done."""
        ...

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy within the device."""
        ...

    def copy_blocks(self, target: tuple[int, int], source: tuple[int, int], size_bytes: int, count: int) -> None:
        """Copy `count` blocks; target and source are (address of the first, bytes from one to the next)."""
        ...

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device."""
        ...

    def download(self, array: NDArray[Any], source: int) -> None:
        """Fill a contiguous array from the device."""
        ...

    def wait(self) -> None:
        """Return once all work is done."""
        ...


class CapturingDevice(Device, Protocol):
    """A device that can note queued work and queue it again at once."""

    def capture(self, queue_work: Callable[[], None]) -> Any:
        """Note what `queue_work` queues instead of doing it; return what `replay` does it with."""
        ...

    def replay(self, captured: Any) -> None:
        """Queue what was captured."""
        ...


class HostDevice:
    """The CPU's memory."""

    name = "cpu"
    stream = 0

    def __init__(self) -> None:
        self._owned: dict[int, NDArray[np.uint8]] = {}

    def free_bytes(self) -> None:
        """See Device.free_bytes."""

    def allocate(self, size_bytes: int) -> int:
        """See Device.allocate."""
        memory = np.zeros(max(1, size_bytes), np.uint8)
        address = int(memory.ctypes.data)
        self._owned[address] = memory
        return address

    def free(self, address: int) -> None:
        """See Device.free."""
        del self._owned[address]

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """See Device.copy."""
        ctypes.memmove(target, source, size_bytes)

    def copy_blocks(self, target: tuple[int, int], source: tuple[int, int], size_bytes: int, count: int) -> None:
        """See Device.copy_blocks."""
        _blocks(*target, size_bytes, count)[:] = _blocks(*source, size_bytes, count)

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """See Device.upload."""
        ctypes.memmove(target, array.ctypes.data, array.nbytes)

    def download(self, array: NDArray[Any], source: int) -> None:
        """See Device.download."""
        ctypes.memmove(array.ctypes.data, source, array.nbytes)

    def wait(self) -> None:
        """See Device.wait."""


def _blocks(address: int, pitch: int, size_bytes: int, count: int) -> NDArray[np.uint8]:
    """Return blocks of the host's memory as u8[count,size_bytes]."""
    span = (count - 1) * pitch + size_bytes
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(address))
    return np.lib.stride_tricks.as_strided(memory, (count, size_bytes), (pitch, 1))


class CudaDevice:
    """The first GPU's memory, through cuda-bindings and one stream. Has never run: no GPU was at hand."""

    name = "cuda"

    def __init__(self) -> None:
        """Raises BackendError when cuda-bindings is not installed; ask engine.backends.nvidia for a GPU first."""
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(f"cuda-bindings is not installed ({error}): pip install cuda-bindings") from error
        self._runtime = runtime
        # not tied to the legacy stream: whatever else in the process uses that would break a capture
        (self._stream,) = self._call(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))

    @property
    def stream(self) -> int:
        """See Device.stream."""
        return int(self._stream)

    def free_bytes(self) -> int:
        """See Device.free_bytes."""
        free, _ = self._call(self._runtime.cudaMemGetInfo())
        return int(free)

    def allocate(self, size_bytes: int) -> int:
        """See Device.allocate."""
        (address,) = self._call(self._runtime.cudaMalloc(max(1, size_bytes)))
        self._call(self._runtime.cudaMemsetAsync(address, 0, max(1, size_bytes), self._stream))
        return int(address)

    def free(self, address: int) -> None:
        """See Device.free."""
        code, *_ = self._runtime.cudaFree(address)
        if int(code) not in GONE:  # at the program's end the driver may have gone first
            self._call((code,))

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """See Device.copy."""
        self._move(target, source, size_bytes, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def copy_blocks(self, target: tuple[int, int], source: tuple[int, int], size_bytes: int, count: int) -> None:
        """See Device.copy_blocks."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(self._runtime.cudaMemcpy2DAsync(*target, *source, size_bytes, count, kind, self._stream))

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """See Device.upload."""
        self._move(target, array.ctypes.data, array.nbytes, self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, array: NDArray[Any], source: int) -> None:
        """See Device.download."""
        self._move(array.ctypes.data, source, array.nbytes, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self.wait()

    def wait(self) -> None:
        """See Device.wait."""
        self._call(self._runtime.cudaStreamSynchronize(self._stream))

    def capture(self, queue_work: Callable[[], None]) -> Any:
        """See CapturingDevice.capture; a CUDA graph."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        collects = gc.isenabled()
        gc.disable()  # memory that is given back meanwhile would spoil the capture
        try:
            self._call(self._runtime.cudaStreamBeginCapture(self._stream, mode))
            try:
                queue_work()
            finally:
                ended = self._runtime.cudaStreamEndCapture(self._stream)
        finally:
            if collects:
                gc.enable()
        (graph,) = self._call(ended)
        (executable,) = self._call(self._runtime.cudaGraphInstantiate(graph, 0))
        self._call(self._runtime.cudaGraphDestroy(graph))
        return executable

    def replay(self, captured: Any) -> None:
        """See CapturingDevice.replay."""
        self._call(self._runtime.cudaGraphLaunch(captured, self._stream))

    def _move(self, target: int, source: int, size_bytes: int, kind: Any) -> None:
        self._call(self._runtime.cudaMemcpyAsync(target, source, size_bytes, kind, self._stream))

    def _call(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what a call of the runtime gave behind its error code; raise where the code is one."""
        code, *values = result
        if int(code):
            _, text = self._runtime.cudaGetErrorString(code)
            kind = OutOfMemoryError if int(code) == OUT_OF_MEMORY else BackendError
            raise kind(f"the GPU refuses: {text.decode(errors='replace') if isinstance(text, bytes) else text}")
        return tuple(values)

"""The number of slots that fit into memory, and the memory of the host and of a CUDA device."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.bundle.manifest import ModelDims
from engine.decoding.backend import BatchSizes
from engine.decoding.beam import Search
from engine.decoding.scheduler import SETTLE_EVERY
from engine.errors import BackendError, OutOfMemoryError
from engine.host import available_memory

MEMORY_SHARE = 0.25
"""Share of the available memory that the KV cache may take."""
COPIES = 3
"""Versions of a growing tensor that are alive at once: the old one, the new one, and one that is being regrouped."""


def slots_for(
    search: Search,
    models: Sequence[ModelDims],
    batch_sizes: BatchSizes,
    *,
    rows: int | None = None,
    memory_bytes: int | None = None,
) -> int:
    """Return the number of slots B for about `rows` beams in flight; each slot has a KV cache in every model.

    `rows` None means the backend's preferred number, limited to MEMORY_SHARE of `memory_bytes` (None: the memory that
    is available now, on the device or on the host). An explicit `rows` is not limited.
    """
    if rows is not None:
        return max(1, rows // search.num_beams)
    memory_bytes = batch_sizes.memory_bytes if memory_bytes is None else memory_bytes
    memory_bytes = available_memory() if memory_bytes is None else memory_bytes
    bytes_per_slot = sum(slot_bytes(search, model, batch_sizes.item_bytes) for model in models)
    affordable = int(MEMORY_SHARE * memory_bytes) // bytes_per_slot
    return max(1, min(batch_sizes.rows // search.num_beams, affordable, batch_sizes.slots or affordable))


def slot_bytes(search: Search, model: ModelDims, item_bytes: int = 4) -> int:
    """Return an estimate of the most bytes that the KV cache of one slot takes, in elements of `item_bytes`.

    Folded positions are those that some beam descends from. In theory that is max_length for every beam; in practice
    beams share their past except for the last few tokens. The estimate is max_length plus 2 * SETTLE_EVERY steps of K.
    """
    position = 2 * model.num_layers * model.num_heads * model.head_width * item_bytes
    grown = search.max_length + 2 * SETTLE_EVERY * search.num_beams
    return position * (model.encoder_positions + COPIES * grown)


OUT_OF_MEMORY = 2
"""The code of cudaErrorMemoryAllocation."""
GONE = (4, 709)
"""The codes of cudaErrorCudartUnloading and cudaErrorContextIsDestroyed."""


class Device(Protocol):
    """Memory and an ordered queue of copies. `name` is ONNX Runtime's name of the device, cpu or cuda.

    Calls return before the work is done, except `wait` and `download`.
    """

    name: str

    @property
    def stream(self) -> int:
        """The CUDA stream for TensorRT's work; 0 on the host."""
        ...

    def free_bytes(self) -> int | None:
        """Return the free memory in bytes; None on the host, where engine.host knows more (cgroups, quotas)."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new, zeroed memory. Raises OutOfMemoryError."""
        ...

    def free(self, address: int) -> None:
        """Free memory once all work queued before is done."""
        ...

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy within the device."""
        ...

    def copy_blocks(self, target: tuple[int, int], source: tuple[int, int], size_bytes: int, count: int) -> None:
        """Copy `count` blocks; target and source are (address of the first block, bytes between block starts)."""
        ...

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device."""
        ...

    def download(self, array: NDArray[Any], source: int) -> None:
        """Fill a contiguous array from the device; blocks until it is done."""
        ...

    def wait(self) -> None:
        """Block until all queued work is done."""
        ...


class CapturingDevice(Device, Protocol):
    """A device that can record queued work and replay it with one call (a CUDA graph)."""

    def capture(self, queue_work: Callable[[], None]) -> Any:
        """Record the work that `queue_work` queues, without running it; return a handle for `replay`."""
        ...

    def replay(self, captured: Any) -> None:
        """Queue the recorded work."""
        ...


class Region:
    """Device memory that grows on demand. Growing discards the content: the new memory is zeroed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address, self._size = 0, 0
        self._give_back: Callable[[], object] = lambda: None

    def at_least(self, size_bytes: int) -> int:
        """Return the address of at least `size_bytes`; they are freed with this object."""
        if size_bytes > self._size:
            self._give_back()
            self.address, self._size = self._device.allocate(size_bytes), size_bytes
            self._give_back = weakref.finalize(self, self._device.free, self.address)
        return self.address


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
        try:
            memory = np.zeros(max(1, size_bytes), np.uint8)
        except MemoryError as error:
            raise OutOfMemoryError(f"the CPU has no {size_bytes} bytes of memory left") from error
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
    """Return a view u8[count,size_bytes] of strided blocks in the host's memory."""
    span = (count - 1) * pitch + size_bytes
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(address))
    return np.lib.stride_tricks.as_strided(memory, (count, size_bytes), (pitch, 1))


class CudaDevice:
    """Memory of the first GPU, through cuda-bindings and one stream. Never run on a GPU yet."""

    name = "cuda"

    def __init__(self) -> None:
        """Open a stream. Raises BackendError if cuda-bindings is not installed; call find_gpu first."""
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(f"cuda-bindings is not installed ({error}): pip install cuda-bindings") from error
        self._runtime = runtime
        # non-blocking: other users of the legacy default stream in this process would break a capture
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
        if int(code) not in GONE:  # at exit the driver may already be unloaded
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
        gc.disable()  # a collection may free GPU memory, which is not allowed during a capture
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
        """Return the values after the error code of a CUDA runtime call. Raises BackendError or OutOfMemoryError."""
        code, *values = result
        if int(code):
            _, text = self._runtime.cudaGetErrorString(code)
            kind = OutOfMemoryError if int(code) == OUT_OF_MEMORY else BackendError
            raise kind(f"the GPU reports: {text.decode(errors='replace') if isinstance(text, bytes) else text}")
        return tuple(values)

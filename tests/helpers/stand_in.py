"""A fake of TensorRT's runtime on the host: it runs a plan's graph with ONNX Runtime, on raw addresses like TensorRT.

It also checks what TensorRT does not check: that every tensor has an address, and that outputs fit there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime

from engine.backends.device import HostDevice
from engine.backends.shapes import Bounds
from engine.backends.trt import PlanRunner, TrtBackend
from engine.bundle.manifest import Bundle

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


class RecordingDevice(HostDevice):
    """A host device with CUDA graphs. Captured work is recorded with its shapes and addresses instead of executed."""

    def __init__(self) -> None:
        super().__init__()
        self.recording: list[Callable[[], None]] | None = None

    def capture(self, queue_work: Callable[[], None]) -> list[Callable[[], None]]:
        self.recording = captured = []
        try:
            queue_work()
        finally:
            self.recording = None
        return captured

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        if self.recording is not None:
            self.recording.append(partial(super().copy, target, source, size_bytes))
        else:
            super().copy(target, source, size_bytes)

    def replay(self, captured: list[Callable[[], None]]) -> None:
        for work in captured:
            work()


class Context:
    """The IExecutionContext of one graph."""

    def __init__(self, path, device: RecordingDevice) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._device, self._shapes, self._addresses = device, {}, {}
        self.runs: list[tuple] = []
        self.is_captured = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.is_captured, "a context that was captured from must not change"
        declared = {entry.name: entry.shape for entry in self._session.get_inputs()}[name]
        self._shapes[name] = shape
        return len(declared) == len(shape) and all(size > 0 for size in shape)  # TensorRT does not accept empty tensors

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self.is_captured, "a context that was captured from must not change"
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 0
        self.runs.append(tuple(sorted(self._shapes.items())))
        work = partial(self._compute, dict(self._shapes), dict(self._addresses))
        if self._device.recording is not None:
            assert self.runs[-2:-1] == self.runs[-1:], "run a graph normally before capturing it"
            self.is_captured = True
            self._device.recording.append(work)
        else:
            work()
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feed = {}
        for entry in self._session.get_inputs():
            shape = shapes.get(entry.name, tuple(entry.shape))
            feed[entry.name] = self._read(addresses[entry.name], shape, DTYPES[entry.type])
        outputs = [entry.name for entry in self._session.get_outputs()]
        for name, array in zip(outputs, self._session.run(outputs, feed), strict=True):
            address = addresses[name]
            assert array.nbytes <= self._device._owned[address].nbytes, f"{name} does not fit"
            ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    @staticmethod
    def _read(address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)


def stand_in_backend(bundle: Bundle, bounds: Bounds, *, uses_cuda_graphs: bool = False) -> TrtBackend:
    """Return the trt backend on the host, with Context instead of TensorRT plans."""
    device = RecordingDevice()
    graphs = {}
    for graph in ("encoder", "decoder", "regroup"):
        new_context = partial(Context, bundle.path / f"{graph}.onnx", device)
        graphs[graph] = PlanRunner(new_context, device, frozenset(["num_candidates"]), uses_cuda_graphs)
    return TrtBackend(bundle, graphs, bounds, device)

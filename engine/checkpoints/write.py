"""Write the graphs of a bundle as ONNX files with their weights, without the package onnx.

Tensors are read, converted, hashed and written one at a time. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle.onnx import (
    DTYPES,
    FLOAT16,
    FLOAT32,
    GRAPH,
    Weights,
    message_field,
    node_proto,
    tensor_proto,
    value_proto,
)
from engine.checkpoints.graphs import (
    INPUTS_FIRST,
    PARAMETER,
    SCALE,
    VALUE,
    WEIGHT,
    Graph,
    Number,
    Tensor,
    bytes_of,
    patched_nodes,
    size_of,
)
from engine.checkpoints.int8 import quantise_weight
from engine.errors import CheckpointError

FP16_SUFFIX = ".fp16"
"""Appended to the name of a float32 weight that is stored in half the size, because float16 represents it exactly."""
MIN_FP16_ELEMENTS = 1024
"""Smaller tensors stay float32: converting them saves nothing, and scalars must keep their type."""
MIN_EXTERNAL_BYTES = 1024
"""Smaller tensors are stored in the graph itself."""
CHUNK = 1 << 20
"""Elements that are converted at once."""


def write_graphs(
    graphs: Iterable[Graph],
    weights: Mapping[str, NDArray[np.floating[Any]]],
    numbers: Mapping[str, Number],
    out: Path,
) -> dict[str, str]:
    """Write graphs and their weights into the folder `out` and return {file name: sha256}.

    `weights` are the checkpoint's, by name; each is read once for every file that holds it. `numbers` are the values
    of the graphs' parameters. Raises CheckpointError if a weight has another shape than the graph's, or is too large
    for float16, and OSError if a file cannot be written.
    """
    digests: dict[str, str] = {}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        files: dict[str, _DataFile] = {}
        for graph in graphs:
            if graph.data not in files:
                files[graph.data] = stack.enter_context(_DataFile(out / graph.data, pool))
            content = _graph(graph, files[graph.data], weights, numbers)
            name = f"{graph.name}.onnx"
            (out / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
        digests |= {name: file.sha256 for name, file in files.items() if file.size}
    return digests


class _DataFile:
    """A file of weights, written and hashed at the same time. It is created with the first tensor.

    `tensors` are the tensors that were written, by name: TensorProto, and a node that casts it, or nothing.
    """

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self.path, self._pool, self.size = path, pool, 0
        self.tensors: dict[str, tuple[bytes, bytes]] = {}
        self._held, self._digest = ExitStack(), hashlib.sha256()

    def __enter__(self) -> _DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def append(self, array: NDArray[Any]) -> int:
        """Write an array's bytes and return their offset."""
        if not self.size:
            self._stream = self._held.enter_context(self.path.open("xb", buffering=0))
        offset, content = self.size, array.data.cast("B")
        hashed = self._pool.submit(self._digest.update, content)
        try:
            written = 0
            while written < len(content):  # the system writes at most 2 GB at once
                written += self._stream.write(content[written:]) or 0
        finally:
            hashed.result()  # before the array is released
        self.size += len(content)
        return offset

    @property
    def sha256(self) -> str:
        """Of all content so far, as lower-case hexadecimal."""
        return self._digest.hexdigest()


def _graph(graph: Graph, file: _DataFile, weights: Mapping[str, NDArray[Any]], numbers: Mapping[str, Number]) -> bytes:
    """Return a graph as a serialised ModelProto, after writing its tensors."""
    arrays = _Arrays(weights)
    for tensor in graph.tensors:
        if tensor.name not in file.tensors:
            dims = tuple(int(size_of(size, numbers)) for size in tensor.dims)
            array = _known(tensor, dims, numbers) if tensor.holds == VALUE else arrays.of(tensor, dims)
            file.tensors[tensor.name] = _store(tensor, dims, array, file)
    stored = [file.tensors[tensor.name] for tensor in graph.tensors]
    content = b"".join(
        [
            *(message_field(1, cast) for _, cast in stored if cast),
            patched_nodes(graph, numbers),
            message_field(2, graph.title.encode()),
            *(message_field(5, tensor) for tensor, _ in stored),
            *(
                message_field(
                    number, value_proto(value.name, value.kind, [size_of(size, numbers) for size in value.dims])
                )
                for number, values in ((11, graph.inputs), (12, graph.outputs), (13, graph.values))
                for value in values
            ),
        ]
    )
    return graph.model + message_field(GRAPH, content)


class _Arrays:
    """The arrays of tensors that hold a weight. A quantised weight is kept until its scales are asked for."""

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self._weights = weights
        self._quantised: tuple[str, NDArray[np.int8], NDArray[np.float32]] | None = None

    def of(self, tensor: Tensor, dims: tuple[int, ...]) -> NDArray[Any]:
        """Return the array that a tensor holds, in float32, float16 or int8."""
        if tensor.holds == WEIGHT:
            array = self._weights[tensor.of]
            _check_shape(tensor.of, array.shape, dims)
            return _to_float16(tensor.of, array) if tensor.kind == FLOAT16 else array.astype(np.float32, copy=False)
        if not self._quantised or self._quantised[0] != tensor.of:
            array = self._weights[tensor.of]
            assert tensor.holds != SCALE, f"{tensor.name} comes before the weight that it belongs to"
            self._quantised = tensor.of, *quantise_weight(array.T if tensor.holds == INPUTS_FIRST else array)
        _, quantised, scales = self._quantised
        array = scales if tensor.holds == SCALE else quantised
        _check_shape(tensor.of, array.shape, dims)
        return array


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise CheckpointError(f"the weight {name} has the shape {shape}, but the graph needs {expected}")


def _known(tensor: Tensor, dims: tuple[int, ...], numbers: Mapping[str, Number]) -> NDArray[Any]:
    is_parameter = tensor.of.startswith(PARAMETER)
    raw = bytes_of(tensor.of, tensor.kind, numbers) if is_parameter else bytes.fromhex(tensor.of)
    return np.frombuffer(raw, DTYPES[tensor.kind]).reshape(dims)


def _to_float16(name: str, array: NDArray[Any]) -> NDArray[np.float16]:
    """Round to the nearest float16, ties to even. Raises CheckpointError if a finite number becomes infinite."""
    if array.dtype == np.float16:
        return array
    rounded = np.empty(array.shape, np.float16)
    for part, whole in _chunks(rounded, array):
        with np.errstate(over="ignore"):
            part[:] = whole
        if not np.array_equal(np.isinf(part), np.isinf(whole)):
            raise CheckpointError(
                f"the weight {name} has numbers up to {np.nanmax(np.abs(whole)):.3g}, but the largest of float16 is "
                "65504: use --precision fp32"
            )
    return rounded


def _exact_float16(array: NDArray[np.float32]) -> NDArray[np.float16] | None:
    """Return a float32 array as float16, or None if that changes a number."""
    if array.size < MIN_FP16_ELEMENTS:
        return None
    rounded = np.empty(array.shape, np.float16)
    for part, whole in _chunks(rounded, array):
        with np.errstate(over="ignore"):
            part[:] = whole
        if not np.array_equal(part, whole):
            return None
    return rounded


def _chunks(*arrays: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield equal parts of arrays of the same size. The first is small, for checks that most arrays fail."""
    flat = [array.reshape(-1) for array in arrays]
    start, end = 0, MIN_FP16_ELEMENTS
    while start < flat[0].size:
        yield tuple(array[start:end] for array in flat)
        start, end = end, end + CHUNK


def _store(tensor: Tensor, dims: tuple[int, ...], array: NDArray[Any], file: _DataFile) -> tuple[bytes, bytes]:
    """Write an array if it is large. Returns the TensorProto, and the node that casts it back to float32 if needed."""
    name, kind, cast = tensor.name, tensor.kind, b""
    if kind == FLOAT32 and (half := _exact_float16(array)) is not None:
        # runtimes fold the Cast when they load the graph
        name, kind, array = name + FP16_SUFFIX, FLOAT16, half
        cast = node_proto("Cast", [name], tensor.name, {"to": FLOAT32}, f"{tensor.name}.cast")
    array = np.ascontiguousarray(array)
    if array.nbytes < MIN_EXTERNAL_BYTES:
        return tensor_proto(name, kind, dims, array.tobytes()), cast
    place = Weights(file.path.name, file.append(array), array.nbytes)
    return tensor_proto(name, kind, dims, place), cast

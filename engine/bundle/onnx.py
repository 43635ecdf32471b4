"""Read ONNX files without the package onnx: nodes, tensors, inputs and outputs of a graph.

Field numbers are those of onnx.proto. engine/checkpoints/write.py writes such files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle.protobuf import fields
from engine.errors import BundleError

FLOAT32, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, FLOAT64 = 1, 2, 3, 6, 7, 9, 10, 11
DTYPES: dict[int, type[np.generic]] = {
    FLOAT32: np.float32,
    UINT8: np.uint8,
    INT8: np.int8,
    INT32: np.int32,
    INT64: np.int64,
    BOOL: np.bool_,
    FLOAT16: np.float16,
    FLOAT64: np.float64,
}
"""ONNX's numbers of element types (TensorProto.DataType) and numpy's types."""
TYPE_NAMES = {FLOAT32: "float", BOOL: "bool"}
"""Where ONNX's name of a type is not numpy's."""
EXTERNAL = 1
"""Value of TensorProto.data_location for a tensor whose bytes are in another file."""
VARINT, EIGHT_BYTES, WITH_LENGTH = 0, 1, 2
"""Wire types of protobuf."""


Attribute = int | float | str | tuple[int | float, ...] | NDArray[Any]


@dataclass(frozen=True)
class Node:
    """An operator with the names of its inputs (empty for one that is left out) and outputs."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """Where the bytes of a tensor are: a file in the bundle's folder, the offset and the size in bytes."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class Port:
    """Name, type (as ONNX Runtime writes it: `tensor(float)`) and sizes of an input or output; a name is dynamic."""

    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxFile:
    """The content of an ONNX file. `tensors` are its initialisers: small ones as arrays, others as Weights."""

    path: Path
    opset: int
    nodes: tuple[Node, ...]
    tensors: dict[str, tuple[type[np.generic], tuple[int, ...], Weights | NDArray[Any]]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def get_inputs(self) -> tuple[Port, ...]:
        """Return the inputs, as a session of ONNX Runtime does."""
        return self.inputs

    def get_outputs(self) -> tuple[Port, ...]:
        """Return the outputs, as a session of ONNX Runtime does."""
        return self.outputs


def read_onnx(path: Path, content: bytes | None = None) -> OnnxFile:
    """Read an ONNX file, or its `content`. Raises BundleError if it is damaged or has more than exported graphs do."""
    try:
        return _model(path, memoryview(path.read_bytes() if content is None else content))
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        reason = f"unknown number {error}" if isinstance(error, KeyError) else error
        raise BundleError(f"{path} is not a graph of this engine's bundles ({reason}): export it again") from error


def _model(path: Path, content: memoryview) -> OnnxFile:
    (graph,) = _parts(content, 7)
    opsets = [_one(opset, 2, 0) for opset in _parts(content, 8) if not _text(opset, 1)]
    tensors = {}
    for message in _parts(graph, 5):
        tensors[_text(message, 8)] = _tensor(message)
    return OnnxFile(
        path=path,
        opset=max(opsets, default=0),
        nodes=tuple(map(_node, _parts(graph, 1))),
        tensors=tensors,
        inputs=tuple(port for part in _parts(graph, 11) if (port := _port(part)).name not in tensors),
        outputs=tuple(map(_port, _parts(graph, 12))),
    )


def _node(message: memoryview) -> Node:
    kind, domain = _text(message, 4), _text(message, 7)
    return Node(
        f"{domain}.{kind}" if domain else kind,
        tuple(bytes(part).decode() for part in _parts(message, 1)),
        tuple(bytes(part).decode() for part in _parts(message, 2)),
        {_text(part, 1): _attribute(part) for part in _parts(message, 5)},
    )


def _attribute(message: memoryview) -> Attribute:
    kind = _one(message, 20, 0)  # AttributeProto.type
    if kind == 1:
        return _float(next(value for number, value in _fields(message) if number == 2))
    if kind == 2:
        return _one(message, 3, 0)
    if kind == 3:
        return _text(message, 4)
    if kind == 4:
        _, _, value = _tensor(next(_parts(message, 5)))
        if isinstance(value, Weights):
            raise ValueError("a constant in another file")
        return value
    if kind == 6:
        return tuple(_float(value) for number, value in _fields(message) if number == 7)
    if kind == 7:
        return tuple(_integers(message, 8))
    raise ValueError(f"an attribute of type {kind}")


def _tensor(message: memoryview) -> tuple[type[np.generic], tuple[int, ...], Weights | NDArray[Any]]:
    dtype, dims = DTYPES[_one(message, 2, 0)], tuple(_integers(message, 1))
    if min(dims, default=1) < 0:
        raise ValueError(f"a tensor of the sizes {dims}")
    size = int(np.prod(dims, dtype=object)) * np.dtype(dtype).itemsize
    if _one(message, 14, 0) == EXTERNAL:
        entries = {_text(entry, 1): _text(entry, 2) for entry in _parts(message, 13)}
        weights = Weights(entries["location"], int(entries.get("offset", "0")), int(entries.get("length", size)))
        if weights.size != size or weights.offset < 0 or Path(weights.file).name != weights.file:
            raise ValueError(f"a tensor of {size} bytes at {weights}")
        return dtype, dims, weights
    raw = b"".join(_parts(message, 9))
    if len(raw) != size:  # float_data and its like are not used by exports
        raise ValueError(f"a tensor with {len(raw)} instead of {size} raw bytes")
    return dtype, dims, np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(dims)


def _port(message: memoryview) -> Port:
    (kind,) = (tensor for part in _parts(message, 2) for tensor in _parts(part, 1))  # TypeProto.tensor_type
    dtype = _one(kind, 1, 0)
    dims = (dim for shape in _parts(kind, 2) for dim in _parts(shape, 1))
    shape = tuple(_one(dim, 1, -1) if _one(dim, 1, -1) >= 0 else _text(dim, 2) for dim in dims)
    return Port(_text(message, 1), f"tensor({TYPE_NAMES.get(dtype, np.dtype(DTYPES[dtype]).name)})", shape)


def _one(message: memoryview, number: int, default: int) -> int:
    """Return the number in a field, or `default` if it is missing."""
    return next(_integers(message, number), default)


def _integers(message: memoryview, number: int) -> Iterator[int]:
    """Yield the int64 of a field, whether they are packed or not."""
    for field, value in _fields(message):
        if field == number:
            values = [value] if isinstance(value, int) else _varints(value)
            yield from (one - (1 << 64) if one >= 1 << 63 else one for one in values)


def _text(message: memoryview, number: int) -> str:
    return b"".join(_parts(message, number)).decode()


def _float(value: int | memoryview) -> float:
    if isinstance(value, int):
        raise ValueError("a whole number instead of a float")
    return float(struct.unpack("<f", value)[0])


def _parts(message: int | memoryview, number: int) -> Iterator[memoryview]:
    """Yield the messages, texts or bytes in a field."""
    if not isinstance(message, int):
        yield from (part for field, part in _fields(message) if field == number and not isinstance(part, int))


def _varints(packed: memoryview) -> Iterator[int]:
    position = 0
    while position < len(packed):
        value, position = _varint(packed, position)
        yield value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number that does not end")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, content) of a protobuf message: a whole number, or the bytes of anything else."""
    for field, content, whole in fields(message):
        kind = whole[0] & 7
        if kind == VARINT:
            _, value = _varints(whole)  # tag and number
            yield field, value
        else:
            yield field, content if kind == WITH_LENGTH else whole[-8 if kind == EIGHT_BYTES else -4 :]

"""Read and write ONNX files without the package onnx: nodes, tensors, inputs and outputs of a graph.

An ONNX file is a protobuf message: a sequence of fields, each with a number and a value. Numbers are those of
onnx.proto. The functions at the end write: engine/checkpoints/write.py whole bundles, engine/backends/attention.py a
few more nodes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
GRAPH = 7
"""Number of ModelProto.graph."""
EXTERNAL = 1
"""Value of TensorProto.data_location for a tensor whose bytes are in another file."""
VARINT, WITH_LENGTH = 0, 2
FIXED = {1: 8, 5: 4}
"""Wire types of protobuf; the fixed ones have a size in bytes."""

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
        reason = f"unknown element type {error}" if isinstance(error, KeyError) else error
        raise BundleError(f"{path} is not a graph of this engine's bundles ({reason}): export it again") from error


def may_loop(model: bytes) -> bool:
    """Return whether an ONNX model contains nodes with subgraphs (Loop, If, Scan) or functions.

    Exported graphs have neither, and an endless Loop would hang the process when the graph is opened. Raises ValueError
    if the content is not protobuf.
    """
    for number, part in fields(memoryview(model)):
        if number == 25:  # ModelProto.functions
            return True
        for node in parts(part, 1) if number == GRAPH else ():  # GraphProto.node
            for attribute in parts(node, 5):
                if any(kind in (6, 11) for kind, _ in fields(attribute)):  # AttributeProto.g and .graphs
                    return True
    return False


def _model(path: Path, content: memoryview) -> OnnxFile:
    graphs = list(parts(content, GRAPH))
    if not graphs:
        raise ValueError("no graph")
    graph = memoryview(b"".join(graphs))  # protobuf merges the occurrences of a field that is not repeated
    opsets = [_one(opset, 2, 0) for opset in parts(content, 8) if not _text(opset, 1)]
    tensors = {}
    for message in parts(graph, 5):
        tensors[_text(message, 8)] = _tensor(message)
    return OnnxFile(
        path=path,
        opset=max(opsets, default=0),
        nodes=tuple(map(_node, parts(graph, 1))),
        tensors=tensors,
        inputs=tuple(port for part in parts(graph, 11) if (port := _port(part)).name not in tensors),
        outputs=tuple(map(_port, parts(graph, 12))),
    )


def _node(message: memoryview) -> Node:
    kind, domain = _text(message, 4), _text(message, 7)
    return Node(
        f"{domain}.{kind}" if domain else kind,
        tuple(bytes(part).decode() for part in parts(message, 1)),
        tuple(bytes(part).decode() for part in parts(message, 2)),
        {_text(part, 1): _attribute(part) for part in parts(message, 5)},
    )


def _attribute(message: memoryview) -> Attribute:
    kind = _one(message, 20, 0)  # AttributeProto.type
    if kind == 1:
        return _float(next((value for number, value in fields(message) if number == 2), 0))
    if kind == 2:
        return _one(message, 3, 0)
    if kind == 3:
        return _text(message, 4)
    if kind == 4:
        (part,) = parts(message, 5)
        _, _, value = _tensor(part)
        if isinstance(value, Weights):
            raise ValueError("a constant in another file")
        return value
    if kind == 6:
        return tuple(_float(value) for number, value in fields(message) if number == 7)
    if kind == 7:
        return tuple(_integers(message, 8))
    raise ValueError(f"an attribute of type {kind}")


def _tensor(message: memoryview) -> tuple[type[np.generic], tuple[int, ...], Weights | NDArray[Any]]:
    dtype, dims = DTYPES[_one(message, 2, 0)], tuple(_integers(message, 1))
    if min(dims, default=1) < 0:
        raise ValueError(f"a tensor of the sizes {dims}")
    size = int(np.prod(dims, dtype=object)) * np.dtype(dtype).itemsize
    if _one(message, 14, 0) == EXTERNAL:
        entries = {_text(entry, 1): _text(entry, 2) for entry in parts(message, 13)}
        if "location" not in entries:
            raise ValueError("a tensor in another file, which is not named")
        weights = Weights(entries["location"], int(entries.get("offset", "0")), int(entries.get("length", size)))
        if weights.size != size or weights.offset < 0 or Path(weights.file).name != weights.file:
            raise ValueError(f"a tensor of {size} bytes at {weights}")
        return dtype, dims, weights
    raw = b"".join(parts(message, 9))
    if len(raw) != size:  # float_data and its like are not used by exports
        raise ValueError(f"a tensor with {len(raw)} instead of {size} raw bytes")
    return dtype, dims, np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(dims)


def _port(message: memoryview) -> Port:
    (kind,) = (tensor for part in parts(message, 2) for tensor in parts(part, 1))  # TypeProto.tensor_type
    dtype = _one(kind, 1, 0)
    dims = (dim for shape in parts(kind, 2) for dim in parts(shape, 1))
    shape = tuple(_one(dim, 1, -1) if _one(dim, 1, -1) >= 0 else _text(dim, 2) for dim in dims)
    return Port(_text(message, 1), f"tensor({TYPE_NAMES.get(dtype, np.dtype(DTYPES[dtype]).name)})", shape)


def _one(message: memoryview, number: int, default: int) -> int:
    """Return the number in a field, or `default` if it is missing."""
    return next(_integers(message, number), default)


def _integers(message: memoryview, number: int) -> Iterator[int]:
    """Yield the int64 of a field, whether they are packed or not."""
    for field, value in fields(message):
        if field == number:
            values = [value] if isinstance(value, int) else _varints(value)
            yield from (one - (1 << 64) if one >= 1 << 63 else one for one in values)


def _text(message: memoryview, number: int) -> str:
    return b"".join(parts(message, number)).decode()


def _float(value: int | memoryview) -> float:
    if isinstance(value, int):
        raise ValueError("a whole number instead of a float")
    return float(struct.unpack("<f", value)[0])


def parts(message: int | memoryview, number: int) -> Iterator[memoryview]:
    """Yield the bytes of each field with this number: a message, a text, or a number of fixed size."""
    if not isinstance(message, int):
        yield from (part for field, part in fields(message) if field == number and not isinstance(part, int))


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of the fields of a message: a whole number, or the bytes of anything else.

    Raises ValueError if the bytes are not protobuf.
    """
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == VARINT:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        if kind == WITH_LENGTH:
            size, position = _varint(message, position)
        elif kind in FIXED:
            size = FIXED[kind]
        else:
            raise ValueError(f"a field of kind {kind}")
        if position + size > len(message):
            raise ValueError("a field beyond the end")
        yield tag >> 3, message[position : position + size]
        position += size


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


def node_proto(
    kind: str,
    inputs: Sequence[str],
    output: str,
    attributes: Mapping[str, int | tuple[int, ...]] | None = None,
    name: str | None = None,
) -> bytes:
    """Return a NodeProto; its name is that of its output if none is given."""
    strings = [*((1, one) for one in inputs), (2, output), (3, name or output), (4, kind)]
    content = b"".join(message_field(number, text.encode()) for number, text in strings)
    for key, value in (attributes or {}).items():  # AttributeProto: name, then i with type INT or ints with type INTS
        if isinstance(value, int):
            values = number_field(3, value) + number_field(20, 2)
        else:
            values = b"".join(number_field(8, one) for one in value) + number_field(20, 7)
        content += message_field(5, message_field(1, key.encode()) + values)
    return content


def tensor_proto(name: str, kind: int, dims: Sequence[int], content: bytes | Weights) -> bytes:
    """Return a TensorProto with its bytes, or with the place where they are."""
    head = b"".join(number_field(1, size) for size in dims) + number_field(2, kind) + message_field(8, name.encode())
    if isinstance(content, bytes):
        return head + message_field(9, content)
    entries = {"location": content.file, "offset": content.offset, "length": content.size}
    place = (message_field(1, key.encode()) + message_field(2, str(value).encode()) for key, value in entries.items())
    return head + b"".join(message_field(13, entry) for entry in place) + number_field(14, EXTERNAL)


def value_proto(name: str, kind: int, dims: Sequence[int | str] | None = None) -> bytes:
    """Return a ValueInfoProto: type and shape of an input, output or value; without `dims` the runtime infers it."""
    sizes = (
        number_field(1, size) if isinstance(size, int) else message_field(2, size.encode()) if size else b""
        for size in dims or ()
    )
    shape = b"" if dims is None else message_field(2, b"".join(message_field(1, size) for size in sizes))
    return message_field(1, name.encode()) + message_field(2, message_field(1, number_field(1, kind) + shape))


def message_field(number: int, content: bytes) -> bytes:
    """Return a field with a length: a message, a text or bytes."""
    return _encoded(number << 3 | WITH_LENGTH) + _encoded(len(content)) + content


def number_field(number: int, value: int) -> bytes:
    """Return a field that holds a whole number >= 0."""
    return _encoded(number << 3) + _encoded(value)


def _encoded(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)

"""Read and write protobuf messages of ONNX models, by the field numbers of onnx.proto, without the package onnx."""

from __future__ import annotations

from collections.abc import Iterator


def may_loop(model: bytes) -> bool:
    """Return whether an ONNX model contains nodes with subgraphs (Loop, If, Scan) or functions.

    Exported graphs have neither, and an endless Loop would hang the process when the graph is opened. Raises ValueError
    if the content is not protobuf.
    """
    for field, part, _ in fields(memoryview(model)):
        if field == 25:  # ModelProto.functions
            return True
        for node in parts(part, 1) if field == 7 else ():  # ModelProto.graph, GraphProto.node
            for attribute in parts(node, 5):
                if any(kind in (6, 11) for kind, _, _ in fields(attribute)):  # AttributeProto.g and .graphs
                    return True
    return False


def parts(content: memoryview, field: int) -> Iterator[memoryview]:
    """Yield the contents of the fields with this number in a message."""
    return (part for number, part, _ in fields(content) if number == field)


def fields(content: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield (field number, content, whole field with its tag) of a message.

    The content is that of messages, strings and bytes; it is empty for numbers. Raises ValueError if the bytes are not
    protobuf.
    """
    position = 0

    def read_varint() -> int:
        nonlocal position
        value = 0
        for shift in range(0, 70, 7):
            if position >= len(content):
                break
            byte = content[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number that does not end")

    while position < len(content):
        start = position
        tag = read_varint()
        field, kind = tag >> 3, tag & 7  # wire types: 0 varint, 1 eight bytes, 2 with a length, 5 four bytes
        if kind not in (0, 1, 2, 5):
            raise ValueError(f"a field of kind {kind}")
        if kind == 0:
            read_varint()
            size = 0
        else:
            size = read_varint() if kind == 2 else 8 if kind == 1 else 4
        if position + size > len(content):
            raise ValueError("a field beyond the end")
        end = position + size
        yield field, content[position:end] if kind == 2 else content[:0], content[start:end]
        position = end


def message(field: int, content: bytes) -> bytes:
    """Return a field with a length: a message, a string or bytes."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    """Return a field that holds a whole number >= 0."""
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)

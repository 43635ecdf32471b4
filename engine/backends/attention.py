"""Derive a graph from a bundle's decoder that also returns where the tokens look.

The weights of attention are tensors inside the graph, the outputs of a Softmax. Where a float16 decoder has the
operator Attention instead, they are computed a second time, from its inputs. So a graph that returns them needs neither
a file nor the packages torch and onnx: a few nodes and an output are added to the decoder's protobuf. This works with
the bundles of all versions, precisions and families.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.bundle.manifest import Bundle
from engine.bundle.protobuf import fields, message, number, parts
from engine.errors import BundleError, UsageError

ATTENTION = "attention"
"""The output: f32[B,T,S], the weights of T fed tokens over the S positions of the image, averaged over heads."""
_GRAPH, _NODE, _INITIALIZER, _OUTPUT = 7, 1, 5, 12
"""Fields of onnx.proto: ModelProto.graph, and those of GraphProto."""
_FLOAT, _INT64, _FLOAT16 = 1, 7, 10
"""TensorProto.DataType."""


WITH_ATTENTION = ("cpu", "torch")
"""Backends that are an AttentionBackend (engine/decoding/backend.py)."""
MOST_EXTRA = 2
"""Most positions of an encoder that are not patches."""


class _Node(NamedTuple):
    """A node of a graph: operator, names of inputs and outputs, the whole message."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    content: memoryview


def layers_of(bundle: Bundle, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the decoder layers to average over, ascending; None stands for all. Raises UsageError for others."""
    count = bundle.model.num_layers
    if layers is None:
        return tuple(range(count))
    if unknown := [layer for layer in layers if not 0 <= layer < count]:
        raise UsageError(
            f"--attention-layers {unknown[0]}: the decoder of {bundle.path} has the layers 0 to {count - 1}"
        )
    return tuple(sorted(set(layers)))


def grid_of(bundle: Bundle) -> tuple[int, int, int]:
    """Return rows and columns of the image encoder's grid, and how many positions come before it.

    All supported encoders have square images. Before the grid there is nothing (Swin), a class token (ViT, CLIP, BEiT,
    DINOv2), or a distillation token as well (DeiT). Raises UsageError for other numbers of positions.
    """
    if bundle.tasks:  # the ids of the task follow the image
        raise UsageError(f"attention maps are not supported for models with tasks, such as {bundle.path}")
    positions = bundle.model.encoder_positions
    side = math.isqrt(positions)
    if bundle.image.height != bundle.image.width or positions - side**2 > MOST_EXTRA:
        raise UsageError(
            f"{bundle.path} has {positions} positions for images of {bundle.image.height} x {bundle.image.width} "
            "pixels, which are not a square grid: attention maps are not supported for it"
        )
    return side, side, positions - side**2


def require_attention(bundle: Bundle, backend: str) -> None:
    """Raise UsageError if attention maps of this bundle are not supported, or not on this backend."""
    if backend not in WITH_ATTENTION:
        raise UsageError(
            f"attention maps are computed by the backends {' and '.join(WITH_ATTENTION)}, not by {backend}: add "
            "--backend cpu or --backend torch"
        )
    if bundle.members:
        raise UsageError("attention maps are those of one bundle, not of several: give one --bundle")
    grid_of(bundle)


def attention_graph(bundle: Bundle, layers: Sequence[int]) -> bytes:
    """Return the decoder with the output ATTENTION, averaged over `layers`, after its own.

    It is a ModelProto that reads its weights from the decoder's data file, in the folder of the bundle. Raises
    BundleError if the decoder has fused operators of another kind.
    """
    path = bundle.path / "decoder.onnx"
    model = memoryview(path.read_bytes())
    graph = next(parts(model, _GRAPH))
    nodes = [_node(part) for part in parts(graph, _NODE)]
    content = [bytes(graph)]  # fields of a protobuf message may follow in any order
    weights = []
    for layer in layers:
        node = _attention_over(f"cross.key.{layer}", nodes, path)
        if node.operator == _FUSED:
            content += _weights_of(node, layer, path)
        weights.append(_WEIGHTS.format(layer) if node.operator == _FUSED else node.outputs[0])
    content += _averaged(weights)
    constants = _CONSTANTS | {_END: [bundle.model.encoder_positions]}
    content += [_constant(name, np.array(values, "<i8")) for name, values in constants.items()]
    content.append(message(_OUTPUT, _float_output(ATTENTION)))
    rest = (bytes(whole) for field, _, whole in fields(model) if field != _GRAPH)
    return b"".join(rest) + message(_GRAPH, b"".join(content))


def _attention_over(keys: str, nodes: Iterable[_Node], path: Path) -> _Node:
    """Return the Softmax or Attention over the image's keys: the first that depends on them, as nodes are in order."""
    reached = {keys}
    for node in nodes:
        if reached.isdisjoint(node.inputs) or node.operator == "Shape":
            continue
        if node.operator in ("Softmax", _FUSED):
            return node
        reached.update(node.outputs)
    raise BundleError(
        f"{path} computes attention over {keys} in a fused operator, without a Softmax: export the checkpoint again "
        "with this release to use attention maps"
    )


_FUSED = "Attention"
_WEIGHTS = "attention.weights.{}"


def _weights_of(node: _Node, layer: int, path: Path) -> Iterator[bytes]:
    """Yield nodes and a constant that compute the weights of an Attention in float16 (export/graphs/attention.py)."""
    query, keys, *_ = node.inputs
    names = {part: f"attention.{part}.{layer}" for part in ("turned", "products", "scale", "scores")}
    yield _new("Transpose", [keys], names["turned"], {"perm": (0, 1, 3, 2)})
    yield _new("MatMul", [query, names["turned"]], names["products"])
    yield _constant(names["scale"], np.array(_scale(node, path), "<f2"))
    yield _new("Mul", [names["products"], names["scale"]], names["scores"])
    yield _new("Softmax", [names["scores"]], _WEIGHTS.format(layer), {"axis": 3})


def _scale(node: _Node, path: Path) -> float:
    """Return the attribute `scale`: AttributeProto.f, four bytes after its tag. Raises BundleError if it is missing."""
    for attribute in parts(node.content, 5):
        if _text(attribute, 1) == "scale":
            return float(
                np.frombuffer(next(whole for field, _, whole in fields(attribute) if field == 2)[-4:], "<f4")[0]
            )
    raise BundleError(f"{path}: {node.outputs[0]} is an Attention without a scale: export the checkpoint again")


_FIRST, _AXIS, _HEADS, _END = "attention.first", "attention.axis", "attention.heads", "attention.end"
_CONSTANTS = {_FIRST: [0], _AXIS: [3], _HEADS: [1]}
"""Where the image's positions begin, the axis of positions, and that of heads, which is later that of layers."""


def _averaged(weights: Sequence[str]) -> Iterator[bytes]:
    """Yield nodes (fields of a GraphProto) that average weights [B,H,T,S+...] over heads and layers in float32."""
    for i, name in enumerate(weights):
        # in a prefix family the text's positions follow those of the image in the same softmax
        yield _new("Slice", [name, _FIRST, _END, _AXIS], f"attention.image.{i}")
        yield _new("Cast", [f"attention.image.{i}"], f"attention.float.{i}", {"to": _FLOAT})
        yield _new("ReduceMean", [f"attention.float.{i}", _HEADS], f"attention.mean.{i}", {"keepdims": 1})
    yield _new("Concat", [f"attention.mean.{i}" for i in range(len(weights))], "attention.means", {"axis": 1})
    yield _new("ReduceMean", ["attention.means", _HEADS], ATTENTION, {"keepdims": 0})


def _node(part: memoryview) -> _Node:
    inputs, outputs = (tuple(str(name, "utf-8") for name in parts(part, field)) for field in (1, 2))
    return _Node(_text(part, 4), inputs, outputs, part)


def _new(
    operator: str, inputs: Sequence[str], output: str, attributes: dict[str, int | tuple[int, ...]] | None = None
) -> bytes:
    strings = [*((1, name) for name in inputs), (2, output), (3, output), (4, operator)]
    content = b"".join(message(field, text.encode()) for field, text in strings)
    for name, value in (attributes or {}).items():  # AttributeProto: name, then i with type INT or ints with type INTS
        if isinstance(value, int):
            values = number(3, value) + number(20, 2)
        else:
            values = b"".join(number(8, one) for one in value) + number(20, 7)
        content += message(5, message(1, name.encode()) + values)
    return message(_NODE, content)


def _constant(name: str, values: NDArray[np.generic]) -> bytes:
    """Return an initialiser of type i64 or f16: TensorProto's dims, data_type, name and raw_data."""
    dims = b"".join(number(1, size) for size in values.shape)
    kind = number(2, _FLOAT16 if values.dtype == np.float16 else _INT64)
    return message(_INITIALIZER, dims + kind + message(8, name.encode()) + message(9, values.tobytes()))


def _float_output(name: str) -> bytes:
    """Return a ValueInfoProto of a float32 tensor without a shape, which the runtime infers."""
    return message(1, name.encode()) + message(2, message(1, number(1, _FLOAT)))


def _text(part: memoryview, field: int) -> str:
    return str(next(parts(part, field), b""), "utf-8")

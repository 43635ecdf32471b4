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

import numpy as np
from numpy.typing import NDArray

from engine.bundle.manifest import Bundle
from engine.bundle.onnx import (
    FLOAT16,
    FLOAT32,
    GRAPH,
    INT64,
    Node,
    message_field,
    node_proto,
    read_onnx,
    tensor_proto,
    value_proto,
)
from engine.errors import BundleError, UsageError

ATTENTION = "attention"
"""The output: f32[B,T,S], the weights of T fed tokens over the S positions of the image, averaged over heads."""
_NODE, _INITIALIZER, _OUTPUT = 1, 5, 12
"""Fields of GraphProto in onnx.proto."""
WITH_ATTENTION = ("cpu", "torch")
"""Backends that are an AttentionBackend (engine/decoding/backend.py)."""
MOST_EXTRA = 2
"""Most positions of an encoder that are not patches."""


def _is_number(layer: object) -> bool:
    return isinstance(layer, int | np.integer) and not isinstance(layer, bool)


def layers_of(bundle: Bundle, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the decoder layers to average over, ascending; None stands for all. Raises UsageError for others."""
    count = bundle.model.num_layers
    if layers is None:
        return tuple(range(count))
    if not isinstance(layers, Sequence) or not layers or not all(map(_is_number, layers)):
        raise UsageError(f"attention layers are a list of numbers from 0 to {count - 1}, not {layers!r}")
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
        raise UsageError("attention maps are supported for one bundle only: give one --bundle")
    grid_of(bundle)


def attention_graph(bundle: Bundle, layers: Sequence[int]) -> bytes:
    """Return the decoder with the output ATTENTION, averaged over `layers`, after its own.

    It is a ModelProto that reads its weights from the decoder's data file, in the folder of the bundle. Raises
    BundleError if the decoder is damaged or has fused operators of another kind.
    """
    path = bundle.path / "decoder.onnx"
    model = path.read_bytes()
    nodes = read_onnx(path, model).nodes
    added: list[bytes] = []
    weights = []
    for layer in layers:
        node = _attention_over(f"cross.key.{layer}", nodes, path)
        if node.kind == _FUSED:
            added += _weights_of(node, layer, path)
        weights.append(_WEIGHTS.format(layer) if node.kind == _FUSED else node.outputs[0])
    added += _averaged(weights)
    constants = _CONSTANTS | {_END: [bundle.model.encoder_positions]}
    added += [_constant(name, np.array(values, "<i8")) for name, values in constants.items()]
    added.append(message_field(_OUTPUT, value_proto(ATTENTION, FLOAT32)))
    return model + message_field(GRAPH, b"".join(added))  # protobuf merges a field that occurs twice


def _attention_over(keys: str, nodes: Iterable[Node], path: Path) -> Node:
    """Return the Softmax or Attention over the image's keys: the first that depends on them, as nodes are in order."""
    reached = {keys}
    for node in nodes:
        if reached.isdisjoint(node.inputs) or node.kind == "Shape":
            continue
        if node.kind in ("Softmax", _FUSED):
            return node
        reached.update(node.outputs)
    raise BundleError(
        f"{path} computes attention over {keys} in a fused operator, without a Softmax: export the checkpoint again "
        "with this release to use attention maps"
    )


_FUSED = "Attention"
_WEIGHTS = "attention.weights.{}"


def _weights_of(node: Node, layer: int, path: Path) -> Iterator[bytes]:
    """Yield nodes and a constant that compute the weights of an Attention in float16 (export/graphs/attention.py)."""
    query, keys, *_ = node.inputs
    names = {part: f"attention.{part}.{layer}" for part in ("turned", "products", "scale", "scores")}
    yield _new("Transpose", [keys], names["turned"], {"perm": (0, 1, 3, 2)})
    yield _new("MatMul", [query, names["turned"]], names["products"])
    yield _constant(names["scale"], np.array(_scale(node, path), "<f2"))
    yield _new("Mul", [names["products"], names["scale"]], names["scores"])
    yield _new("Softmax", [names["scores"]], _WEIGHTS.format(layer), {"axis": 3})


def _scale(node: Node, path: Path) -> float:
    """Return the attribute `scale`. Raises BundleError if it is missing."""
    scale = node.attributes.get("scale")
    if not isinstance(scale, float):
        raise BundleError(f"{path}: {node.outputs[0]} is an Attention without a scale: export the checkpoint again")
    return scale


_FIRST, _AXIS, _HEADS, _END = "attention.first", "attention.axis", "attention.heads", "attention.end"
_CONSTANTS = {_FIRST: [0], _AXIS: [3], _HEADS: [1]}
"""Where the image's positions begin, the axis of positions, and that of heads, which is later that of layers."""


def _averaged(weights: Sequence[str]) -> Iterator[bytes]:
    """Yield nodes (fields of a GraphProto) that average weights [B,H,T,S+...] over heads and layers in float32."""
    for i, name in enumerate(weights):
        # in a prefix family the text's positions follow those of the image in the same softmax
        yield _new("Slice", [name, _FIRST, _END, _AXIS], f"attention.image.{i}")
        yield _new("Cast", [f"attention.image.{i}"], f"attention.float.{i}", {"to": FLOAT32})
        yield _new("ReduceMean", [f"attention.float.{i}", _HEADS], f"attention.mean.{i}", {"keepdims": 1})
    yield _new("Concat", [f"attention.mean.{i}" for i in range(len(weights))], "attention.means", {"axis": 1})
    yield _new("ReduceMean", ["attention.means", _HEADS], ATTENTION, {"keepdims": 0})


def _new(
    kind: str, inputs: Sequence[str], output: str, attributes: dict[str, int | tuple[int, ...]] | None = None
) -> bytes:
    return message_field(_NODE, node_proto(kind, inputs, output, attributes))


def _constant(name: str, values: NDArray[np.generic]) -> bytes:
    """Return an initialiser of type i64 or f16."""
    kind = FLOAT16 if values.dtype == np.float16 else INT64
    return message_field(_INITIALIZER, tensor_proto(name, kind, values.shape, values.tobytes()))

"""Attention as one operator, for the graphs of float16 bundles, which are made for GPUs.

ONNX Runtime computes ONNX's operator Attention (opset 23) on a GPU in one flash-attention kernel. softmax(q kT) v as
three operators needs three or more, and memory for the scores. Graphs in float32 keep the three: TensorRT-RTX has no
kernel for Attention in float32, and on CPUs it is not faster (benchmarks/LOG.md, 30 November 2026).
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from onnx import ModelProto, NodeProto, helper, numpy_helper, shape_inference

OPSET = 23
"""The first with the operator Attention."""
NARROWEST, WIDEST, MULTIPLE = 16, 256, 8
"""Head widths that have kernels: multiples of 8 from 16 (TensorRT-RTX 1.7) to 256. Others stay as products, such as
DaViT's attention over channels, whose heads are as wide as the image has positions."""
TURNED = [0, 1, 3, 2]
"""The permutation from keys [B,H,S,d] to the second factor of the product with queries."""


class _Found(NamedTuple):
    """softmax(scale * query @ turned_keys) @ value, and the values in between that nothing else reads."""

    query: str
    turned_keys: str
    value: str
    scale: float
    inner: list[str]


class _Graph:
    """A graph, with the node that makes each value, the number of its readers, and its shape."""

    def __init__(self, model: ModelProto) -> None:
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.readers = Counter(name for node in model.graph.node for name in node.input)
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        self.shapes = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in (*inferred.value_info, *inferred.input)
        }
        """0 is a size that depends on the inputs."""

    def maker(self, name: str, operator: str) -> NodeProto | None:
        """Return the node that makes a value, if it is such an operator."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == operator else None

    def number(self, name: str) -> float | None:
        """Return the value of a scalar constant; None for anything else."""
        node = self.maker(name, "Constant")
        value = numpy_helper.to_array(node.attribute[0].t) if node is not None and node.attribute else None
        return float(value) if value is not None and value.size == 1 else None

    def find(self, mixed: NodeProto) -> _Found | None:
        """Return the attention whose last product is `mixed`."""
        if mixed.op_type != "MatMul":
            return None
        inner, weights = [], mixed.input[0]
        while (cast := self.maker(weights, "Cast")) is not None:  # softmax in another type, as in CLIP
            inner.append(weights)
            weights = cast.input[0]
        softmax = self.maker(weights, "Softmax")
        if softmax is None:
            return None
        inner.append(weights)
        scores, of_scores = self.unscaled(softmax.input[0], inner)
        product = self.maker(scores, "MatMul")
        if product is None:
            return None
        inner.append(scores)
        turned_keys = product.input[1]
        query, of_query = self.unscaled(product.input[0], inner)
        if any(self.readers[name] > 1 for name in inner) or not self._suits(query) or not self._suits(mixed.input[1]):
            return None
        return _Found(query, turned_keys, mixed.input[1], of_scores * of_query, inner)

    def unscaled(self, name: str, inner: list[str]) -> tuple[str, float]:
        """Return what a value is a multiple of, and the factor; a product with a constant is added to `inner`."""
        scaled = self.maker(name, "Mul")
        factor = None if scaled is None else self.number(scaled.input[1])
        if scaled is None or factor is None:
            return name, 1.0
        inner.append(name)
        return scaled.input[0], factor

    def _suits(self, name: str) -> bool:
        """Return whether a kernel takes heads of these queries or values [B,H,T,d]."""
        shape = self.shapes.get(name, [])
        return len(shape) == 4 and NARROWEST <= shape[3] <= WIDEST and shape[3] % MULTIPLE == 0


def fuse_attention(model: ModelProto) -> ModelProto:
    """Return the model with Attention(q, k, v) instead of softmax(scale * q @ transpose(k)) @ v over [B,H,T,d].

    What is added to the scores, such as a mask, ends the pattern. So does a softmax over scores of two blocks: the
    self-attention of the decoders stays as it is.
    """
    graph, nodes, dropped = _Graph(model), [], set()
    for node in model.graph.node:
        found = graph.find(node)
        if found is None:
            nodes.append(node)
            continue
        dropped.update(found.inner)
        turned = graph.maker(found.turned_keys, "Transpose")
        if turned is not None and list(turned.attribute[0].ints) == TURNED:
            keys = turned.input[0]
            dropped.update(turned.output if graph.readers[turned.output[0]] == 1 else ())
        else:  # a runtime merges it with the transposition before
            keys = f"{found.turned_keys}.keys"
            nodes.append(helper.make_node("Transpose", [found.turned_keys], [keys], name=keys, perm=TURNED))
        name = f"{node.name}.attention"
        inputs = [found.query, keys, found.value]
        nodes.append(helper.make_node("Attention", inputs, node.output, name=name, scale=found.scale))
    if not dropped:
        return model
    fused = ModelProto()
    fused.CopyFrom(model)
    values = [value for value in model.graph.value_info if value.name not in dropped]
    del fused.graph.node[:], fused.graph.value_info[:]
    fused.graph.node.extend(node for node in nodes if node.output[0] not in dropped)
    fused.graph.value_info.extend(values)
    for opset in fused.opset_import:
        opset.version = max(opset.version, OPSET)
    return fused

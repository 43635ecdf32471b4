"""Rewrite the dense layers of a float32 graph to int8, and split the decoder graph in two.

Each row of activations (a token or a patch) has its own scale, computed while the graph runs, so a row's result does
not depend on the rest of the batch. Weights have one scale per output (engine/checkpoints/int8.py has the arithmetic).
Attention, layer norms and embeddings stay float32. How activations are rounded is one of PLAIN, GELU and TWICE.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.utils import Extractor

from engine.bundle.manifest import FORMAT, HALVES, LOG_PROBS, graph_inputs, graph_outputs
from engine.checkpoints.graphs import INPUTS_FIRST
from engine.checkpoints.int8 import BEST_LOGITS, SCALE_SUFFIX, SUFFIX


class Rounding(NamedTuple):
    """How a row of activations x becomes u8: round(x / s) + zero with s = max(x) / steps, or max|x| with `is_signed`.

    The maximum is at least `smallest`, so that 1 / s is a number. With `is_twice` the difference between x / s and its
    rounded value, at most 1/2, is rounded as well, to steps of 1/254. Both go through one product of matrices, as rows
    of one matrix: ONNX Runtime without VNNI cannot use one weight in two.
    """

    name: str
    zero: int
    smallest: float
    is_signed: bool = True
    is_twice: bool = False

    @property
    def steps(self) -> int:
        """The largest distance from the zero point."""
        return 255 - self.zero


PLAIN = Rounding("int8.plain", 128, 1e-20)
TWICE = Rounding("int8.twice", 128, 1e-20, is_twice=True)
GELU = Rounding("int8.gelu", 32, 0.17 / 32 * (255 - 32), is_signed=False)
"""GELU(x) is above -0.17, which is 32 steps here: 223 steps are left for values above 0 instead of 127."""


def quantise(float32: ModelProto, *, is_decoder: bool = False) -> ModelProto:
    """Return a graph with all dense layers in int8.

    A decoder rounds the inputs of its layers TWICE. Sums of attention are in another order when a row is decoded with
    other images, and where that moves a value over the edge between two steps, log-probabilities change: those of the
    demo by up to 0.0048 if the head rounds once, and by 0.0005 with a head whose weights are also the table of word
    embeddings. That one rounds once too, but its largest logits are then computed again in float32 (`_exact_best`).
    Only names and shapes of weights are read and set. engine/checkpoints/write.py quantises the values.
    """
    model = ModelProto()
    model.CopyFrom(float32)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    transposed = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    nodes: list[NodeProto] = []
    quantised: list[TensorProto] = []
    named: set[str] = set()
    makers = {name: node for node in model.graph.node for name in node.output}
    rounded: set[tuple[str, Rounding]] = set()
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    for node in model.graph.node:
        dense = _weight_of(node, weights, transposed)
        if dense is None:
            nodes.append(node)
            continue
        name, is_transposed = dense
        inputs, outputs = weights[name].dims[::-1] if is_transposed else weights[name].dims
        if name not in named:
            named.add(name)
            quantised += [
                TensorProto(
                    name=name + SUFFIX,
                    data_type=TensorProto.INT8,
                    dims=[inputs, outputs],
                    doc_string="" if is_transposed else INPUTS_FIRST,  # for templates.py
                ),
                TensorProto(name=name + SCALE_SUFFIX, data_type=TensorProto.FLOAT, dims=[outputs]),
            ]
        x, out = node.input[0], node.output[0]
        is_head = is_decoder and is_transposed and name in tables and outputs > BEST_LOGITS
        rounding = PLAIN if is_head else TWICE if is_decoder else GELU if _is_gelu(x, makers) else PLAIN
        if (x, rounding) not in rounded:  # q, k and v share their input's rows
            rounded.add((x, rounding))
            nodes += _round(x, rounding)
        bias = node.input[2] if node.op_type == "Gemm" else ""
        if is_head:
            nodes += _product(x, rounding, name, bias, f"{out}.all")
            nodes += _exact_best(x, name, bias, f"{out}.all", out)
        else:
            nodes += _product(x, rounding, name, bias, out)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in _constants().items())
    model.graph.initializer.extend(quantised)
    _remove_unused(model)
    return model


def _weight_of(node: NodeProto, weights: dict[str, TensorProto], transposed: dict[str, str]) -> tuple[str, bool] | None:
    """Return the name of a dense layer's weight, and whether it is [outputs,inputs]; None for other nodes.

    torch exports a Linear, whose weight is [outputs,inputs], as a Gemm with transB or as a Transpose and a MatMul. The
    weight of GPT-2's Conv1D is [inputs,outputs]: it is a Gemm without transB, or a MatMul.
    """
    if node.op_type == "Gemm":
        name, is_transposed = node.input[1], any(one.name == "transB" and one.i for one in node.attribute)
    elif node.op_type == "MatMul":
        name = transposed.get(node.input[1], node.input[1])
        is_transposed = name != node.input[1]
    else:
        return None
    return (name, is_transposed) if name in weights and len(weights[name].dims) == 2 else None


def _is_gelu(x: str, makers: dict[str, NodeProto], kinds: tuple[str, ...] = ("Mul", "Mul", "Add", "Erf")) -> bool:
    """Return whether x is the output of a GELU: x / sqrt(2) -> Erf -> + 1 -> times x -> times 1/2."""
    if x not in makers or makers[x].op_type != kinds[0]:
        return False
    return len(kinds) == 1 or any(_is_gelu(name, makers, kinds[1:]) for name in makers[x].input)


def _constants() -> dict[str, np.ndarray]:
    constants = {
        "int8.one": np.array(1, np.float32),
        "int8.last": np.array([-1], np.int64),
        "int8.best": np.array([BEST_LOGITS], np.int64),
        "int8.rest": np.array(1 / 254, np.float32),
    }
    for one in (PLAIN, GELU, TWICE):
        constants |= {
            f"{one.name}.zero": np.array(one.zero, np.uint8),
            f"{one.name}.steps": np.array(one.steps, np.float32),
            f"{one.name}.step": np.array(1 / one.steps, np.float32),
            f"{one.name}.smallest": np.array(one.smallest, np.float32),
        }
    return constants


def _round(x: str, rounding: Rounding) -> list[NodeProto]:
    """Return the nodes that compute `PREFIX.uint8` and `PREFIX.scale`, the scale of each row; PREFIX is x and int8."""
    own, largest = f"{x}.{rounding.name}", x
    nodes = []
    if rounding.is_signed:
        largest = f"{own}.abs"
        nodes.append(_node("Abs", [x], largest))
    nodes += [
        _node("ReduceMax", [largest, "int8.last"], f"{own}.max", keepdims=1),
        _node("Max", [f"{own}.max", f"{rounding.name}.smallest"], f"{own}.most"),
        _node("Mul", [f"{own}.most", f"{rounding.name}.step"], f"{own}.scale"),
        _node("Div", [f"{rounding.name}.steps", f"{own}.most"], f"{own}.factor"),
        _node("Mul", [x, f"{own}.factor"], f"{own}.scaled"),
    ]
    if not rounding.is_twice:
        return [*nodes, _node("QuantizeLinear", [f"{own}.scaled", "int8.one", f"{rounding.name}.zero"], f"{own}.uint8")]
    return [
        *nodes,
        _node("Round", [f"{own}.scaled"], f"{own}.rounded"),
        _node("Sub", [f"{own}.scaled", f"{own}.rounded"], f"{own}.left"),
        _node("QuantizeLinear", [f"{own}.rounded", "int8.one", f"{rounding.name}.zero"], f"{own}.first"),
        _node("QuantizeLinear", [f"{own}.left", "int8.rest", f"{rounding.name}.zero"], f"{own}.second"),
        _node("Concat", [f"{own}.first", f"{own}.second"], f"{own}.uint8", axis=0),
    ]


def _product(x: str, rounding: Rounding, weight: str, bias: str, out: str) -> list[NodeProto]:
    """Return the nodes of x W^T + bias: exact sums in int32, scaled back to float32."""
    own, last, sums = f"{x}.{rounding.name}", f"{out}.product" if bias else out, f"{out}.float"
    nodes = [
        _node("MatMulInteger", [f"{own}.uint8", weight + SUFFIX, f"{rounding.name}.zero"], f"{out}.sums"),
        _node("Cast", [f"{out}.sums"], sums, to=TensorProto.FLOAT),
    ]
    if rounding.is_twice:
        parts, sums = [f"{out}.first", f"{out}.second"], f"{out}.both"
        nodes += [
            helper.make_node("Split", [f"{out}.float"], parts, name=f"{out}.split", axis=0, num_outputs=2),
            _node("Mul", [f"{out}.second", "int8.rest"], f"{out}.rest"),
            _node("Add", [f"{out}.first", f"{out}.rest"], sums),
        ]
    nodes += [
        _node("Mul", [sums, weight + SCALE_SUFFIX], f"{out}.scaled"),
        _node("Mul", [f"{out}.scaled", f"{own}.scale"], last),
    ]
    return [*nodes, _node("Add", [last, bias], out)] if bias else nodes


def _exact_best(x: str, table: str, bias: str, logits: str, out: str) -> list[NodeProto]:
    """Return the nodes that copy `logits` f32[...,V] to `out`, the BEST_LOGITS largest of a row computed in float32.

    Each is the product of a row of x f32[...,D] and a row of the table f32[V,D], and costs a lookup in the table, which
    the word embeddings keep in float32 anyway. Of the other logits most only add to the denominator of the softmax.
    """
    best, values = f"{out}.best", f"{out}.exact"
    nodes = [
        helper.make_node("TopK", [logits, "int8.best"], [f"{out}.rough", best], name=f"{best}.node", sorted=0),
        _node("Gather", [table, best], f"{out}.rows", axis=0),
        _node("Unsqueeze", [x, "int8.last"], f"{out}.column"),
        _node("MatMul", [f"{out}.rows", f"{out}.column"], f"{out}.dots"),
        _node("Squeeze", [f"{out}.dots", "int8.last"], values),
    ]
    if bias:
        added = f"{out}.biases"
        nodes += [_node("Gather", [bias, best], added, axis=0), _node("Add", [values, added], f"{values}.biased")]
        values = f"{values}.biased"
    return [*nodes, _node("ScatterElements", [logits, best, values], out, axis=-1)]


def _node(kind: str, inputs: list[str], output: str, **attributes: int) -> NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"{output}.node", **attributes)


def _remove_unused(model: ModelProto) -> None:
    """Remove Transposes of weights that are not used any more, then those weights."""
    used = {name for node in model.graph.node for name in node.input} | {one.name for one in model.graph.output}
    nodes = [node for node in model.graph.node if any(name in used for name in node.output)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    del model.graph.value_info[:]


def halves(decoder: ModelProto, num_layers: int, vocab_size: int) -> dict[str, ModelProto]:
    """Return the split decoder, {graph: model}. An ensemble averages log-probabilities between the two graphs."""
    split = {}
    for graph in HALVES:
        model = ModelProto()
        model.CopyFrom(decoder)
        (node,) = (node for node in model.graph.node if node.op_type == "LogSoftmax")
        _rename(model, node.output[0] if graph == LOG_PROBS else node.input[0])
        model.graph.value_info.append(
            helper.make_tensor_value_info(LOG_PROBS, TensorProto.FLOAT, ["images", "rows", vocab_size])
        )
        half = Extractor(model).extract_model(graph_inputs(num_layers, FORMAT)[graph], graph_outputs(num_layers)[graph])
        half.producer_name = model.producer_name
        split[graph] = half
    return split


def _rename(model: onnx.ModelProto, name: str) -> None:
    """Rename the tensor `name` to LOG_PROBS."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [LOG_PROBS if tensor == name else tensor for tensor in names]

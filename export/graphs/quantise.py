"""Rewrite the dense layers of a float32 graph to int8, and split the decoder graph in two.

Each row of activations (a token or a patch) has its own scale, computed while the graph runs, so a row's result does
not depend on the rest of the batch. Weights have one scale per output (engine/bundle/int8.py has the arithmetic).
Attention, layer norms and embeddings stay float32.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.utils import Extractor

from engine.bundle.int8 import SCALE_SUFFIX, SUFFIX
from engine.bundle.manifest import FORMAT, HALVES, LOG_PROBS, graph_inputs, graph_outputs
from engine.checkpoints.graphs import INPUTS_FIRST

CONSTANTS: dict[str, np.generic | NDArray[np.int64]] = {
    "int8.zero": np.uint8(128),  # the zero point of activations
    "int8.steps": np.float32(127),  # the largest distance from it
    "int8.step": np.float32(1 / 127),
    "int8.one": np.float32(1),
    "int8.smallest": np.float32(1e-20),  # stands for the largest value of a row of zeros, so that 127 / it is a number
    "int8.last": np.array([-1], np.int64),
}


def quantise(float32: ModelProto) -> ModelProto:
    """Return a graph with all dense layers in int8.

    Only names and shapes of weights are read and set. engine/checkpoints/write.py quantises the values.
    """
    model = ModelProto()
    model.CopyFrom(float32)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    transposed = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    nodes: list[NodeProto] = []
    quantised: list[TensorProto] = []
    named: set[str] = set()
    rows: set[str] = set()
    for node in model.graph.node:
        dense = _weight_of(node, weights, transposed)
        if dense is None:
            nodes.append(node)
            continue
        name, is_transposed = dense
        if name not in named:
            named.add(name)
            first, second = weights[name].dims
            inputs, outputs = (second, first) if is_transposed else (first, second)
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
        if x not in rows:  # q, k and v share their input's rows
            rows.add(x)
            nodes += _quantise_rows(x)
        bias = node.input[2] if node.op_type == "Gemm" else ""
        nodes += _product(x, name, bias, out)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in CONSTANTS.items()
    )
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


def _quantise_rows(x: str) -> list[NodeProto]:
    """Return the nodes that compute `x.uint8` and `x.scale`, the scale of each row."""
    return [
        _node("Abs", [x], f"{x}.abs"),
        _node("ReduceMax", [f"{x}.abs", "int8.last"], f"{x}.max", keepdims=1),
        _node("Max", [f"{x}.max", "int8.smallest"], f"{x}.most"),
        _node("Mul", [f"{x}.most", "int8.step"], f"{x}.scale"),
        _node("Div", ["int8.steps", f"{x}.most"], f"{x}.factor"),
        _node("Mul", [x, f"{x}.factor"], f"{x}.scaled"),
        _node("QuantizeLinear", [f"{x}.scaled", "int8.one", "int8.zero"], f"{x}.uint8"),
    ]


def _product(x: str, weight: str, bias: str, out: str) -> list[NodeProto]:
    """Return the nodes of x W^T + bias: exact sums in int32, scaled back to float32."""
    last = f"{out}.product" if bias else out
    nodes = [
        _node("MatMulInteger", [f"{x}.uint8", weight + SUFFIX, "int8.zero"], f"{out}.sums"),
        _node("Cast", [f"{out}.sums"], f"{out}.float", to=TensorProto.FLOAT),
        _node("Mul", [f"{out}.float", weight + SCALE_SUFFIX], f"{out}.scaled"),
        _node("Mul", [f"{out}.scaled", f"{x}.scale"], last),
    ]
    return [*nodes, _node("Add", [last, bias], out)] if bias else nodes


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

"""Quantise the dense layers of a float32 graph to int8 with onnxruntime, and split the decoder graph in two.

Quantisation is dynamic: weights become int8 with one scale per output, and activations become uint8 with one scale per
tensor, which is computed while the graph runs. All else stays float32: attention, layer norms, embeddings, the LM head,
and the first and last layer of the vision tower, which caused most of the error (benchmarks/LOG.md, "Half and int8";
Family.kept_float32 lists them).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.utils import Extractor
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from engine.bundle.manifest import CHOICE, FORMAT, LOG_PROBS, graph_inputs, graph_outputs


def quantise(model: ModelProto, kept: tuple[str, ...]) -> ModelProto:
    """Return the graph with int8 dense layers, except for weights whose names contain one of `kept`.

    `model` is changed in place and must not be used afterwards. Only standard ONNX operators are added
    (DynamicQuantizeLinear, MatMulInteger). Weights use 7 of their 8 bits (`reduce_range`), because processors without
    VNNI add two products in 16 bits, and 8-bit weights would overflow silently.
    """
    _prepare(model, kept)
    add_pre_process_metadata(model)  # avoids a warning; the runtime infers shapes and optimises the graph
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "quantised.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        quantised = onnx.load(str(path))
    del quantised.metadata_props[:]
    del quantised.graph.value_info[:]
    return quantised


def _prepare(model: ModelProto, kept: tuple[str, ...]) -> None:
    """Rewrite the dense layers so that the quantiser converts exactly those that should become int8.

    The quantiser converts a MatMul with an initialiser. It also converts a Gemm, which it would split in two with a
    copy of the weight (for the LM head, a second embedding). It ignores a MatMul with the output of a Transpose. So
    weights to convert are transposed here, and a Gemm to keep becomes a Transpose, a MatMul and an Add.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    transposed = {node.output[0]: node for node in model.graph.node if node.op_type == "Transpose"}
    uses = Counter(name for node in model.graph.node for name in node.input)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        transpose = transposed.get(node.input[1]) if node.op_type == "MatMul" else None
        if transpose is not None and transpose.input[0] in weights and not _is_kept(transpose.input[0], kept):
            weight = weights[transpose.input[0]]
            assert uses[weight.name] == uses[transpose.output[0]] == 1, f"{weight.name} has another use"
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), weight.name))
            nodes.remove(transpose)
            node.input[1] = weight.name
        if node.op_type == "Gemm" and _is_kept(node.input[1], kept):
            nodes += _split_gemm(node)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _is_kept(weight: str, kept: tuple[str, ...]) -> bool:
    return any(part in weight for part in kept)


def _split_gemm(gemm: NodeProto) -> list[NodeProto]:
    """Return x W^T + b as three nodes: Transpose, MatMul and Add. torch exports it as one Gemm."""
    x, weight, bias = gemm.input
    (out,) = gemm.output
    return [
        helper.make_node("Transpose", [weight], [f"{out}.weight"], name=f"{gemm.name}.transpose", perm=[1, 0]),
        helper.make_node("MatMul", [x, f"{out}.weight"], [f"{out}.product"], name=f"{gemm.name}.product"),
        helper.make_node("Add", [f"{out}.product", bias], [out], name=f"{gemm.name}.sum"),
    ]


def write_halves(out: Path, num_layers: int, vocab_size: int) -> None:
    """Write the split decoder, log_probs.onnx and choice.onnx, next to decoder.onnx in `out`.

    An ensemble averages log-probabilities between the two graphs.
    """
    for graph in (LOG_PROBS, CHOICE):
        model = onnx.load(str(out / "decoder.onnx"), load_external_data=False)
        (node,) = (node for node in model.graph.node if node.op_type == "LogSoftmax")
        _rename(model, node.output[0] if graph == LOG_PROBS else node.input[0])
        model.graph.value_info.append(
            helper.make_tensor_value_info(LOG_PROBS, TensorProto.FLOAT, ["images", "rows", vocab_size])
        )
        half = Extractor(model).extract_model(graph_inputs(num_layers, FORMAT)[graph], graph_outputs(num_layers)[graph])
        half.producer_name = model.producer_name
        path = out / f"{graph}.onnx"
        onnx.save_model(half, str(path))
        onnx.checker.check_model(str(path), full_check=True)


def _rename(model: onnx.ModelProto, name: str) -> None:
    """Rename the tensor `name` to LOG_PROBS."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [LOG_PROBS if tensor == name else tensor for tensor in names]

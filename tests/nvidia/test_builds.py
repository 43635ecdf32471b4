"""Build every graph with NVIDIA's parser and builder, without a GPU: TensorRT-RTX builds ahead of time.

These tests show that operators, types, shapes and limits are accepted. They do not run the plans.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from engine.backends import plans
from engine.backends.shapes import Bounds, profiles
from engine.bundle.manifest import GRAPHS, Bundle
from engine.errors import BackendError
from export.graphs.exporters import write_graphs
from export.reference.huggingface import Reference, normalisation
from export.restore import restore_checkpoint
from tests.helpers.tiny import make_checkpoint
from tests.helpers.tiny_florence import make_florence_checkpoint

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 Linux and Windows only")

A100 = "8.0"
SHAPES = {
    "base": ({"hidden_size": 768, "num_attention_heads": 12}, {"hidden_size": 768, "num_attention_heads": 12}),
    "large": ({"hidden_size": 768, "num_attention_heads": 12}, {"hidden_size": 1024, "num_attention_heads": 16}),
}
"""Widths and heads of BLIP-base and BLIP-large, text and vision; one layer each keeps a build to seconds."""
FLOATS, INTEGERS = {"FLOAT", "FLOAT16"}, {"INT64"}
ALLOWED = {
    **dict.fromkeys(("Conv", "Gemm", "MatMul", "Softmax", "LogSoftmax", "LayerNormalization", "Erf", "TopK"), FLOATS),
    **dict.fromkeys(("Pad", "ReduceMean"), FLOATS),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), FLOATS | INTEGERS),
    **dict.fromkeys(("Concat", "Expand", "Flatten", "Gather", "GatherElements", "Reshape", "Slice"), FLOATS | INTEGERS),
    **dict.fromkeys(("Split", "Squeeze", "Transpose", "Unsqueeze", "Identity", "ScatterElements"), FLOATS | INTEGERS),
    **dict.fromkeys(("Equal", "Clip", "Range"), INTEGERS),
    "Attention": {"FLOAT16"},
    "Less": FLOATS | INTEGERS,
    "Cast": FLOATS | INTEGERS | {"UINT8", "BOOL"},
    "Shape": FLOATS | INTEGERS | {"UINT8", "BOOL"},
    "Where": FLOATS | INTEGERS,
    "ConstantOfShape": INTEGERS,
    "Constant": set(),
}
"""Operator -> allowed types of its first data input: the operators of NVIDIA's ONNX parser (TensorRT 10) that our
graphs need and the builder accepts. A new operator or type must be added here on purpose.
"""


def graphs_of(checkpoint: Path, out: Path, precision: str) -> Bundle:
    """Write a checkpoint's graphs as export does, but without golden recordings, because nothing is run here."""
    reference = Reference.load(checkpoint)
    sizes = reference.sizes
    out.mkdir()
    model = reference.model.half() if precision == "fp16" else reference.model
    write_graphs(model, out, normalisation(reference.image_processor))
    image = replace(Bundle.load().image, height=sizes.image_size, width=sizes.image_size)
    bundle = Bundle(out, "", sizes, image, sizes.tokens, precision, tasks=reference.tasks)
    return bundle.for_task(reference.task)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Bundle]:
    """The demo, graphs with the widths of BLIP-base and -large, and a small Florence-2, in both precisions."""
    work = tmp_path_factory.mktemp("builds")
    checkpoints = {"demo": restore_checkpoint(Bundle.load().path, work / "demo")}
    checkpoints["florence"] = make_florence_checkpoint(work / "florence")
    for name, (text, vision) in SHAPES.items():
        layers = {"num_hidden_layers": 1}
        checkpoints[name] = make_checkpoint(
            work / name,
            std=0.02,
            text=text | layers | {"intermediate_size": 3072, "encoder_hidden_size": vision["hidden_size"]},
            vision=vision | layers | {"intermediate_size": 4 * vision["hidden_size"]},
        )
    return {
        f"{name} {precision}": graphs_of(checkpoint, work / f"{name} {precision}", precision)
        for name, checkpoint in checkpoints.items()
        for precision in ("fp32", "fp16")
    } | {"demo fp32": Bundle.load()}


@pytest.fixture(
    params=[f"{name} {precision}" for name in ("demo", *SHAPES, "florence") for precision in ("fp32", "fp16")]
)
def bundle(request, bundles) -> Bundle:
    return bundles[request.param]


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_are_built_strongly_typed_for_an_a100(graph, bundle):
    bounds = Bounds.of(bundle, beams=4, max_new_tokens=40, rows=256)
    target = plans.target_for(plans.PORTABLE, A100)
    assert len(plans.build_plan(bundle, graph, bounds, target)) > 1000


@pytest.mark.parametrize("graph", GRAPHS)
def test_networks_keep_the_precision_of_their_graphs(graph, bundle):
    logger = plans.make_logger(rtx)
    builder = rtx.Builder(logger)
    network, _parser = plans.parse(rtx, builder, logger, bundle.path / f"{graph}.onnx")
    types = {"MATRIX_MULTIPLY": set(), "SOFTMAX": set(), "NORMALIZATION": set(), "TOPK": set()}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name in types:
            types[layer.type.name].add(layer.get_output(0).dtype.name)
    wanted = "HALF" if bundle.precision == "fp16" else "FLOAT"
    if graph == "regroup":
        assert types["MATRIX_MULTIPLY"] == set()
        return
    assert types["MATRIX_MULTIPLY"] == {wanted}
    assert types["NORMALIZATION"] <= {wanted}
    if graph == "decoder":
        assert types["TOPK"] == {"FLOAT"}  # scores are summed and compared in float32 whatever the weights are
        assert types["SOFTMAX"] <= {wanted, "FLOAT"}


@pytest.mark.parametrize("graph", GRAPHS)
def test_operators_and_types_are_supported(graph, bundle):
    model = shape_inference.infer_shapes(onnx.load(str(bundle.path / f"{graph}.onnx"), load_external_data=False))
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        assert node.domain in ("", "ai.onnx")
        assert node.op_type in ALLOWED, node.op_type
        index = 1 if node.op_type == "Where" else 0
        if len(node.input) > index:
            kind = TensorProto.DataType.Name(types[node.input[index]])
            assert kind in ALLOWED[node.op_type], f"{node.op_type} of {kind}"


def small_graph(tmp_path: Path, nodes, inputs, outputs, initializers=()) -> Path:
    """Write an ONNX file of a few nodes; inputs and outputs are (name, type, shape)."""
    values = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "small", *values, initializer=list(initializers))
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def top_k(tmp_path: Path, count: int) -> Path:
    return small_graph(
        tmp_path,
        [helper.make_node("TopK", ["x", "k"], ["values", "places"])],
        [("x", TensorProto.FLOAT, [2, 30_524])],
        [("values", TensorProto.FLOAT, [2, count]), ("places", TensorProto.INT64, [2, count])],
        [numpy_helper.from_array(np.array([count], np.int64), "k")],
    )


def mixed_product(tmp_path: Path, kind: int) -> Path:
    return small_graph(
        tmp_path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT16, [4, 8]), ("w", kind, [8, 4])],
        [("y", TensorProto.FLOAT16, [4, 4])],
    )


def scatter(tmp_path: Path, reduction: str) -> Path:
    return small_graph(
        tmp_path,
        [helper.make_node("ScatterElements", ["x", "places", "new"], ["y"], axis=1, reduction=reduction)],
        [("x", TensorProto.FLOAT, [2, 9]), ("places", TensorProto.INT64, [2, 3]), ("new", TensorProto.FLOAT, [2, 3])],
        [("y", TensorProto.FLOAT, [2, 9])],
    )


REFUSED = {
    "TopK of 3841": (lambda path: top_k(path, 3840), lambda path: top_k(path, 3841)),
    "float16 times float32": (
        lambda path: mixed_product(path, TensorProto.FLOAT16),
        lambda path: mixed_product(path, TensorProto.FLOAT),
    ),
    "scatter with max": (lambda path: scatter(path, "none"), lambda path: scatter(path, "max")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_graphs_are_refused(name, tmp_path):
    """Negative controls, each with a similar graph that passes: a builder that accepts anything proves nothing."""
    accepted, refused = REFUSED[name]
    assert plans.build_network(rtx, accepted(tmp_path), {}, A100)
    with pytest.raises(BackendError, match=r"small\.onnx"):
        plans.build_network(rtx, refused(tmp_path), {}, A100)


def test_profile_that_contradicts_its_graph_is_refused(bundles):
    bundle = bundles["base fp32"]
    bounds = Bounds.of(bundle, beams=4, max_new_tokens=40, rows=64)
    wrong = dict(profiles(bundle, bounds)["decoder"])
    wrong["cross.key.0"] = tuple((*shape[:3], shape[3] + 1) for shape in wrong["cross.key.0"])
    with pytest.raises(BackendError, match="decoder"):
        plans.build_network(rtx, bundle.path / "decoder.onnx", wrong, A100)


def test_unknown_compute_capability_is_refused():
    with pytest.raises(BackendError, match=r"8\.0"):
        plans.target_for(plans.PORTABLE, "1.0")

"""The reader of ONNX files against the package onnx, and on damaged files."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from engine.bundle.manifest import demo_bundle
from engine.bundle.onnx import GRAPH, Weights, message_field, node_proto, number_field, read_onnx
from engine.errors import BundleError

GRAPHS = ("encoder", "decoder", "regroup")


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_are_read_as_onnx_reads_them(graph):
    path = demo_bundle() / f"{graph}.onnx"
    ours, theirs = read_onnx(path), onnx.load(str(path), load_external_data=False).graph
    assert len(ours.nodes) == len(theirs.node)
    for mine, node in zip(ours.nodes, theirs.node, strict=True):
        assert (mine.kind, mine.inputs, mine.outputs) == (node.op_type, tuple(node.input), tuple(node.output))
        for attribute in node.attribute:
            expected = helper.get_attribute_value(attribute)
            if attribute.type == onnx.AttributeProto.TENSOR:
                np.testing.assert_array_equal(mine.attributes[attribute.name], numpy_helper.to_array(expected))
            else:
                expected = expected.decode() if isinstance(expected, bytes) else expected
                value = mine.attributes[attribute.name]
                assert value == (tuple(expected) if isinstance(value, tuple) else expected)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.initializer]
    for (dtype, dims, content), tensor in zip(ours.tensors.values(), theirs.initializer, strict=True):
        assert (dtype, dims) == (helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims))
        if isinstance(content, Weights):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries == {
                "location": content.file,
                "offset": str(content.offset),
                "length": str(content.size),
            }
        else:
            np.testing.assert_array_equal(content, numpy_helper.to_array(tensor))
    assert [port.name for port in ours.inputs] == [value.name for value in theirs.input]
    assert [port.name for port in ours.outputs] == [value.name for value in theirs.output]


@given(st.integers(0, 4958), st.binary(max_size=3))
def test_damaged_files_are_refused_or_read(tmp_path_factory, position, replacement):
    """Any change gives a graph or a BundleError, never another exception or an endless loop."""
    content = (demo_bundle() / "regroup.onnx").read_bytes()
    path = tmp_path_factory.mktemp("onnx") / "regroup.onnx"
    path.write_bytes(content[:position] + replacement + content[position + 1 :])
    try:
        read_onnx(path)
    except BundleError as error:
        assert "is not a graph of this engine's bundles" in str(error)


def test_a_file_without_a_graph_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"is not a graph of this engine's bundles \(no graph\)"):
        read_onnx(tmp_path / "decoder.onnx", b"")


def test_a_float_without_a_value_does_not_end_the_list_of_nodes(tmp_path):
    """A StopIteration inside the reader would drop the nodes that follow."""
    damaged = node_proto("Q", ["a"], "b") + message_field(
        5, message_field(1, b"alpha") + number_field(20, 1)
    )  # type FLOAT, no value
    nodes = [node_proto("P", ["x"], "a"), damaged, node_proto("R", ["b"], "y")]
    model = message_field(GRAPH, b"".join(message_field(1, node) for node in nodes))
    with pytest.raises(BundleError, match="a whole number instead of a float"):
        read_onnx(tmp_path / "decoder.onnx", model)


def test_two_graphs_in_a_file_are_read_as_one(tmp_path):
    """As protobuf does it: attention maps add nodes by a second graph."""
    first, second = (message_field(GRAPH, message_field(1, node_proto(kind, ["x"], kind))) for kind in "PQ")
    assert [node.kind for node in read_onnx(tmp_path / "decoder.onnx", first + second).nodes] == ["P", "Q"]
    merged = onnx.ModelProto.FromString(first + second).graph
    assert [node.op_type for node in merged.node] == ["P", "Q"]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (number_field(2, 99) + number_field(1, 1), "unknown element type 99"),
        (number_field(2, 1) + number_field(1, 1) + number_field(14, 1), "a tensor in another file, which is not named"),
    ],
)
def test_a_damaged_tensor_is_named(tensor, reason, tmp_path):
    with pytest.raises(BundleError, match=reason):
        read_onnx(tmp_path / "decoder.onnx", message_field(GRAPH, message_field(5, tensor)))

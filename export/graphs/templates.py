"""Graphs without weights, as the engine reads them (engine/checkpoints/graphs.py), from ONNX models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, numpy_helper

from engine.bundle.onnx import FLOAT16, FLOAT32, INT64
from engine.checkpoints.graphs import (
    PARAMETER,
    QUANTISED,
    SCALE,
    VALUE,
    WEIGHT,
    Graph,
    Number,
    Patch,
    Tensor,
    Value,
    bytes_of,
    patched_nodes,
    size_of,
)
from engine.checkpoints.int8 import SCALE_SUFFIX, SUFFIX


def template(name: str, model: ModelProto, data: str) -> Graph:
    """Return a graph without weights.

    Initialisers without a value are weights. `data` names the graph that stores them.
    """
    graph = model.graph
    nodes, rest = GraphProto(), ModelProto()
    nodes.node.extend(graph.node)
    rest.CopyFrom(model)
    rest.ClearField("graph")
    return Graph(
        name=name,
        title=graph.name,
        data=f"{data}.onnx.data",
        model=rest.SerializeToString(deterministic=True),
        nodes=nodes.SerializeToString(deterministic=True),
        patches=(),
        tensors=tuple(map(_tensor, graph.initializer)),
        inputs=tuple(map(_value, graph.input)),
        outputs=tuple(map(_value, graph.output)),
        values=tuple(map(_value, graph.value_info)),
    )


def _tensor(tensor: TensorProto) -> Tensor:
    name, shape = tensor.name, (tensor.data_type, tuple(tensor.dims))
    if tensor.HasField("raw_data"):
        array = numpy_helper.to_array(tensor)
        return Tensor(name, *shape, VALUE, array.astype(array.dtype.newbyteorder("<")).tobytes().hex())
    for suffix, holds in ((SUFFIX, tensor.doc_string or QUANTISED), (SCALE_SUFFIX, SCALE)):
        if name.endswith(suffix):
            return Tensor(name, *shape, holds, name.removesuffix(suffix))
    return Tensor(name, *shape, WEIGHT, name)


def _value(value: ValueInfoProto) -> Value:
    kind = value.type.tensor_type
    dims = (axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in kind.shape.dim)
    return Value(value.name, kind.elem_type, tuple(dims))


def with_parameters(
    graph: Graph, other: Graph, numbers: Mapping[str, Number], other_numbers: Mapping[str, Number]
) -> Graph:
    """Return a graph whose parameters are found by comparing it with the same graph of a model with other `numbers`.

    Every place where the two differ must hold the value of one parameter in either. Raises AssertionError otherwise:
    then the graph depends on a checkpoint in a way that is not known here.
    """

    def found(mine: Any, theirs: Any) -> str:
        names = [name for name in numbers if (mine, theirs) == (numbers[name], other_numbers[name])]
        assert len(names) == 1, f"{graph.name}.onnx has {mine} and {theirs}, which is not one of {list(numbers)}"
        return PARAMETER + names[0]

    def sized(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a if a == b else found(a, b) for a, b in zip(mine, theirs, strict=True))

    def tensor(mine: Tensor, theirs: Tensor) -> Tensor:
        of = mine.of
        if of != theirs.of:
            (of,) = (
                PARAMETER + name
                for name in numbers
                if bytes_of(name, mine.kind, numbers).hex() == mine.of
                and bytes_of(name, mine.kind, other_numbers).hex() == theirs.of
            )
        return replace(mine, dims=sized(mine.dims, theirs.dims), of=of)

    def values(mine: tuple[Value, ...], theirs: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(replace(a, dims=sized(a.dims, b.dims)) for a, b in zip(mine, theirs, strict=True))

    parametrised = replace(
        graph,
        patches=_patches(graph, other.nodes, numbers, other_numbers),
        tensors=tuple(tensor(a, b) for a, b in zip(graph.tensors, other.tensors, strict=True)),
        inputs=values(graph.inputs, other.inputs),
        outputs=values(graph.outputs, other.outputs),
        values=values(graph.values, other.values),
    )
    assert filled(parametrised, other_numbers) == other, f"{graph.name}.onnx differs in more than sizes"
    return parametrised


def filled(graph: Graph, numbers: Mapping[str, Number]) -> Graph:
    """Return a graph with the values of its parameters, as `template` returns it for a model of these sizes."""

    def values(those: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(replace(one, dims=tuple(size_of(size, numbers) for size in one.dims)) for one in those)

    tensors = [
        replace(
            tensor,
            dims=tuple(size_of(size, numbers) for size in tensor.dims),
            of=bytes_of(tensor.of, tensor.kind, numbers).hex() if tensor.of.startswith(PARAMETER) else tensor.of,
        )
        for tensor in graph.tensors
    ]
    return replace(
        graph,
        nodes=patched_nodes(graph, numbers),
        patches=(),
        tensors=tuple(tensors),
        inputs=values(graph.inputs),
        outputs=values(graph.outputs),
        values=values(graph.values),
    )


def _patches(
    graph: Graph, theirs: bytes, numbers: Mapping[str, Number], other_numbers: Mapping[str, Number]
) -> tuple[Patch, ...]:
    """Return the places in the nodes where a parameter stands."""
    mine, patches, checked = graph.nodes, [], 0
    assert len(mine) == len(theirs), f"the nodes of {graph.name}.onnx have another length for another size"
    for i in range(len(mine)):
        if i < checked or mine[i] == theirs[i]:
            continue
        places = [
            (Patch(start, kind, PARAMETER + name), start + len(a))
            for name in numbers
            for kind in (INT64, FLOAT32, FLOAT16)
            if isinstance(numbers[name], int if kind == INT64 else float)
            for a, b in [(bytes_of(name, kind, numbers), bytes_of(name, kind, other_numbers))]
            for start in range(max(checked, i + 1 - len(a)), i + 1)
            if mine[start : start + len(a)] == a and theirs[start : start + len(b)] == b
        ]
        assert len(places) == 1, f"byte {i} of the nodes of {graph.name}.onnx depends on a size in an unknown way"
        patch, checked = places[0]
        patches.append(patch)
    return tuple(patches)

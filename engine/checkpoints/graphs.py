"""Graph sets: the graphs of an architecture without weights, from which a checkpoint becomes a bundle without torch.

A set holds what the export's tracer makes of an architecture: nodes, names, and the weights that each graph needs.
Sizes that a checkpoint decides (image size, vocabulary) are parameters, filled in at conversion. The wheel carries the
sets of `engine/checkpoints/graphs`; `python -m export.graphsets` writes them.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.bundle.onnx import DTYPES
from engine.errors import CheckpointError

Number = int | float | tuple[float, ...]
"""Value of a parameter."""
Size = int | str
"""A size, a parameter ("$vocab_size"), or in a Value the name of a dynamic axis ("images")."""

PARAMETER = "$"
"""First character of a parameter's name where a size or a value is expected."""
WEIGHT, QUANTISED, INPUTS_FIRST, SCALE, VALUE = "weight", "int8", "int8, inputs first", "scale", "value"
"""What a tensor of a graph holds: a weight, its quantised values, their scales, or a value that is known.

A quantised weight is stored as [inputs,outputs]. INPUTS_FIRST marks one that the checkpoint stores so, too.
"""


@dataclass(frozen=True)
class Tensor:
    """An initialiser. `of` is the checkpoint's name of the weight; for VALUE hexadecimal bytes, or a parameter."""

    name: str
    kind: int
    dims: tuple[Size, ...]
    holds: str
    of: str

    def __post_init__(self) -> None:
        if self.kind not in DTYPES or self.holds not in (WEIGHT, QUANTISED, INPUTS_FIRST, SCALE, VALUE):
            raise ValueError(f"the tensor {self.name} is not known")


@dataclass(frozen=True)
class Value:
    """Name, element type and sizes of an input or output of a graph, or of a tensor inside it."""

    name: str
    kind: int
    dims: tuple[Size, ...]


@dataclass(frozen=True)
class Patch:
    """A number within the nodes that a parameter decides: byte offset, element type, parameter."""

    offset: int
    kind: int
    value: str


@dataclass(frozen=True)
class Graph:
    """A graph without weights.

    `model` and `nodes` are serialised protobuf: the fields of ModelProto other than its graph, and the nodes. The
    weights are stored in the file `data`, which the split decoder shares with the whole one.
    """

    name: str
    title: str
    data: str
    model: bytes
    nodes: bytes
    patches: tuple[Patch, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    values: tuple[Value, ...]


@dataclass(frozen=True)
class GraphSet:
    """The graphs of an architecture in one precision.

    `shape` is what a checkpoint's configuration must say (Checkpoint.shape). `tied` are names of weights that must be
    equal to others, which the graphs use instead. `made_by` identifies the code of the export that made the graphs, see
    export/graphsets.py.
    """

    architecture: str
    family: str
    precision: str
    shape: Mapping[str, int | float | str]
    made_by: str
    tied: Mapping[str, str]
    graphs: tuple[Graph, ...]

    @cached_property
    def version(self) -> str:
        """12 digits that change with any content of the set."""
        return version_of(self.to_bytes())

    @property
    def weights(self) -> dict[str, tuple[Size, ...]]:
        """Names and sizes of the checkpoint's weights that the graphs need, in the order of the files."""
        needed = {}
        for tensor in (tensor for graph in self.graphs for tensor in graph.tensors):
            if tensor.holds in (WEIGHT, QUANTISED, INPUTS_FIRST):
                needed[tensor.of] = tensor.dims[::-1] if tensor.holds == QUANTISED else tensor.dims
        return needed

    def to_bytes(self) -> bytes:
        """Return the set as a line of JSON, followed by the protobuf of its graphs."""
        blobs = [blob for graph in self.graphs for blob in (graph.model, graph.nodes)]
        head = asdict(self)
        for graph, *sizes in zip(head["graphs"], map(len, blobs[::2]), map(len, blobs[1::2]), strict=True):
            graph["model"], graph["nodes"] = sizes
        return json.dumps(head, sort_keys=True, separators=(",", ":")).encode() + b"\n" + b"".join(blobs)

    @classmethod
    def from_bytes(cls, content: bytes) -> GraphSet:
        """Read what to_bytes returns. Raises ValueError, KeyError or TypeError if it is anything else."""
        head, _, blobs = content.partition(b"\n")
        start, raw = 0, json.loads(head)
        for graph in raw["graphs"]:
            for name in ("model", "nodes"):
                end = start + graph[name]
                graph[name], start = blobs[start:end], end
            graph["patches"] = tuple(Patch(**patch) for patch in graph["patches"])
            graph["tensors"] = tuple(Tensor(**tensor | {"dims": tuple(tensor["dims"])}) for tensor in graph["tensors"])
            for name in ("inputs", "outputs", "values"):
                graph[name] = tuple(Value(**value | {"dims": tuple(value["dims"])}) for value in graph[name])
        if start != len(blobs):
            raise ValueError("it has another length than it says")
        return cls(**raw | {"graphs": tuple(Graph(**graph) for graph in raw["graphs"])})


def version_of(content: bytes) -> str:
    """Return GraphSet.version of a set as to_bytes writes it."""
    return hashlib.sha256(content).hexdigest()[:12]


SUFFIX = ".graphs"
"""Suffix of a file that holds a graph set, compressed."""
EXTRA_GRAPHS = "ENGINE_GRAPHS"
"""Environment variable: a folder of further graph sets.

It opens no door: whoever sets a process's environment can also set PYTHONPATH. Bundles are checked when they are opened
as any other, whatever set they come from.
"""


def shipped_graphs() -> Path:
    """Return the folder of the graph sets in the package."""
    return Path(__file__).parent / "graphs"


def save_graphs(graphs: GraphSet, folder: Path) -> Path:
    """Write a graph set into a folder and return its file. A file with the same content is not written again."""
    path = folder / f"{graphs.architecture.lower()}-{graphs.precision}{SUFFIX}"
    content = graphs.to_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    # compared before compression: another release of liblzma may compress to other bytes
    if not path.is_file() or lzma.decompress(path.read_bytes()) != content:
        path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    return path


def _load(path: Path) -> GraphSet:
    try:
        return GraphSet.from_bytes(lzma.decompress(path.read_bytes()))
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a graph set of this release ({error}): install the engine again"
        ) from error


def graph_files(precision: str = "*") -> list[Path]:
    """Return the files of the graph sets in the package, and then of those in the folder ENGINE_GRAPHS."""
    extra = os.environ.get(EXTRA_GRAPHS)
    folders = (shipped_graphs(), *([Path(extra)] if extra else []))
    return [path for folder in folders for path in sorted(folder.glob(f"*-{precision}{SUFFIX}"))]


def known_graphs(precision: str = "*") -> Iterator[GraphSet]:
    """Yield the graph sets of all precisions, or of one."""
    return map(_load, graph_files(precision))


def known_versions(precision: str) -> set[str]:
    """Return GraphSet.version of the sets of a precision, without the time to parse and write them."""
    return {version_of(lzma.decompress(path.read_bytes())) for path in graph_files(precision)}


def known_architectures() -> list[tuple[str, tuple[str, ...]]]:
    """Return the names of all architectures that can be converted, each with its precisions."""
    known: dict[str, tuple[str, ...]] = {}
    for graphs in known_graphs():
        known[graphs.architecture] = (*known.get(graphs.architecture, ()), graphs.precision)
    return sorted(known.items())


def find_graphs(family: str, shape: Mapping[str, int | float | str], precision: str) -> GraphSet:
    """Return the graph set for a checkpoint's family and sizes. Raises CheckpointError if it does not exist."""
    known = []
    for graphs in known_graphs(precision):
        if graphs.family == family and graphs.shape == shape:
            return graphs
        known.append(graphs)
    listed = ", ".join(sorted(graphs.architecture for graphs in known)) or "nothing"
    closest = min(
        (one for one in known if one.family == family), key=lambda one: len(_differing(one, shape)), default=None
    )
    reason = f"there are no graphs of its family {family!r} in {precision}"
    if closest:
        differing = _differing(closest, shape)
        few = ", ".join(f"{name} {shape.get(name)!r} instead of {closest.shape.get(name)!r}" for name in differing[:3])
        reason = f"its sizes are not those of {closest.architecture}: {few}"
    raise CheckpointError(
        f"this checkpoint cannot be converted without torch, because {reason}. The engine has graphs for {listed}; "
        "export it with `python -m export`"
    )


def _differing(graphs: GraphSet, shape: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {**graphs.shape, **shape} if graphs.shape.get(name) != shape.get(name))


def size_of(size: Size, numbers: Mapping[str, Number]) -> int | str:
    """Return a size with parameters filled in: a number, or the name of a dynamic axis."""
    if isinstance(size, str) and size.startswith(PARAMETER):
        number = numbers[size.removeprefix(PARAMETER)]
        assert isinstance(number, int), f"{size} is not a size"
        return number
    return size


def bytes_of(parameter: str, kind: int, numbers: Mapping[str, Number]) -> bytes:
    """Return a parameter's value as little-endian bytes."""
    value = np.asarray(numbers[parameter.removeprefix(PARAMETER)], DTYPES[kind])
    return value.astype(value.dtype.newbyteorder("<")).tobytes()


def patched_nodes(graph: Graph, numbers: Mapping[str, Number]) -> bytes:
    """Return a graph's serialised nodes with the values of parameters."""
    nodes = bytearray(graph.nodes)
    for patch in graph.patches:
        value = bytes_of(patch.value, patch.kind, numbers)
        nodes[patch.offset : patch.offset + len(value)] = value
    return bytes(nodes)

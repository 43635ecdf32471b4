"""The graphs of a bundle: their names, and those of their inputs and outputs; for shapes see export/graphs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

GRAPHS = ("encoder", "decoder", "regroup")
LOG_PROBS, CHOICE = "log_probs", "choice"
"""The decoder in two graphs, for bundles that caption together: up to the log-probabilities, and from them on."""
HALVES = (LOG_PROBS, CHOICE)

STEP_INPUTS: dict[str, type[np.generic]] = {
    "input_ids": np.int64,
    "positions": np.int64,
    "scores": np.float32,
    "marked_ids": np.int64,
    "penalties": np.float32,
    "ancestry": np.bool_,
}
"""Inputs of the decoder that come from the host at every step, see engine.decoding.backend.StepInputs."""
WITH_PENALTIES = 2
"""The first format of bundles whose decoder knows penalties; before, marked ids are `banned_ids` and nothing else."""
FED, CHOSEN_BY = ("input_ids", "positions", "ancestry"), ("scores", "marked_ids", "penalties")
"""Of these inputs, those that log-probabilities depend on, and those that candidates are chosen by."""
NUM_CANDIDATES = "num_candidates"
CANDIDATES = ("candidate_scores", "candidate_ids")
"""Outputs of the decoder that go to the host."""


def cache_names(num_layers: int, part: str) -> list[str]:
    """Return the names of the 2L key and value tensors of a part of the cache: cross, settled, recent, and as outputs
    extended (recent ones with the new) and regrouped.
    """
    return [f"{part}.{kind}.{i}" for i in range(num_layers) for kind in ("key", "value")]


def step_inputs(bundle_format: int) -> dict[str, str]:
    """Return name of a decoder's input -> name of the field of StepInputs, for a format of bundles."""
    if bundle_format >= WITH_PENALTIES:
        return {name: name for name in STEP_INPUTS}
    return {"banned_ids" if name == "marked_ids" else name: name for name in STEP_INPUTS if name != "penalties"}


def graph_inputs(num_layers: int, bundle_format: int) -> dict[str, list[str]]:
    """Return graph -> the names of its inputs."""
    past = cache_names(num_layers, "settled") + cache_names(num_layers, "recent")
    keys = [*cache_names(num_layers, "cross"), *past]
    return {
        "encoder": ["pixel_values"],
        "decoder": [*step_inputs(bundle_format), NUM_CANDIDATES, *keys],
        "regroup": ["slots", "columns", *past],
        LOG_PROBS: [*FED, *keys],
        CHOICE: [LOG_PROBS, *CHOSEN_BY, NUM_CANDIDATES],
    }


def graph_outputs(num_layers: int) -> dict[str, list[str]]:
    """Return graph -> the names of its outputs."""
    return {
        "encoder": cache_names(num_layers, "cross"),
        "decoder": [*CANDIDATES, *cache_names(num_layers, "extended")],
        "regroup": cache_names(num_layers, "regrouped"),
        LOG_PROBS: [LOG_PROBS, *cache_names(num_layers, "extended")],
        CHOICE: [*CANDIDATES],
    }


def may_loop(model: bytes) -> bool:
    """Return whether an ONNX file holds a node with a graph of its own (Loop, If, Scan), or functions.

    No graph of a bundle needs one, and an endless Loop hangs the process when it is opened. Only as much of protobuf is
    read as this needs, by the field numbers of onnx.proto. Raises ValueError for another file.
    """
    for field, part in _fields(memoryview(model)):
        if field == 25:  # ModelProto.functions
            return True
        for node in _parts(part, 1) if field == 7 else ():  # ModelProto.graph, GraphProto.node
            for attribute in _parts(node, 5):
                if any(number in (6, 11) for number, _ in _fields(attribute)):  # AttributeProto.g and .graphs
                    return True
    return False


def _parts(message: memoryview, field: int) -> Iterator[memoryview]:
    return (part for number, part in _fields(message) if number == field)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of the fields of a protobuf message that have a length: messages, strings, bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = 0
        for shift in range(0, 70, 7):
            if position >= len(message):
                break
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number that does not end")

    while position < len(message):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of kind {kind}")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if position + size > len(message):
            raise ValueError("a field beyond the end")
        if kind == 2:
            yield number, message[position : position + size]
        position += size

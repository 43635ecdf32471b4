"""The graphs of a bundle: their names, and those of their inputs and outputs; for shapes see export/graphs."""

from __future__ import annotations

import numpy as np

GRAPHS = ("encoder", "decoder", "regroup")

STEP_INPUTS: dict[str, type[np.generic]] = {
    "input_ids": np.int64,
    "positions": np.int64,
    "scores": np.float32,
    "banned_ids": np.int64,
    "ancestry": np.bool_,
}
"""Inputs of the decoder that come from the host at every step, see engine.decoding.backend.StepInputs."""
NUM_CANDIDATES = "num_candidates"
CANDIDATES = ("candidate_scores", "candidate_ids")
"""Outputs of the decoder that go to the host."""


def cache_names(num_layers: int, part: str) -> list[str]:
    """Return the names of the 2L key and value tensors of a part of the cache: cross, settled, recent, and as outputs
    extended (recent ones with the new) and regrouped.
    """
    return [f"{part}.{kind}.{i}" for i in range(num_layers) for kind in ("key", "value")]


def graph_inputs(num_layers: int) -> dict[str, list[str]]:
    """Return graph -> the names of its inputs."""
    past = cache_names(num_layers, "settled") + cache_names(num_layers, "recent")
    return {
        "encoder": ["pixel_values"],
        "decoder": [*STEP_INPUTS, NUM_CANDIDATES, *cache_names(num_layers, "cross"), *past],
        "regroup": ["slots", "columns", *past],
    }


def graph_outputs(num_layers: int) -> dict[str, list[str]]:
    """Return graph -> the names of its outputs."""
    return {
        "encoder": cache_names(num_layers, "cross"),
        "decoder": [*CANDIDATES, *cache_names(num_layers, "extended")],
        "regroup": cache_names(num_layers, "regrouped"),
    }

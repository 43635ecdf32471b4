"""The bundle's own graphs on OpenVINO, as one more Backend under the engine's scheduler; for the benchmark only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.ort import CPU_BATCH_SIZES
from engine.bundle.graphs import GRAPHS, cache_names, step_inputs
from engine.bundle.manifest import Bundle
from engine.decoding.backend import BatchSizes, StepInputs
from engine.host import available_cores


@dataclass
class OpenVinoCache:
    """Keys and values of B slots, arrays [B,H,positions,d] alternating by layer."""

    cross: list[NDArray[np.float32]]
    settled: list[NDArray[np.float32]]
    recent: list[NDArray[np.float32]]


class OpenVinoBackend:
    """Two requests of the decoder take turns, so that one's outputs can be the other's inputs without a copy."""

    name = "openvino"
    batch_sizes: BatchSizes = CPU_BATCH_SIZES

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        import openvino

        self._ov = openvino
        self._model = bundle.model
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads or available_cores(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = {
            graph: core.compile_model(core.read_model(bundle.path / f"{graph}.onnx"), "CPU", settings)
            for graph in GRAPHS
        }
        self._encoder = compiled["encoder"].create_infer_request()
        self._regroup = compiled["regroup"].create_infer_request()
        self._decoders = [compiled["decoder"].create_infer_request() for _ in range(2)]
        self._step_inputs = step_inputs(bundle.format)
        self._names = {
            part: cache_names(bundle.model.num_layers, part)
            for part in ("cross", "settled", "recent", "extended", "regrouped")
        }

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """See Backend.encode."""
        self._infer(self._encoder, {"pixel_values": pixel_values})
        return [self._encoder.get_tensor(name).data for name in self._names["cross"]]

    def allocate(self, num_slots: int) -> OpenVinoCache:
        """See Backend.allocate."""
        model = self._model
        shape = (num_slots, model.num_heads, model.encoder_positions, model.head_width)
        cross = [np.zeros(shape, np.float32) for _ in self._names["cross"]]
        return OpenVinoCache(cross, self._empty(num_slots), self._empty(num_slots))

    def admit(self, cache: OpenVinoCache, slot: int, encoded: list[NDArray[np.float32]], image: int) -> None:
        """See Backend.admit."""
        for array, new in zip(cache.cross, encoded, strict=True):
            array[slot] = new[image]

    def step(self, cache: OpenVinoCache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step."""
        self._decoders.reverse()
        request = self._decoders[0]
        feed = {
            **{name: getattr(inputs, field) for name, field in self._step_inputs.items()},
            "num_candidates": np.array([inputs.num_candidates], np.int64),
            **dict(zip(self._names["cross"], cache.cross, strict=True)),
            **dict(zip(self._names["settled"], cache.settled, strict=True)),
            **dict(zip(self._names["recent"], cache.recent, strict=True)),
        }
        self._infer(request, feed)
        cache.recent = [request.get_tensor(name).data for name in self._names["extended"]]
        scores, ids = (request.get_tensor(name).data.copy() for name in ("candidate_scores", "candidate_ids"))
        return scores, ids

    def regroup(self, cache: OpenVinoCache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        if columns.size:
            feed = {
                "slots": slots,
                "columns": columns,
                **dict(zip(self._names["settled"], cache.settled, strict=True)),
                **dict(zip(self._names["recent"], cache.recent, strict=True)),
            }
            self._infer(self._regroup, feed)
            cache.settled = [self._regroup.get_tensor(name).data.copy() for name in self._names["regrouped"]]
        else:
            cache.settled = self._empty(len(slots))
        cache.recent = self._empty(len(slots))
        if len(slots) < len(cache.cross[0]):
            cache.cross = keep_in_place(cache.cross, slots)

    def _empty(self, num_slots: int) -> list[NDArray[np.float32]]:
        nothing = np.zeros((num_slots, self._model.num_heads, 0, self._model.head_width), np.float32)
        return [nothing] * len(self._names["cross"])

    def _infer(self, request: Any, feed: dict[str, NDArray[Any]]) -> None:
        """Run; arrays are lent to the request, which reads their memory."""
        lent = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        for name, array in lent.items():
            request.set_tensor(name, self._ov.Tensor(array, shared_memory=array.size > 0))
        request.infer()


def keep_in_place(arrays: list[NDArray[Any]], slots: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Keep the slots i64[B'] (as in Backend.regroup) of arrays [B,...]: survivors from behind move into the holes.

    Returns views [B',...] of the same memory: fresh memory would cost more than the copies (benchmarks/LOG.md).
    """
    moved = np.flatnonzero(slots != np.arange(len(slots)))
    for array in arrays:
        array[moved] = array[slots[moved]]
    return [array[: len(slots)] for array in arrays]

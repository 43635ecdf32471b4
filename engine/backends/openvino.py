"""The OpenVINO backend, for CPUs. The KV cache is in numpy arrays and in the tensors of two alternating requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.compiled import NAME, compile_graphs, import_openvino, openvino_errors
from engine.backends.ort import CPU_BATCH_SIZES, refuse_rounded_twice
from engine.bundle.manifest import CANDIDATES, NUM_CANDIDATES, Bundle, cache_names, step_inputs
from engine.decoding.backend import BatchSizes, StepInputs
from engine.errors import BundleError
from engine.host import available_cores

FAILED = f"the {NAME} backend failed"


@dataclass
class OpenVinoCache:
    """The KV cache of B slots: flat lists of 2L, keys and values of each layer in turn.

    cross: arrays [B,H,S,d]; settled [B,H,F,d] and recent [B,H,R,d] are OpenVINO tensors. The decoder has two `requests`
    per cache: one reads the recent block that the other wrote, then they swap. This avoids a copy per step.
    """

    cross: list[NDArray[Any]]
    settled: list[Any]
    recent: list[Any]
    requests: list[Any]


class OpenVinoBackend:
    """The bundle's graphs, compiled by OpenVINO for the CPU. Implements Backend."""

    name = NAME
    batch_sizes: BatchSizes = CPU_BATCH_SIZES

    def __init__(self, bundle: Bundle, *, threads: int | None = None, cpu_precision: str = "fp32") -> None:
        """Load the graphs. With `cpu_precision="bf16"` products are rounded and captions may differ from generate's.

        Raises BackendError if OpenVINO is missing, BundleError if the graphs do not match the manifest, UsageError for
        bf16 with an fp16 or int8 bundle.
        """
        refuse_rounded_twice(bundle, cpu_precision)
        self._ov = import_openvino()
        self._model = bundle.model
        self._dtype = np.float16 if bundle.precision == "fp16" else np.float32
        compiled = compile_graphs(bundle, threads or available_cores(), cpu_precision)
        self._decoder = compiled["decoder"]
        self._encoder = compiled["encoder"].create_infer_request()
        self._regroup = compiled["regroup"].create_infer_request()
        self._step_inputs = step_inputs(bundle.format)
        self._names = {
            part: cache_names(bundle.model.num_layers, part)
            for part in ("cross", "settled", "recent", "extended", "regrouped")
        }

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """See Backend.encode. Returns 2L arrays [N,H,S,d]."""
        self._infer(self._encoder, {"pixel_values": self._tensor(pixel_values)})
        # copied, since another iteration over the same captioner may encode before these images are in a slot
        encoded = [self._encoder.get_tensor(name).data.copy() for name in self._names["cross"]]
        shape = self._cross_shape(len(pixel_values))
        for value in encoded:
            if value.shape != shape:
                raise BundleError(f"the encoder returns {value.shape}, but the manifest has {shape}: export it again")
        return encoded

    def allocate(self, num_slots: int) -> OpenVinoCache:
        """See Backend.allocate."""
        cross = [np.zeros(self._cross_shape(num_slots), self._dtype) for _ in self._names["cross"]]
        with openvino_errors(FAILED):
            requests = [self._decoder.create_infer_request() for _ in range(2)]
        return OpenVinoCache(cross, self._nothing(num_slots), self._nothing(num_slots), requests)

    def admit(self, cache: OpenVinoCache, slot: int, encoded: list[NDArray[Any]], image: int) -> None:
        """See Backend.admit."""
        for keys, new in zip(cache.cross, encoded, strict=True):
            keys[slot] = new[image]

    def step(self, cache: OpenVinoCache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step."""
        cache.requests.reverse()
        request = cache.requests[0]
        feed = {
            **{name: self._tensor(getattr(inputs, field)) for name, field in self._step_inputs.items()},
            NUM_CANDIDATES: self._tensor(np.array([inputs.num_candidates], np.int64)),
            **self._named("cross", [self._tensor(keys) for keys in cache.cross]),
            **self._named("settled", cache.settled),
            **self._named("recent", cache.recent),
        }
        self._infer(request, feed)
        cache.recent = [request.get_tensor(name) for name in self._names["extended"]]
        scores, ids = (request.get_tensor(name).data.copy() for name in CANDIDATES)
        return scores, ids

    def regroup(self, cache: OpenVinoCache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        if columns.size:
            feed = {
                "slots": self._tensor(slots),
                "columns": self._tensor(columns),
                **self._named("settled", cache.settled),
                **self._named("recent", cache.recent),
            }
            self._infer(self._regroup, feed)
            kept = (self._regroup.get_tensor(name).data.copy() for name in self._names["regrouped"])
            cache.settled = [self._tensor(keys) for keys in kept]
        else:
            cache.settled = self._nothing(len(slots))
        cache.recent = self._nothing(len(slots))
        if len(slots) < len(cache.cross[0]):
            cache.cross = keep_in_place(cache.cross, slots)

    def _cross_shape(self, num_slots: int) -> tuple[int, ...]:
        return (num_slots, self._model.num_heads, self._model.encoder_positions, self._model.head_width)

    def _nothing(self, num_slots: int) -> list[Any]:
        """Return keys and values of zero positions; all layers share one tensor."""
        shape = (num_slots, self._model.num_heads, 0, self._model.head_width)
        return [self._tensor(np.zeros(shape, self._dtype))] * len(self._names["cross"])

    def _tensor(self, array: NDArray[Any]) -> Any:
        """Return an OpenVINO tensor that shares the array's memory and keeps it alive; empty arrays are copied."""
        array = np.ascontiguousarray(array)
        return self._ov.Tensor(array, shared_memory=array.size > 0)

    def _named(self, part: str, values: list[Any]) -> dict[str, Any]:
        return dict(zip(self._names[part], values, strict=True))

    def _infer(self, request: Any, feed: dict[str, Any]) -> None:
        with openvino_errors(FAILED):
            for name, tensor in feed.items():
                request.set_tensor(name, tensor)
            request.infer()


def keep_in_place(arrays: list[NDArray[Any]], slots: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Keep the slots i64[B'] (see Backend.regroup) of arrays [B,...]: the last slots in use fill the holes in place.

    Returns views [B',...] of the same memory. Allocating new memory costs more than the copies (benchmarks/LOG.md).
    """
    moved = np.flatnonzero(slots != np.arange(len(slots)))
    for array in arrays:
        array[moved] = array[slots[moved]]
    return [array[: len(slots)] for array in arrays]

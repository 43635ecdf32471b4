"""Run several bundles as one backend: candidates are chosen by the weighted mean of their log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.ort import OrtBackend, OrtCache, check_graphs, open_session, ort_errors
from engine.backends.providers import CPU, import_libraries
from engine.bundle.manifest import CANDIDATES, CHOICE, CHOICE_INPUTS, LOG_PROBS, NUM_CANDIDATES, Bundle
from engine.bundle.open import shares
from engine.decoding.backend import BatchSizes, StepInputs
from engine.errors import BundleError
from engine.host import available_cores


class EnsembleBackend:
    """The bundles of an ensemble, each with its own KV cache. Implements FillableBackend.

    mean f32[B,T,V] = sum of weight * log-probabilities, added in the order of the bundles, replaces the logits. The
    rest of a step (log_softmax, penalties, bans, the best candidates) is a graph of the first bundle that runs on the
    CPU. `Encoded` and `Cache` handles are lists with one entry per bundle.
    """

    def __init__(
        self, bundle: Bundle, name: str = "cpu", *, threads: int | None = None, cpu_precision: str = "fp32"
    ) -> None:
        """Load the graphs of all members. Raises as OrtBackend does."""
        self.name = name
        self._weights = [np.float32(weight) for weight in shares(bundle.weights)]
        self._members = [
            OrtBackend(member, name, threads=threads, cpu_precision=cpu_precision, decoder=LOG_PROBS)
            for member in bundle.members
        ]
        self._vocab_size = bundle.model.vocab_size
        self.batch_sizes: BatchSizes = smallest([member.batch_sizes for member in self._members])
        first, ort = bundle.members[0], import_libraries(name)
        path, threads = first.path / f"{CHOICE}.onnx", threads or available_cores()
        as_written = open_session(ort, path, [(CPU, {})], threads, is_optimised=False, has_patterns=True)
        check_graphs(first, {CHOICE: as_written})
        self._choice = open_session(ort, path, [(CPU, {})], threads, is_optimised=True, has_patterns=True)

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[list[Any]]:
        """See Backend.encode."""
        return [member.encode(pixel_values) for member in self._members]

    def allocate(self, num_slots: int, settled: int = 0) -> list[OrtCache]:
        """See FillableBackend.allocate."""
        return [member.allocate(num_slots, settled) for member in self._members]

    def set_recent(self, cache: list[OrtCache], recent: int) -> None:
        """See FillableBackend.set_recent."""
        for member, member_cache in zip(self._members, cache, strict=True):
            member.set_recent(member_cache, recent)

    def admit(self, cache: list[OrtCache], slot: int, encoded: list[list[Any]], image: int) -> None:
        """See Backend.admit."""
        for member, member_cache, values in zip(self._members, cache, encoded, strict=True):
            member.admit(member_cache, slot, values, image)

    def step(
        self, cache: list[OrtCache], inputs: StepInputs, at: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See FillableBackend.step."""
        shape = (*inputs.input_ids.shape, self._vocab_size)
        mean = np.zeros(shape, np.float32)
        for member, member_cache, weight in zip(self._members, cache, self._weights, strict=True):
            log_probs = member.log_probs(member_cache, inputs, at)
            if log_probs.shape != shape:
                raise BundleError(f"a decoder returns {log_probs.shape} instead of {shape}: export its bundle again")
            np.multiply(log_probs, weight, out=log_probs)
            mean += log_probs
        feed = {name: np.ascontiguousarray(getattr(inputs, name)) for name in CHOICE_INPUTS}
        feed |= {LOG_PROBS: mean, NUM_CANDIDATES: np.array([inputs.num_candidates], np.int64)}
        with ort_errors(self.name):
            scores, ids = self._choice.run([*CANDIDATES], feed)
        return scores, ids

    def regroup(
        self,
        cache: list[OrtCache],
        slots: NDArray[np.int64],
        columns: NDArray[np.int64],
        *,
        keep_recent: bool = False,
    ) -> None:
        """See FillableBackend.regroup."""
        for member, member_cache in zip(self._members, cache, strict=True):
            member.regroup(member_cache, slots, columns, keep_recent=keep_recent)


def smallest(sizes: list[BatchSizes]) -> BatchSizes:
    """Return batch sizes that suit several backends on one device: the smallest of each, and the least free memory."""
    first = min(sizes, key=lambda size: size.rows)
    slots = [size.slots for size in sizes if size.slots is not None]
    memory = [size.memory_bytes for size in sizes if size.memory_bytes is not None]
    return replace(
        first,
        encode_batch=min(size.encode_batch for size in sizes),
        slots=min(slots, default=None),
        memory_bytes=min(memory, default=None),
        item_bytes=max(size.item_bytes for size in sizes),
    )

"""Run several bundles as one backend: candidates are chosen by the weighted mean of their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.ort import OrtBackend, check_graphs, open_session, ort_errors
from engine.backends.providers import CPU, import_libraries
from engine.bundle.manifest import CANDIDATES, CHOICE, CHOICE_INPUTS, LOG_PROBS, NUM_CANDIDATES, Bundle
from engine.bundle.open import shares
from engine.decoding.backend import BatchSizes, StepInputs
from engine.errors import BundleError
from engine.host import available_cores
from engine.runtime import Runtime

Candidates = tuple[NDArray[np.float32], NDArray[np.int64]]
Choose = Callable[[Any, StepInputs], Candidates]
"""The second half of the split decoder: (mean log-probabilities f32[B,T,V], inputs) -> see Backend.step."""


class EnsembleBackend:
    """The bundles of an ensemble, each with its own KV cache. Implements FillableBackend.

    mean f32[B,T,V] = sum of weight * log-probabilities, added in the order of the bundles, replaces the logits. The
    rest of a step (log_softmax, penalties, bans, the best candidates) is a graph of the first bundle: with ONNX Runtime
    it runs on the CPU, with torch on the device. `Encoded` and `Cache` handles are lists with one entry per bundle.
    """

    def __init__(self, bundle: Bundle, members: Sequence[Any], choose: Choose) -> None:
        """Combine the open backends of the bundle's members, whose steps end at log-probabilities."""
        self.name: str = members[0].name
        self._weights = [float(np.float32(weight)) for weight in shares(bundle.weights)]
        self._members = members
        self._vocab_size = bundle.model.vocab_size
        self.batch_sizes: BatchSizes = smallest([member.batch_sizes for member in members])
        self._choose = choose

    @classmethod
    def load(cls, bundle: Bundle, runtime: Runtime) -> EnsembleBackend:
        """Load the graphs of all members. Raises as OrtBackend or TorchBackend do."""
        first, name = bundle.members[0], runtime.backend
        if name == "torch":
            from engine.backends.torch import TorchBackend, open_choice

            torches = [TorchBackend.load(member, runtime, decoder=LOG_PROBS) for member in bundle.members]
            return cls(bundle, torches, open_choice(first, runtime))
        members = [
            OrtBackend(member, name, threads=runtime.threads, cpu_precision=runtime.cpu_precision, decoder=LOG_PROBS)
            for member in bundle.members
        ]
        return cls(bundle, members, _choice_of_ort(first, name, runtime.threads or available_cores()))

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[list[Any]]:
        """See Backend.encode."""
        return [member.encode(pixel_values) for member in self._members]

    def allocate(self, num_slots: int, settled: int = 0) -> list[Any]:
        """See FillableBackend.allocate."""
        return [member.allocate(num_slots, settled) for member in self._members]

    def set_recent(self, cache: list[Any], recent: int) -> None:
        """See FillableBackend.set_recent."""
        for member, member_cache in zip(self._members, cache, strict=True):
            member.set_recent(member_cache, recent)

    def admit(self, cache: list[Any], slot: int, encoded: list[list[Any]], image: int) -> None:
        """See Backend.admit."""
        for member, member_cache, values in zip(self._members, cache, encoded, strict=True):
            member.admit(member_cache, slot, values, image)

    def step(self, cache: list[Any], inputs: StepInputs, at: int | None = None) -> Candidates:
        """See FillableBackend.step."""
        shape, mean = (*inputs.input_ids.shape, self._vocab_size), None
        for member, member_cache, weight in zip(self._members, cache, self._weights, strict=True):
            log_probs = member.log_probs(member_cache, inputs, at)  # an array, or a tensor of torch
            if log_probs.shape != shape:
                found = tuple(log_probs.shape)
                raise BundleError(f"a decoder returns {found} instead of {shape}: export its bundle again")
            weighted = log_probs * weight  # not in place, which torch refuses outside of its inference mode
            if mean is None:
                mean = weighted
            else:
                mean += weighted
        return self._choose(mean, inputs)

    def regroup(
        self,
        cache: list[Any],
        slots: NDArray[np.int64],
        columns: NDArray[np.int64],
        *,
        keep_recent: bool = False,
    ) -> None:
        """See FillableBackend.regroup."""
        for member, member_cache in zip(self._members, cache, strict=True):
            member.regroup(member_cache, slots, columns, keep_recent=keep_recent)


def _choice_of_ort(bundle: Bundle, name: str, threads: int) -> Choose:
    """Return the second half of the split decoder, on the CPU."""
    path, ort = bundle.path / f"{CHOICE}.onnx", import_libraries(name)
    as_written = open_session(ort, path, [(CPU, {})], threads, is_optimised=False, has_patterns=True)
    check_graphs(bundle, {CHOICE: as_written})
    session = open_session(ort, path, [(CPU, {})], threads, is_optimised=True, has_patterns=True)

    def choose(mean: NDArray[np.float32], inputs: StepInputs) -> Candidates:
        feed = {field: np.ascontiguousarray(getattr(inputs, field)) for field in CHOICE_INPUTS}
        feed |= {LOG_PROBS: mean, NUM_CANDIDATES: np.array([inputs.num_candidates], np.int64)}
        with ort_errors(name):
            scores, ids = session.run([*CANDIDATES], feed)
        return scores, ids

    return choose


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

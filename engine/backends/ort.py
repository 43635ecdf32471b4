"""ONNX Runtime as a backend, on the CPU or on a GPU: what differs is data (providers.py) and whose memory it is.

Keys and values stay on the device, bound to the graphs by address; only candidates come back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.device import CudaDevice, Device, HostDevice
from engine.backends.providers import CPU, KINDS, Provider, bounds_for, import_libraries, providers_for
from engine.backends.sessions import check_graphs, open_session, refuse_rounded_twice
from engine.backends.shapes import gpu_batch_sizes
from engine.bundle.graphs import (
    CANDIDATES,
    FED,
    LOG_PROBS,
    NUM_CANDIDATES,
    cache_names,
    step_inputs,
)
from engine.bundle.manifest import Bundle
from engine.decoding.backend import BatchSizes, StepInputs
from engine.errors import BackendError, BundleError, OutOfMemoryError
from engine.host import available_cores

CPU_BATCH_SIZES = BatchSizes(rows=160, encode_batch=2)
"""Measured on 2 cores (benchmarks/LOG.md): more rows bring a few percent at most, larger batches miss the cache."""

OUT_OF_MEMORY = ("failed to allocate", "bad_alloc", "bad allocation", "out of memory", "available memory")
"""What ONNX Runtime's message holds, in lower case, when memory is short; it has no error code for that."""
Places = dict[str, tuple[Any, tuple[int, ...]]]
"""Input -> memory on the device, and the shape of what is fed of it."""
OTHER_BACKEND = "give fewer --beams, --rows or --max-new-tokens, or take --backend cuda or trt"


@dataclass
class OrtCache:
    """Keys and values of B slots, a pair (keys, values) a layer in each flat list of 2L OrtValues on the device.

    cross: [B0,H,S,d], B0 >= B slots of which the first B are in use; `admit` overwrites them in place.
    settled [B,H,F,d] and recent [B,H,R,d]; with `fixed_recent`, R, recent is [B0,H,R,d] like cross.
    """

    num_slots: int
    cross: list[Any]
    settled: list[Any]
    recent: list[Any]
    fixed_recent: int | None = None


class OrtBackend:
    """The bundle's graphs in three ONNX Runtime sessions.

    With `decoder` log_probs a step ends at the log-probabilities, and `log_probs` stands in for `step`.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str = "cpu",
        *,
        threads: int | None = None,
        cpu_precision: str = "fp32",
        decoder: str = "decoder",
    ) -> None:
        """Load the graphs. Raises BackendError when ONNX Runtime or the wanted provider is not there.

        Ask require_backend first: a GPU's absence is found out there, and that of instructions for bf16.
        """
        refuse_rounded_twice(bundle, cpu_precision)
        self._is_bf16 = cpu_precision == "bf16"
        self.name = name
        self._bounds = bounds_for(name, bundle)
        self._ort = import_libraries(name)
        self._device: Device = HostDevice() if KINDS[name].device == "cpu" else CudaDevice()
        self.batch_sizes = CPU_BATCH_SIZES
        if self._device.name != "cpu":
            self.batch_sizes = gpu_batch_sizes(bundle, self._device.free_bytes(), self._bounds)
        self._model = bundle.model
        is_host = self._device.name == "cpu"
        threads = (threads or available_cores()) if is_host else 1  # beside a GPU the CPU only computes shapes
        self._step_inputs = {
            name: field for name, field in step_inputs(bundle.format).items() if decoder != LOG_PROBS or field in FED
        }
        graphs = ("encoder", decoder, "regroup")
        self._names = {
            part: cache_names(bundle.model.num_layers, part)
            for part in ("cross", "settled", "recent", "extended", "regrouped")
        }
        # as they are: optimising runs parts of a graph, and these are not known to be the manifest's yet
        as_written: dict[str, list[Provider]] = {graph: [(CPU, {})] for graph in graphs}
        check_graphs(bundle, self._open(bundle, threads, as_written, is_optimised=False))
        chosen = {graph: providers_for(name, bundle, graph, self._bounds) for graph in graphs}
        sessions = self._open(bundle, threads, chosen, is_optimised=True)
        self._encoder, self._decoder, self._regroup = sessions.values()
        self._dtype: type[np.float16] | type[np.float32] = np.float16 if bundle.precision == "fp16" else np.float32
        model = bundle.model
        self._slot_shape = (model.num_heads, model.encoder_positions, model.head_width)
        self._slot_bytes = int(np.prod(self._slot_shape)) * np.dtype(self._dtype).itemsize

    def _open(
        self, bundle: Bundle, threads: int, providers: dict[str, list[Provider]], *, is_optimised: bool
    ) -> dict[str, Any]:
        """Open the encoder, the decoder and regroup."""
        return {
            graph: open_session(
                self._ort,
                bundle.path / f"{graph}.onnx",
                chosen,
                threads,
                is_optimised=is_optimised,
                is_bf16=self._is_bf16,
                has_patterns=self._device.name == "cpu" or graph == "encoder",
            )
            for graph, chosen in providers.items()
        }

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[Any]:
        """See Backend.encode; 2L OrtValues [N,H,S,d] on the device."""
        encoded = self._run(self._encoder, {"pixel_values": self._value(pixel_values)}, [], self._names["cross"])
        shape = (len(pixel_values), *self._slot_shape)
        for value in encoded:
            if tuple(value.shape()) != shape:
                raise BundleError(f"the encoder gives {value.shape()} where its manifest says {shape}: export it again")
        return encoded

    def allocate(self, num_slots: int, settled: int = 0) -> OrtCache:
        """See FillableBackend.allocate."""
        if self._bounds is not None:
            self._bounds.refuse_beyond(OTHER_BACKEND, slots=num_slots)
        cross = [self._on_device(np.zeros((num_slots, *self._slot_shape), self._dtype)) for _ in self._names["cross"]]
        return OrtCache(num_slots, cross, self._zeros(num_slots, settled), self._zeros(num_slots, 0))

    def set_recent(self, cache: OrtCache, recent: int) -> None:
        """See FillableBackend.set_recent."""
        shape = (cache.num_slots, self._model.num_heads, recent, self._model.head_width)
        cache.recent = [self._on_device(np.zeros(shape, self._dtype)) for _ in self._names["recent"]]
        cache.fixed_recent = recent

    def admit(self, cache: OrtCache, slot: int, encoded: list[Any], image: int) -> None:
        """See Backend.admit."""
        for place, new in zip(cache.cross, encoded, strict=True):
            self._copy_slot(place.data_ptr(), slot, new.data_ptr(), image)

    def step(
        self, cache: OrtCache, inputs: StepInputs, at: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See FillableBackend.step."""
        if self._bounds is not None:
            rows, marks = inputs.marked_ids.shape[1:]
            settled = cache.settled[0].shape()[2]
            self._bounds.refuse_beyond(OTHER_BACKEND, beams=rows, marked_ids=marks, settled=settled)
        count = {NUM_CANDIDATES: self._value(np.array([inputs.num_candidates], np.int64))}
        scores, ids = self._decode(cache, inputs, count, [*CANDIDATES], at)
        return scores, ids

    def log_probs(self, cache: OrtCache, inputs: StepInputs, at: int | None = None) -> NDArray[np.float32]:
        """Do a step up to the log-probabilities f32[B,T,V]; what candidates are chosen by is not looked at."""
        (found,) = self._decode(cache, inputs, {}, [LOG_PROBS], at)
        return found

    def _decode(
        self, cache: OrtCache, inputs: StepInputs, more: dict[str, Any], to_host: list[str], at: int | None
    ) -> list[NDArray[Any]]:
        """Run the decoder, which extends the recent keys and values, and return the outputs `to_host`."""
        feed = {
            **{name: self._value(getattr(inputs, field)) for name, field in self._step_inputs.items()},
            **more,
            **self._named("settled", cache.settled),
            **self._growing(cache),
        }
        places = self._cross_places(cache) | self._recent_places(cache)
        found = self._run(self._decoder, feed, to_host, self._names["extended"], places)
        extended = found[len(to_host) :]
        if at is None:
            cache.recent = extended
        else:
            self._keep_newest(cache, extended, at, inputs.input_ids.shape[1])
        return [value.numpy() for value in found[: len(to_host)]]

    def _keep_newest(self, cache: OrtCache, extended: list[Any], at: int, count: int) -> None:
        """Copy the last `count` positions of [B,H,R+count,d] into recent places [B0,H,R,d] from `at` on."""
        assert cache.fixed_recent is not None
        position = self._model.head_width * np.dtype(self._dtype).itemsize
        recent, grown = cache.fixed_recent * position, (cache.fixed_recent + count) * position
        for place, new in zip(cache.recent, extended, strict=True):
            self._device.copy_blocks(
                (place.data_ptr() + at * position, recent),
                (new.data_ptr() + recent, grown),
                count * position,
                cache.num_slots * self._model.num_heads,
            )

    def regroup(
        self, cache: OrtCache, slots: NDArray[np.int64], columns: NDArray[np.int64], *, keep_recent: bool = False
    ) -> None:
        """See FillableBackend.regroup."""
        if columns.size:
            feed = {
                "slots": self._value(slots),
                "columns": self._value(columns),
                **self._named("settled", cache.settled),
                **self._growing(cache),
            }
            cache.settled = self._run(self._regroup, feed, [], self._names["regrouped"], self._recent_places(cache))
        else:
            cache.settled = self._zeros(len(slots), 0)
        if not keep_recent:
            cache.recent = self._zeros(len(slots), 0)
        for slot, source in enumerate(slots.tolist()):
            if slot != source:
                for place in cache.cross:
                    self._copy_slot(place.data_ptr(), slot, place.data_ptr(), source)
        cache.num_slots = len(slots)

    def _copy_slot(self, target: int, slot: int, source: int, image: int) -> None:
        size = self._slot_bytes
        self._device.copy(target + slot * size, source + image * size, size)

    def _zeros(self, num_slots: int, positions: int) -> list[Any]:
        """Return what stands for keys and values of positions that nobody looks at: one for all layers."""
        nothing = np.zeros((num_slots, self._model.num_heads, positions, self._model.head_width), self._dtype)
        return [self._on_device(nothing)] * len(self._names["cross"])

    def _on_device(self, array: NDArray[Any]) -> Any:
        with ort_errors(self.name):
            return self._ort.OrtValue.ortvalue_from_numpy(array, self._device.name, 0)

    def _named(self, part: str, values: list[Any]) -> dict[str, Any]:
        return dict(zip(self._names[part], values, strict=True))

    def _value(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _cross_places(self, cache: OrtCache) -> Places:
        shape = (cache.num_slots, *self._slot_shape)
        return {name: (value, shape) for name, value in self._named("cross", cache.cross).items()}

    def _growing(self, cache: OrtCache) -> dict[str, Any]:
        """Return recent keys and values where they grow with every step."""
        return self._named("recent", cache.recent) if cache.fixed_recent is None else {}

    def _recent_places(self, cache: OrtCache) -> Places:
        """Return recent keys and values where they stay in place."""
        if cache.fixed_recent is None:
            return {}
        shape = (cache.num_slots, self._model.num_heads, cache.fixed_recent, self._model.head_width)
        return {name: (value, shape) for name, value in self._named("recent", cache.recent).items()}

    def _run(
        self, session: Any, feed: dict[str, Any], to_host: list[str], on_device: list[str], places: Places | None = None
    ) -> list[Any]:
        """Run a graph; return OrtValues, those `to_host` first. Of `places` only the first slots are fed."""
        self._device.wait()  # for what was copied: ONNX Runtime works on a stream of its own
        binding, device = session.io_binding(), self._device.name
        with ort_errors(self.name):
            for name, value in feed.items():
                binding.bind_ortvalue_input(name, value)
            for name, (value, shape) in (places or {}).items():
                binding.bind_input(name, device, 0, self._dtype, shape, value.data_ptr())
            for name in to_host:
                binding.bind_output(name, "cpu")
            for name in on_device:
                binding.bind_output(name, device)
            session.run_with_iobinding(binding)
            binding.clear_binding_inputs()  # outputs keep the binding alive, and it would keep the old keys
            return list(binding.get_outputs())


@contextmanager
def ort_errors(name: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises for the backend `name` into our errors."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        kind = OutOfMemoryError if any(sign in reason.lower() for sign in OUT_OF_MEMORY) else BackendError
        raise kind(f"the {name} backend failed: {reason}") from error

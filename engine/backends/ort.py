"""ONNX Runtime as a backend; CPU, CUDA and TensorRT differ only in the provider list, which is data."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Appetite, StepInputs, keep_in_place
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, OutOfMemoryError

CPU: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
CUDA: tuple[str, dict[str, str]] = (
    "CUDAExecutionProvider",
    {"use_tf32": "0"},
)  # torch multiplies float32 without TF32 too
PROVIDERS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "cpu": (CPU,),
    "cuda": (CUDA, CPU),
    "tensorrt": (("TensorrtExecutionProvider", {}), CUDA, CPU),
}
"""Backend name -> ONNX Runtime providers with their options, in order of preference; the first is the one asked for."""

CPU_APPETITE = Appetite(rows=160, encode_batch=2)
"""Measured on 2 cores (benchmarks/LOG.md): more rows bring a few percent at most, larger batches miss the cache."""
GPU_APPETITE = Appetite(rows=1024, encode_batch=16)
"""A guess that has never run: no GPU was at hand."""

FLOAT32_ALWAYS = ("scores", "candidate_scores")
"""Sums along captions, whatever the weights are; keys and values have the precision's own type."""

LOG_ERRORS_ONLY = 3
OUT_OF_MEMORY = ("failed to allocate", "bad_alloc", "bad allocation", "out of memory", "available memory")
"""What ONNX Runtime's message holds, in lower case, when memory is short; it has no error code for that."""
STOP_SPINNING = ("session.force_spinning_stop", "1")
"""Threads of one graph would else spin on the cores the next graph needs: 8 to 20 % of a run (benchmarks/LOG.md)."""


@dataclass
class OrtCache:
    """Keys and values of B slots, a pair (keys, values) a layer in each flat list of 2L.

    cross: arrays [B,H,S,d] that `admit` overwrites in place, ONNX Runtime reads their memory through `cross_values`.
    settled [B,H,F,d] and recent [B,H,R,d]: OrtValues.
    """

    cross: list[NDArray[Any]]
    cross_values: list[Any]
    settled: list[Any]
    recent: list[Any]


class OrtBackend:
    """The bundle's graphs in three ONNX Runtime sessions."""

    def __init__(self, bundle: Bundle, name: str = "auto", *, threads: int | None = None) -> None:
        """Load the graphs. Raises BackendError when ONNX Runtime or the wanted provider is not there."""
        ort = import_onnxruntime("cpu" if name == "auto" else name)
        self.name = _choose(name, ort.get_available_providers())
        self.appetite = CPU_APPETITE if self.name == "cpu" else GPU_APPETITE
        self._ort = ort
        self._model = bundle.model
        threads = threads or available_cores()
        self._names = {
            part: [f"{part}.{kind}.{i}" for i in range(bundle.model.num_layers) for kind in ("key", "value")]
            for part in ("cross", "settled", "recent", "extended", "regrouped")
        }
        # as they are: optimising runs parts of a graph, and these are not known to be the manifest's yet
        self._check_graphs(bundle, *self._open(bundle, threads, is_optimised=False))
        self._encoder, self._decoder, self._regroup = self._open(bundle, threads, is_optimised=True)
        self._dtype: type[np.float16] | type[np.float32] = np.float16 if bundle.precision == "fp16" else np.float32

    def _open(self, bundle: Bundle, threads: int, *, is_optimised: bool) -> list[Any]:
        """Open the encoder, the decoder and regroup."""
        return [
            _open_session(self._ort, bundle.path / f"{graph}.onnx", self.name, threads, is_optimised=is_optimised)
            for graph in ("encoder", "decoder", "regroup")
        ]

    def _check_graphs(self, bundle: Bundle, encoder: Any, decoder: Any, regroup: Any) -> None:
        """Refuse graphs that are not those of the manifest, before any is run. Raises BundleError."""
        names, model, image = self._names, bundle.model, bundle.image
        past = [*names["settled"], *names["recent"]]
        step = ["input_ids", "positions", "scores", "banned_ids", "ancestry", "num_candidates"]
        expected = {
            "encoder": (encoder, ["pixel_values"], names["cross"]),
            "decoder": (
                decoder,
                [*step, *names["cross"], *past],
                ["candidate_scores", "candidate_ids", *names["extended"]],
            ),
            "regroup": (regroup, ["slots", "columns", *past], names["regrouped"]),
        }
        for graph, (session, inputs, outputs) in expected.items():
            for kind, wanted, found in (
                ("inputs", inputs, session.get_inputs()),
                ("outputs", outputs, session.get_outputs()),
            ):
                other = sorted(set(wanted) ^ {entry.name for entry in found})
                if other:
                    raise BundleError(
                        f"{bundle.path / graph}.onnx does not have the {kind} of this engine's bundles "
                        f"({', '.join(other[:3])}): export it again"
                    )
                _check_types(bundle, graph, found)
        keys = (model.num_heads, model.encoder_positions, model.head_width)
        cross = (entry for entry in decoder.get_inputs() if entry.name in names["cross"])
        for graph, entry, sizes in (
            ("encoder", encoder.get_inputs()[0], (image.height, image.width, 3)),
            *(("decoder", entry, keys) for entry in cross),
        ):
            if tuple(entry.shape[1:]) != sizes:
                raise BundleError(
                    f"{bundle.path / graph}.onnx: {entry.name} has the sizes {tuple(entry.shape[1:])}, the manifest "
                    f"says {sizes}: export it again"
                )

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """See Backend.encode."""
        outputs = self._run(self._encoder, self._names["cross"], {"pixel_values": self._value(pixel_values)})
        encoded = [output.numpy() for output in outputs]
        model = self._model
        shape = (len(pixel_values), model.num_heads, model.encoder_positions, model.head_width)
        if any(array.shape != shape for array in encoded):
            raise BundleError(f"the encoder gives {encoded[0].shape} where its manifest says {shape}: export it again")
        return encoded

    def allocate(self, num_slots: int) -> OrtCache:
        """See Backend.allocate."""
        model = self._model
        shape = (num_slots, model.num_heads, model.encoder_positions, model.head_width)
        cross = [np.zeros(shape, self._dtype) for _ in self._names["cross"]]
        return OrtCache(cross, [self._value(array) for array in cross], self._empty(num_slots), self._empty(num_slots))

    def admit(self, cache: OrtCache, slot: int, encoded: list[NDArray[Any]], image: int) -> None:
        """See Backend.admit."""
        for array, new in zip(cache.cross, encoded, strict=True):
            array[slot] = new[image]

    def step(self, cache: OrtCache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step."""
        feed = {
            "input_ids": self._value(inputs.input_ids),
            "positions": self._value(inputs.positions),
            "scores": self._value(inputs.scores),
            "banned_ids": self._value(inputs.banned_ids),
            "ancestry": self._value(inputs.ancestry),
            "num_candidates": self._value(np.array([inputs.num_candidates], np.int64)),
            **self._named("cross", cache.cross_values),
            **self._named("settled", cache.settled),
            **self._named("recent", cache.recent),
        }
        scores, ids, *cache.recent = self._run(
            self._decoder, ["candidate_scores", "candidate_ids", *self._names["extended"]], feed
        )
        return scores.numpy(), ids.numpy()

    def regroup(self, cache: OrtCache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        if columns.size:
            feed = {
                "slots": self._value(slots),
                "columns": self._value(columns),
                **self._named("settled", cache.settled),
                **self._named("recent", cache.recent),
            }
            cache.settled = self._run(self._regroup, self._names["regrouped"], feed)
        else:
            cache.settled = self._empty(len(slots))
        cache.recent = self._empty(len(slots))
        if len(slots) < len(cache.cross[0]):
            cache.cross = keep_in_place(cache.cross, slots)
            cache.cross_values = [self._value(array) for array in cache.cross]

    def _empty(self, num_slots: int) -> list[Any]:
        nothing = np.zeros((num_slots, self._model.num_heads, 0, self._model.head_width), self._dtype)
        return [self._value(nothing)] * len(self._names["cross"])

    def _named(self, part: str, values: list[Any]) -> dict[str, Any]:
        return dict(zip(self._names[part], values, strict=True))

    def _value(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _run(self, session: Any, outputs: list[str], feed: dict[str, Any]) -> list[Any]:
        try:
            return list(session.run_with_ort_values(outputs, feed))
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            kind = OutOfMemoryError if any(sign in reason.lower() for sign in OUT_OF_MEMORY) else BackendError
            raise kind(f"the {self.name} backend failed: {reason}") from error


def import_onnxruntime(extra: str) -> Any:
    """Import onnxruntime or raise BackendError naming the extra that brings it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"onnxruntime is not installed ({error}): pip install 'blip-caption-engine[{extra}]', "
            f"or '.[{extra}]' in a checkout"
        ) from error
    return onnxruntime


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_nvidia_driver() -> bool:
    """Return whether the NVIDIA driver library can be loaded; providers are compiled in with or without one."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _choose(name: str, available: list[str]) -> str:
    """Resolve `auto`, and refuse a backend whose provider this ONNX Runtime was built without."""
    if name == "auto":
        return "cuda" if CUDA[0] in available and has_nvidia_driver() else "cpu"
    wanted, _ = PROVIDERS[name][0]
    if wanted not in available:
        raise BackendError(
            f"backend {name} needs ONNX Runtime's {wanted}, and the one installed has only {', '.join(available)}: "
            f"pip uninstall onnxruntime, then pip install 'blip-caption-engine[{name}]'"
        )
    return name


def _check_types(bundle: Bundle, graph: str, entries: list[Any]) -> None:
    """Refuse keys, values and scores of another type than the manifest's precision has. Raises BundleError."""
    keys = "tensor(float16)" if bundle.precision == "fp16" else "tensor(float)"
    for entry in entries:
        is_key = "." in entry.name  # keys and values: cross.key.0 and so on
        wanted = keys if is_key else "tensor(float)"
        if (is_key or entry.name in FLOAT32_ALWAYS) and entry.type != wanted:
            raise BundleError(
                f"{bundle.path / graph}.onnx: {entry.name} is {entry.type}, {bundle.precision} of the manifest means "
                f"{wanted}: export it again"
            )


def _open_session(ort: Any, path: Path, name: str, threads: int, *, is_optimised: bool) -> Any:
    """Load one graph and check that the provider asked for is the one in use (else ONNX Runtime only logs it)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = LOG_ERRORS_ONLY
    options.add_session_config_entry(*STOP_SPINNING)
    if not is_optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=list(PROVIDERS[name]))
    except Exception as error:
        raise BackendError(f"{path} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    wanted, _ = PROVIDERS[name][0]
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"{wanted} was asked for and ONNX Runtime fell back to {session.get_providers()[0]}: "
            f"`engine info` says what is missing"
        )
    return session

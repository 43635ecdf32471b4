"""The OpenVINO backend for CPUs: graphs are compiled and cached, the KV cache is in numpy arrays and two requests.

Graphs are read and checked like untrusted input first. A cached file is the compiled graph without its weights, about
half a megabyte; the weights come from the bundle, whose hashes were checked. The cache is keyed by bundle, OpenVINO
release, processor and precision. A graph is cached only if it gives the same numbers after it is read back.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.ort import CPU_BATCH_SIZES, check_graphs, refuse_rounded_twice
from engine.backends.ort import OUT_OF_MEMORY as ORT_OUT_OF_MEMORY
from engine.bundle.manifest import CANDIDATES, GRAPHS, NUM_CANDIDATES, TASK_IDS, Bundle, cache_names, step_inputs
from engine.decoding.backend import BatchSizes, StepInputs
from engine.errors import BackendError, BundleError, EngineError, UsageError, backend_errors, install_command
from engine.files.atomic import cache_folder, replace_file, require_private
from engine.files.lock import OutputLock
from engine.host import available_cores, processor

NAME = "openvino"
OLDEST = (2026, 4)
"""Oldest supported release. It is not verified that older ones refuse weights outside the bundle."""
HINTS = {"fp32": "f32", "bf16": "bf16"}
"""Precision -> OpenVINO's hint. It is always set, because OpenVINO's default is bf16 if the processor supports it."""
OUT_OF_MEMORY = (*ORT_OUT_OF_MEMORY, "can't allocate")
"""Parts of OpenVINO's messages, in lower case, that mean out of memory."""
TELEMETRY = "openvino_telemetry"
DIGEST_CHARACTERS = 64
REASON = "compiled graphs are executable code"
PRIVATE_MODE = 0o600
"""Mode of cached files: no one else may read or write them, because they are executable code."""


@dataclass(frozen=True)
class Port:
    """An input or output with ONNX Runtime's names for types; a size of None is dynamic."""

    name: str
    shape: tuple[int | None, ...]
    type: str


@dataclass(frozen=True)
class Ports:
    """Inputs and outputs of a graph, with the interface of an ONNX Runtime session that check_graphs needs."""

    inputs: list[Port]
    outputs: list[Port]

    @classmethod
    def of(cls, model: Any) -> Ports:
        """Return the inputs and outputs of an OpenVINO model."""
        return cls([_port(value) for value in model.inputs], [_port(value) for value in model.outputs])

    def get_inputs(self) -> list[Port]:
        return self.inputs

    def get_outputs(self) -> list[Port]:
        return self.outputs


TYPES = {"f32": "tensor(float)", "f16": "tensor(float16)"}


def _port(value: Any) -> Port:
    shape = value.partial_shape
    sizes = () if shape.rank.is_dynamic else tuple(d.get_length() if d.is_static else None for d in shape)
    kind = value.element_type.get_type_name()
    return Port(value.any_name, sizes, TYPES.get(kind, f"tensor({kind})"))


def import_openvino() -> Any:
    """Import openvino. Raises BackendError with the command that installs it."""
    try:
        with _without_telemetry():
            import openvino
    except ImportError as error:
        raise BackendError(f"openvino is not installed ({error}): {install_command('openvino')}") from error
    release = openvino.__version__.partition("-")[0]
    if tuple(map(int, release.split(".")[:2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise BackendError(f"OpenVINO {release} is too old: pip install 'openvino>={wanted}'")
    return openvino


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Make the package openvino_telemetry look uninstalled while openvino is imported.

    It would report the import to Google Analytics from a forked process, which hangs if threads are already running.
    """
    known = sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]
        if known is not None:
            sys.modules[TELEMETRY] = known


def require_openvino(cpu_precision: str = "fp32") -> None:
    """Raise BackendError if OpenVINO or, for bf16, the processor's instructions are missing."""
    openvino = import_openvino()
    if cpu_precision == "bf16":
        capabilities = shared_core(openvino).get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in capabilities:
            raise BackendError(
                "this processor has no instructions for bf16 (AVX512_BF16 or AMX), so bf16 would only be slower: "
                "remove --cpu-precision"
            )


@cache
def shared_core(openvino: Any) -> Any:
    """Return the one openvino.Core of this process, which is never closed.

    A Core registers a signal stack for its thread, and registers the earlier one again when it is closed. Of two that
    are closed in the order in which they were opened, the second then registers a stack that was freed, and the next
    signal with a handler in Python ends the process with a segmentation fault (OpenVINO 2026.4, Linux).
    """
    return openvino.Core()


openvino_errors = partial(backend_errors, out_of_memory=OUT_OF_MEMORY)


def compile_graphs(bundle: Bundle, threads: int, cpu_precision: str) -> dict[str, Any]:
    """Return {graph: OpenVINO's compiled model} for `threads` threads.

    Raises BundleError if graphs do not match the manifest, before any is compiled, and BackendError if OpenVINO rejects
    a graph.
    """
    openvino = import_openvino()
    models = {graph: _read(bundle.path / f"{graph}.onnx") for graph in GRAPHS}
    check_graphs(bundle, {graph: Ports.of(model) for graph, model in models.items()})
    store = Store(openvino, bundle, threads, cpu_precision)
    return {graph: store.take(graph, model) for graph, model in models.items()}


def _read(path: Path) -> Any:
    """Read an ONNX file. Core.read_model would detect and read other formats as well, whatever the file's name."""
    from openvino.frontend import FrontEndManager

    with openvino_errors(f"{path} cannot be loaded"):
        reader = FrontEndManager().load_by_framework("onnx")
        return reader.convert(reader.load(str(path)))


class Store:
    """Compiles the graphs of one bundle and caches them in the user's cache folder.

    A damaged file or an unusable folder does not stop a run: it is reported on standard error, and the graph is
    compiled again.
    """

    def __init__(self, openvino: Any, bundle: Bundle, threads: int, cpu_precision: str) -> None:
        self._ov, self._bundle = openvino, bundle
        self._core = shared_core(openvino)
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[cpu_precision],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # do not round activations to 8 bits when weights are int8
            "ENABLE_CPU_PINNING": False,  # it would bind several processes to the same cores
            "CACHE_MODE": "OPTIMIZE_SIZE",  # export_model omits the weights
        }
        name = self._core.get_property("CPU", "FULL_DEVICE_NAME")
        self._key = f"{openvino.__version__}|{name}|{sorted(processor().flags)}|{cpu_precision}"

    def take(self, graph: str, model: Any) -> Any:
        """Return the compiled model of a graph, from the cache if possible; a new one is added to the cache."""
        weights = f"{graph}.onnx.data"
        # regroup has no weights and compiles quickly, so it is not cached
        path = self._path(graph) if weights in self._bundle.files else None
        if path is not None and (cached := self._load(path, graph)) is not None:
            return cached
        with openvino_errors(f"{self._bundle.path / graph}.onnx cannot be compiled"):
            compiled = self._core.compile_model(model, "CPU", self._settings)
        if path is not None:
            self._save(path, graph, compiled)
        return compiled

    def _path(self, graph: str) -> Path | None:
        """Return the cache file of a graph, or None if the cache folder cannot be used."""
        try:
            folder = cache_folder(self._bundle.digest, NAME, REASON)
        except (OSError, RuntimeError, EngineError) as error:  # no home, a full disk, a folder open to others
            _log(f"compiled graphs are not cached: {error}")
            return None
        return folder / f"{graph}-{hashlib.sha256(self._key.encode()).hexdigest()[:16]}.blob"

    def _load(self, path: Path, graph: str) -> Any:
        """Return the compiled graph in `path`, or None if the file is missing or damaged."""
        if not path.exists():
            return None
        try:
            require_private(path, REASON)
            content = path.read_bytes()
            digest, compiled = content[:DIGEST_CHARACTERS], content[DIGEST_CHARACTERS:]
            if digest != self._digest(graph, compiled):
                raise BackendError("its content does not match its checksum")
            return self._import(compiled, graph)
        except (OSError, EngineError) as error:
            _log(f"{path} cannot be used, its graph is compiled again: {error}")
            return None

    def _save(self, path: Path, graph: str, compiled: Any) -> None:
        """Cache a compiled graph if it gives the same numbers when it is read back."""
        try:
            with openvino_errors("OpenVINO cannot write it"):
                stream = BytesIO()
                compiled.export_model(stream)
            content = stream.getvalue()
            if not self._agree(graph, compiled, self._import(content, graph)):
                return
            with OutputLock(path):
                replace_file(path, self._digest(graph, content) + content, mode=PRIVATE_MODE)
        except UsageError:
            return  # another process is writing the same file
        except EngineError as error:
            _log(f"the compiled {graph} is not cached: {error}")

    def _digest(self, graph: str, compiled: bytes) -> bytes:
        """Return the checksum of a cached graph; it includes the key, so that a file for another key never matches."""
        key = f"{self._bundle.digest}|{graph}|{self._key}"
        return hashlib.sha256(key.encode() + compiled).hexdigest().encode()

    def _import(self, compiled: bytes, graph: str) -> Any:
        weights = {"WEIGHTS_PATH": str(self._bundle.path / f"{graph}.onnx.data")}
        with openvino_errors("OpenVINO cannot read it"):
            return self._core.import_model(BytesIO(compiled), "CPU", self._settings | weights)

    def _agree(self, graph: str, *compiled: Any) -> bool:
        """Return whether two compiled models give bit-identical outputs for random inputs."""
        feed = probe(self._bundle, graph, [port.any_name for port in compiled[0].inputs])
        first, second = (model(feed, share_inputs=True).to_dict() for model in compiled)
        return all(
            np.array_equal(output, expected, equal_nan=True)
            for output, expected in zip(first.values(), second.values(), strict=True)
        )


def probe(bundle: Bundle, graph: str, names: list[str]) -> dict[str, NDArray[Any]]:
    """Return random inputs: pixels for the encoder, or one step of two beams of one image for the decoder."""
    rng, model = np.random.default_rng(0), bundle.model
    feed: dict[str, NDArray[Any]]
    if graph == "encoder":
        pixels = rng.integers(0, 256, (1, bundle.image.height, bundle.image.width, 3), np.uint8)
        feed = {"pixel_values": pixels, TASK_IDS: np.array(bundle.task_ids, np.int64)}
        return {name: feed[name] for name in names}
    rows, settled, recent = 2, 3, 2
    feed = {
        "input_ids": rng.integers(0, model.vocab_size, (1, rows)),
        "positions": rng.integers(0, min(4, model.max_positions), (1, rows)),
        "scores": np.zeros((1, rows), np.float32),
        "ancestry": np.ones((1, rows, settled + recent + rows), bool),
        "penalties": np.array([1.5, 1.5], np.float32),
        "num_candidates": np.array([2 * rows]),
    }
    marks = rng.integers(0, model.vocab_size, (1, rows, 3))
    feed |= {"marked_ids": marks, "banned_ids": marks}
    dtype = np.float16 if bundle.precision == "fp16" else np.float32
    for name in names:
        if "." in name:
            positions = {"cross": model.encoder_positions, "settled": settled, "recent": recent}[name.partition(".")[0]]
            feed[name] = rng.standard_normal((1, model.num_heads, positions, model.head_width)).astype(dtype)
    return {name: feed[name] for name in names}


def _log(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr)


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
        self._task = {TASK_IDS: np.array(bundle.task_ids, np.int64)} if bundle.tasks else {}
        self._dtype = np.float16 if bundle.precision == "fp16" else np.float32
        compiled = compile_graphs(bundle, threads or available_cores(), cpu_precision)
        self._decoder = compiled["decoder"]
        self._encoder = compiled["encoder"].create_infer_request()
        self._regroup = compiled["regroup"].create_infer_request()
        self._lock = threading.Lock()
        """Held while one of these two requests is used: several threads may iterate over one captioner."""
        self._step_inputs = step_inputs(bundle.format)
        self._names = {
            part: cache_names(bundle.model.num_layers, part)
            for part in ("cross", "settled", "recent", "extended", "regrouped")
        }

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """See Backend.encode. Returns 2L arrays [N,H,S,d]."""
        arrays: dict[str, NDArray[Any]] = {"pixel_values": pixel_values, **self._task}
        with self._lock:
            self._infer(self._encoder, {name: self._tensor(array) for name, array in arrays.items()})
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
            with self._lock:
                self._infer(self._regroup, feed)
                kept = [self._regroup.get_tensor(name).data.copy() for name in self._names["regrouped"]]
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

"""The ONNX Runtime backend, and the check that a bundle's graphs match its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.attention import ATTENTION, attention_graph
from engine.backends.device import CudaDevice, Device, HostDevice, Region
from engine.backends.providers import CPU, KINDS, Provider, bounds_for, import_libraries, providers_for
from engine.backends.shapes import gpu_batch_sizes
from engine.bundle.manifest import (
    CANDIDATES,
    LOG_PROBS,
    LOG_PROBS_INPUTS,
    NUM_CANDIDATES,
    TASK_IDS,
    Bundle,
    cache_names,
    graph_inputs,
    graph_outputs,
    step_inputs,
)
from engine.decoding.backend import BatchSizes, StepInputs
from engine.errors import BackendError, BundleError, OutOfMemoryError, UsageError
from engine.host import VNNI, available_cores, processor

FLOAT32_ALWAYS = ("scores", "penalties", "candidate_scores", LOG_PROBS)
"""Inputs and outputs that are float32 in every precision. Keys and values have the type of the bundle's precision."""

LOG_ERRORS_ONLY = 3
STOP_SPINNING = ("session.force_spinning_stop", "1")
"""Otherwise idle threads of one graph spin on the cores that the next graph needs: 8 to 20 % of a run
(benchmarks/LOG.md).
"""
EXACT_SUMS = ("session.x64quantprecision", "1")
"""x86 processors without VNNI add pairs of 8-bit products in 16 bits, which overflow. With this, ONNX Runtime uses
unsigned weights instead, whose sums are exact: int8 bundles give the same sums on every processor. With VNNI it would
take twice as long for the same sums. Where the processor's flags are unknown, as on Windows, it is on.
"""
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option: where a model that is not read from a file finds the files with its weights."""
BF16_ON_ARM = ("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")


def refuse_rounded_twice(bundle: Bundle, cpu_precision: str) -> None:
    """Raise UsageError for bf16 with a bundle whose weights are already rounded (fp16, int8)."""
    if cpu_precision != "fp32" and bundle.precision != "fp32":
        raise UsageError(
            f"{bundle.path} is {bundle.precision}, but --cpu-precision {cpu_precision} is for fp32 bundles: remove it"
        )


def check_graphs(bundle: Bundle, sessions: Mapping[str, Any]) -> None:
    """Check {graph: session} against the manifest, before any graph is run. Raises BundleError for the first mismatch.

    Names of inputs and outputs, their types and their fixed sizes must be those of this engine's exports.
    """
    model, image = bundle.model, bundle.image
    inputs = graph_inputs(model.num_layers, bundle.format, has_tasks=bool(bundle.tasks))
    outputs = graph_outputs(model.num_layers)
    for graph, session in sessions.items():
        for kind, wanted, actual in (
            ("inputs", inputs[graph], session.get_inputs()),
            ("outputs", outputs[graph], session.get_outputs()),
        ):
            different = sorted(set(wanted) ^ {entry.name for entry in actual})  # both missing and unknown names
            if different:
                raise BundleError(
                    f"{bundle.path / graph}.onnx does not have the {kind} of this engine's bundles "
                    f"({', '.join(different[:3])}): export it again"
                )
            _check_types(bundle, graph, actual)
    # Caches are allocated with the manifest's sizes, so absurd sizes must be found before they exhaust the memory.
    keys = (model.num_heads, model.encoder_positions, model.head_width)
    fixed = dict.fromkeys(cache_names(model.num_layers, "cross"), keys)
    fixed["pixel_values"] = (image.height, image.width, 3)
    for graph, session in sessions.items():
        for entry in session.get_inputs():
            # shape[0] is the number of images or slots, which is dynamic, as are the positions of models with tasks
            sizes = tuple(entry.shape[1:])
            if bundle.tasks and len(sizes) == len(keys) and not isinstance(sizes[1], int):
                sizes = sizes[0], model.encoder_positions, sizes[2]
            if entry.name in fixed and sizes != fixed[entry.name]:
                raise BundleError(
                    f"{bundle.path / graph}.onnx: {entry.name} has the sizes {tuple(entry.shape[1:])}, but the "
                    f"manifest has {fixed[entry.name]}: export it again"
                )


def _check_types(bundle: Bundle, graph: str, entries: list[Any]) -> None:
    """Check that keys, values and scores have the types of the manifest's precision. Raises BundleError."""
    keys = "tensor(float16)" if bundle.precision == "fp16" else "tensor(float)"
    for entry in entries:
        is_key = "." in entry.name  # keys and values: cross.key.0 and so on
        wanted = keys if is_key else "tensor(float)"
        if (is_key or entry.name in FLOAT32_ALWAYS) and entry.type != wanted:
            raise BundleError(
                f"{bundle.path / graph}.onnx: {entry.name} is {entry.type}, but the manifest's precision "
                f"{bundle.precision} requires {wanted}: export it again"
            )


def open_session(
    ort: Any,
    path: Path,
    providers: list[Provider],
    threads: int,
    *,
    is_optimised: bool,
    has_patterns: bool,
    is_bf16: bool = False,
    model: bytes | None = None,
) -> Any:
    """Load one graph and check that the first of `providers` is in use.

    `has_patterns` enables memory planning for each combination of input shapes. With `is_bf16`, ARM processors round
    the factors of matrix products to bf16; other processors ignore it. `model` replaces the content of the file at
    `path`, whose weights it uses.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = LOG_ERRORS_ONLY
    # a memory plan is kept for every combination of input shapes, so it is off on a GPU if the shapes vary
    options.enable_mem_pattern = has_patterns
    options.add_session_config_entry(*STOP_SPINNING)
    if not processor().flags & VNNI:
        options.add_session_config_entry(*EXACT_SUMS)
    if is_bf16:
        options.add_session_config_entry(*BF16_ON_ARM)
    if model is not None:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
    if not is_optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        # With its fallback, ONNX Runtime would print the reason to standard output and use the CPU.
        session = ort.InferenceSession(model or str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise BackendError(f"{path} cannot be loaded: {one_line(error)}") from error
    # without an exception: if a provider cannot be loaded, ONNX Runtime only logs a line and uses the next one
    wanted, _ = providers[0]
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"{wanted} was requested, but ONNX Runtime fell back to {session.get_providers()[0]}: "
            "run `engine info` to see what is missing"
        )
    return session


CPU_BATCH_SIZES = BatchSizes(rows=160, encode_batch=2)
"""Measured on 2 cores (benchmarks/LOG.md): more beams in flight gain a few percent at most, and larger encode batches
are slower because they exceed the processor's cache.
"""

OUT_OF_MEMORY = ("failed to allocate", "bad_alloc", "bad allocation", "out of memory", "available memory")
"""Parts of ONNX Runtime's messages, in lower case, that mean out of memory; it has no error code for that."""
NO_KERNEL_IMAGE = "the installed onnxruntime-gpu has no machine code for this GPU: use --backend cpu"
LONGEST_REASON = 400
"""Most characters of ONNX Runtime's messages that are kept."""
ALIGNMENT = 256
"""Arrays in device memory start at multiples of so many bytes, as those of cudaMalloc do."""
SHRINK_POOL = "memory.enable_memory_arena_shrinkage"
"""ONNX Runtime's option of a run: return the unused blocks of a memory pool when the run ends."""
Located = dict[str, tuple[Any, tuple[int, ...]]]
"""Input name -> (OrtValue on the device, shape of the part of it that is fed)."""
OTHER_BACKEND = "lower --beams, --rows or --max-new-tokens, or use --backend cuda or trt"


@dataclass(frozen=True)
class DeviceZeros:
    """An array that starts as zeros, in a region of the device; data_ptr and shape are as of an OrtValue.

    ONNX Runtime would allocate an OrtValue in a memory pool of the process that never shrinks. After an out-of-memory
    error this pool would hold all of the GPU, and even one image would not fit.
    """

    region: Region
    address: int
    sizes: tuple[int, ...]

    @classmethod
    def several(cls, count: int, device: Device, sizes: tuple[int, ...], dtype: type[np.generic]) -> list[DeviceZeros]:
        """Allocate `count` arrays in one region, which is freed with the last of them. Raises OutOfMemoryError."""
        region, size_bytes = Region(device), int(np.prod(sizes)) * np.dtype(dtype).itemsize
        size_bytes = -(-size_bytes // ALIGNMENT) * ALIGNMENT
        first = region.at_least(count * size_bytes)
        return [cls(region, first + i * size_bytes, sizes) for i in range(count)]

    def shape(self) -> tuple[int, ...]:
        """Return the sizes."""
        return self.sizes

    def data_ptr(self) -> int:
        """Return the address."""
        return self.address


@dataclass
class OrtCache:
    """The KV cache of B slots: flat lists of 2L arrays on the device, keys and values of each layer in turn.

    They are OrtValues if ONNX Runtime computed them, else DeviceZeros.

    cross [B0,H,S,d]: allocated for B0 >= B slots, of which the first B are in use; `admit` overwrites them in place.
    settled [B,H,F,d] and recent [B,H,R,d]: the folded and the recent block. With `fixed_recent` = R, recent is
    [B0,H,R,d] and stays in place, like cross.
    attention f32[B,T,S]: that of the latest step, if prepare_attention was called.
    """

    num_slots: int
    cross: list[Any]
    settled: list[Any]
    recent: list[Any]
    fixed_recent: int | None = None
    attention: NDArray[np.float32] | None = None


class OrtBackend:
    """The bundle's three graphs in ONNX Runtime sessions. Implements FillableBackend.

    With `decoder="log_probs"` a step ends at the log-probabilities: call `log_probs` instead of `step`.
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
        """Load the graphs. Raises BackendError if ONNX Runtime or the requested provider is missing.

        Call require_backend first: it checks for a GPU and for the processor's bf16 instructions.
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
        self._bundle, self._model = bundle, bundle.model
        self._attention_layers: tuple[int, ...] = ()
        """Those of prepare_attention; without any, steps return no attention."""
        self._task = {TASK_IDS: np.array(bundle.task_ids, np.int64)} if bundle.tasks else {}
        is_host = self._device.name == "cpu"
        threads = (threads or available_cores()) if is_host else 1  # with a GPU the CPU only computes shapes
        self._threads = threads
        self._step_inputs = {
            name: field
            for name, field in step_inputs(bundle.format).items()
            if decoder != LOG_PROBS or field in LOG_PROBS_INPUTS
        }
        graphs = ("encoder", decoder, "regroup")
        self._names = {
            part: cache_names(bundle.model.num_layers, part)
            for part in ("cross", "settled", "recent", "extended", "regrouped")
        }
        # The graphs are opened twice. Optimising a graph runs parts of it, so a first session without optimisation
        # only reads the names and shapes of inputs and outputs, and check_graphs compares them with the manifest.
        as_written: dict[str, list[Provider]] = {graph: [(CPU, {})] for graph in graphs}
        check_graphs(bundle, self._open(bundle, threads, as_written, is_optimised=False))
        chosen = {graph: providers_for(name, bundle, graph, self._bounds) for graph in graphs}
        sessions = self._open(bundle, threads, chosen, is_optimised=True)
        self._encoder, self._decoder, self._regroup = sessions.values()
        self._dtype: type[np.float16] | type[np.float32] = np.float16 if bundle.precision == "fp16" else np.float32
        model = bundle.model
        self._slot_shape = (model.num_heads, model.encoder_positions, model.head_width)
        # keys or values of one slot in one layer: the unit of the copies in admit and regroup
        self._slot_bytes = int(np.prod(self._slot_shape)) * np.dtype(self._dtype).itemsize
        self._is_short = False
        self._shrinking: set[Any] = set()
        """Sessions whose next run returns unused memory to the device."""

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
        """See Backend.encode. Returns 2L OrtValues [N,H,S,d] on the device."""
        arrays: dict[str, NDArray[Any]] = {"pixel_values": pixel_values, **self._task}
        feed = {name: self._value(array) for name, array in arrays.items()}
        encoded = self._run(self._encoder, feed, [], self._names["cross"])
        # admit copies slots by address, so outputs of another size would be read beyond their end
        shape = (len(pixel_values), *self._slot_shape)
        for value in encoded:
            if tuple(value.shape()) != shape:
                raise BundleError(
                    f"the encoder returns {value.shape()}, but the manifest has {shape}: export the bundle again"
                )
        return encoded

    def allocate(self, num_slots: int, settled: int = 0) -> OrtCache:
        """See FillableBackend.allocate."""
        if self._bounds is not None:
            self._bounds.refuse_beyond(OTHER_BACKEND, slots=num_slots)
        if self._is_short:
            self._is_short, self._shrinking = False, {self._encoder, self._decoder, self._regroup}
        # zeros, not empty: masked positions have the weight 0, but 0 * NaN is NaN
        shape = (num_slots, *self._slot_shape)
        with self._memory_errors():
            cross = DeviceZeros.several(len(self._names["cross"]), self._device, shape, self._dtype)
            return OrtCache(num_slots, cross, self._zeros(num_slots, settled), self._zeros(num_slots, 0))

    def set_recent(self, cache: OrtCache, recent: int) -> None:
        """See FillableBackend.set_recent."""
        # of a fixed size, so that steps have few different shapes; the mask hides what is not written yet
        shape = (cache.num_slots, self._model.num_heads, recent, self._model.head_width)
        with self._memory_errors():
            cache.recent = DeviceZeros.several(len(self._names["recent"]), self._device, shape, self._dtype)
        cache.fixed_recent = recent

    def admit(self, cache: OrtCache, slot: int, encoded: list[Any], image: int) -> None:
        """See Backend.admit."""
        for value, new in zip(cache.cross, encoded, strict=True):
            self._copy_slot(value.data_ptr(), slot, new.data_ptr(), image)

    def step(
        self, cache: OrtCache, inputs: StepInputs, at: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See FillableBackend.step."""
        if self._bounds is not None:  # checked here, where the error can name the options to change
            rows, marks = inputs.marked_ids.shape[1:]
            settled = cache.settled[0].shape()[2]
            self._bounds.refuse_beyond(OTHER_BACKEND, beams=rows, marked_ids=marks, settled=settled)
        count = {NUM_CANDIDATES: self._value(np.array([inputs.num_candidates], np.int64))}
        more = [ATTENTION] if self._attention_layers else []
        scores, ids, *weights = self._decode(cache, inputs, count, [*CANDIDATES, *more], at)
        cache.attention = weights[0] if weights else None
        return scores, ids

    def log_probs(self, cache: OrtCache, inputs: StepInputs, at: int | None = None) -> NDArray[np.float32]:
        """Run a step and return log-probabilities f32[B,T,V]; scores, marks and penalties of `inputs` are ignored."""
        (log_probs,) = self._decode(cache, inputs, {}, [LOG_PROBS], at)
        return log_probs

    def _decode(
        self, cache: OrtCache, inputs: StepInputs, more: dict[str, Any], to_host: list[str], at: int | None
    ) -> list[NDArray[Any]]:
        """Run the decoder, which extends the recent block, and return the outputs named in `to_host`."""
        feed = {
            **{name: self._value(getattr(inputs, field)) for name, field in self._step_inputs.items()},
            **more,
            **self._named("settled", cache.settled),
            **self._growing(cache),
        }
        # by address: these arrays have room for more slots than are in use
        located = self._cross_located(cache) | self._recent_located(cache)
        outputs = self._run(self._decoder, feed, to_host, self._names["extended"], located)
        extended = outputs[len(to_host) :]
        if at is None:
            cache.recent = extended  # the output becomes the next input: nothing is copied
        else:
            self._keep_newest(cache, extended, at, inputs.input_ids.shape[1])
        return [value.numpy() for value in outputs[: len(to_host)]]

    def _keep_newest(self, cache: OrtCache, extended: list[Any], at: int, count: int) -> None:
        """Copy the last `count` positions of [B,H,R+count,d] into the recent block [B0,H,R,d], starting at `at`."""
        assert cache.fixed_recent is not None
        position = self._model.head_width * np.dtype(self._dtype).itemsize
        # A block is the part of one slot and one head: `recent` bytes in the cache, `grown` bytes in the output.
        recent, grown = cache.fixed_recent * position, (cache.fixed_recent + count) * position
        for value, new in zip(cache.recent, extended, strict=True):
            self._device.copy_blocks(
                (value.data_ptr() + at * position, recent),
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
            cache.settled = self._run(self._regroup, feed, [], self._names["regrouped"], self._recent_located(cache))
        else:
            cache.settled = self._zeros(len(slots), 0)  # no position is kept, so there is nothing to compute
        if not keep_recent:
            cache.recent = self._zeros(len(slots), 0)
        # In ascending order a source is never overwritten before it is read, see Backend.regroup. Copies into
        # new arrays took 26 ms an image on a CPU, copies in place take 2 ms (benchmarks/LOG.md).
        for slot, source in enumerate(slots.tolist()):
            if slot != source:
                for value in cache.cross:
                    self._copy_slot(value.data_ptr(), slot, value.data_ptr(), source)
        cache.num_slots = len(slots)

    def _copy_slot(self, target: int, slot: int, source: int, image: int) -> None:
        # by address: Python cannot write a part of an OrtValue
        size = self._slot_bytes
        self._device.copy(target + slot * size, source + image * size, size)

    def prepare_attention(self, layers: Sequence[int]) -> None:
        """See AttentionBackend.prepare_attention. Loads the decoder again, instead of the one without attention."""
        if self._attention_layers == tuple(layers):
            return
        # the outputs of a session are fixed when it is loaded
        self._decoder = open_session(
            self._ort,
            self._bundle.path / "decoder.onnx",
            providers_for(self.name, self._bundle, "decoder", self._bounds),
            self._threads,
            is_optimised=True,
            has_patterns=self._device.name == "cpu",
            is_bf16=self._is_bf16,
            model=attention_graph(self._bundle, layers),
        )
        self._attention_layers = tuple(layers)

    def attention(self, cache: OrtCache) -> NDArray[np.float32]:
        """See AttentionBackend.attention."""
        assert cache.attention is not None, "prepare_attention and a step come first"
        return cache.attention

    def _zeros(self, num_slots: int, positions: int) -> list[Any]:
        """Return keys and values of positions that are never attended to; all layers share one array."""
        shape = (num_slots, self._model.num_heads, positions, self._model.head_width)
        return DeviceZeros.several(1, self._device, shape, self._dtype) * len(self._names["cross"])

    def _named(self, part: str, values: list[Any]) -> dict[str, Any]:
        return dict(zip(self._names[part], values, strict=True))

    def _value(self, array: NDArray[Any]) -> Any:
        # an OrtValue on the CPU shares the array's memory, which must be contiguous
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _cross_located(self, cache: OrtCache) -> Located:
        shape = (cache.num_slots, *self._slot_shape)
        return {name: (value, shape) for name, value in self._named("cross", cache.cross).items()}

    def _growing(self, cache: OrtCache) -> dict[str, Any]:
        """Return the recent block as inputs if it grows with every step, else nothing."""
        return self._named("recent", cache.recent) if cache.fixed_recent is None else {}

    def _recent_located(self, cache: OrtCache) -> Located:
        """Return the recent block by address if it stays in place, else nothing."""
        if cache.fixed_recent is None:
            return {}
        shape = (cache.num_slots, self._model.num_heads, cache.fixed_recent, self._model.head_width)
        return {name: (value, shape) for name, value in self._named("recent", cache.recent).items()}

    def _run(
        self,
        session: Any,
        feed: dict[str, Any],
        to_host: list[str],
        on_device: list[str],
        located: Located | None = None,
    ) -> list[Any]:
        """Run a graph and return its outputs as OrtValues, those of `to_host` first.

        An input of `located` is fed by address and with the given shape, so that only the slots in use are read.
        """
        self._device.wait()  # for earlier copies: ONNX Runtime has its own stream
        binding, device = session.io_binding(), self._device.name
        with self._memory_errors(), ort_errors(self.name):
            for name, value in feed.items():
                if isinstance(value, DeviceZeros):
                    binding.bind_input(name, device, 0, self._dtype, value.shape(), value.data_ptr())
                else:
                    binding.bind_ortvalue_input(name, value)
            for name, (value, shape) in (located or {}).items():
                binding.bind_input(name, device, 0, self._dtype, shape, value.data_ptr())
            for name in to_host:  # a few candidates of each slot, from which the host chooses beams
                binding.bind_output(name, "cpu")
            for name in on_device:  # the KV cache stays on the device; ONNX Runtime allocates these outputs
                binding.bind_output(name, device)
            session.run_with_iobinding(binding, self._run_options(session))
            # outputs keep the binding alive, and its inputs would keep the previous step's KV cache alive
            binding.clear_binding_inputs()
            return list(binding.get_outputs())

    def _run_options(self, session: Any) -> Any:
        """Return None, or after an out-of-memory error, once for each session, options that shrink its memory pool.

        A session keeps what it has allocated once. Without this, the pool of one graph would keep the memory that
        another one needs for the fewer slots of the next attempt.
        """
        if session not in self._shrinking:
            return None
        self._shrinking.discard(session)
        options = self._ort.RunOptions()
        options.add_run_config_entry(SHRINK_POOL, "cpu:0" if self._device.name == "cpu" else "gpu:0")
        return options

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """After an OutOfMemoryError, let each session shrink its memory pool in the next attempt, see allocate.

        Not at once: a step of another stream may come first, while the caches of this attempt are still there.
        """
        try:
            yield
        except OutOfMemoryError:
            self._is_short = True
            raise


@contextmanager
def ort_errors(name: str) -> Iterator[None]:
    """Convert ONNX Runtime's exceptions into BackendError or OutOfMemoryError that names the backend."""
    try:
        yield
    except Exception as error:
        text = str(error).lower()
        kind = OutOfMemoryError if any(sign in text for sign in OUT_OF_MEMORY) else BackendError
        hint = f" ({NO_KERNEL_IMAGE})" if "no kernel image" in text else ""
        raise kind(f"the {name} backend failed{hint}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return an error of ONNX Runtime as a line. Of a long one the end: places in its C++ code come first."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_REASON else f"...{text[-LONGEST_REASON:]}"

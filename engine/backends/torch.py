"""The torch backend: a bundle's graphs on any device of torch, also AMD's, Intel's and Apple's GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.attention import attention_graph
from engine.backends.ort import CPU_BATCH_SIZES, check_graphs, refuse_rounded_twice
from engine.backends.shapes import gpu_batch_sizes
from engine.backends.torch_ops import UnsupportedError, run_node
from engine.backends.torch_tape import Known, Recording, Tape, Value, WeightStore, upload
from engine.bundle.manifest import (
    CHOICE,
    CHOICE_INPUTS,
    LOG_PROBS,
    LOG_PROBS_INPUTS,
    NUM_CANDIDATES,
    Bundle,
    cache_names,
    step_inputs,
)
from engine.bundle.onnx import Node, OnnxFile, Weights, read_onnx
from engine.decoding.backend import BatchSizes, StepInputs
from engine.errors import BackendError, BundleError, OutOfMemoryError, backend_errors
from engine.host import available_cores
from engine.runtime import TORCH_DEVICES, Runtime

Candidates = tuple[NDArray[np.float32], NDArray[np.int64]]
FAILED = "the torch backend failed"
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Half precisions and torch's types."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""Parts of torch's messages, in lower case, that mean out of memory."""
OLDEST_OPSET = 13
"""Before it Softmax had another meaning, and axes were attributes."""
MOST_HOST_ELEMENTS = 64
"""Integer constants with more elements are kept on the device. Shapes and axes have few."""
MOST_RECORDINGS = 256
"""Recordings that a graph keeps, each for other shapes. A search needs a few dozen (PaddedBackend)."""


def find_device(device: str | None) -> str:
    """Return the device to use; None is the first of cuda, xpu, mps and cpu that torch finds.

    Raises BackendError if torch does not find the device.
    """
    if device is None:
        return next((kind for kind in TORCH_DEVICES if _count(kind)), "cpu")
    kind, _, number = device.partition(":")
    count = _count(kind)
    if not count:
        raise BackendError(
            f"torch {torch.__version__} finds no device {kind}: install a build of torch for it, or use --device cpu"
        )
    if number and int(number) >= count:
        raise BackendError(f"there is no {device}: torch finds {kind}:0 to {kind}:{count - 1}")
    return device


def _count(kind: str) -> int:
    """Return the number of devices of a kind. Builds of torch for AMD's GPUs call them cuda."""
    if kind in ("cpu", "mps"):
        return int(kind == "cpu" or torch.backends.mps.is_available())
    runtime = getattr(torch, kind)
    return int(runtime.device_count()) if runtime.is_available() else 0


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None for the CPU, where engine.host knows more."""
    if device.type == "cpu":
        return None
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    free, _ = getattr(torch, device.type).mem_get_info(device)
    return int(free)


torch_errors = partial(backend_errors, out_of_memory=OUT_OF_MEMORY)


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute as ONNX Runtime does on a GPU: no TF32, and sums of half precision in float32.

    These settings are torch's own and hold for the whole process, so they are restored.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(products, name) for name in names]
    for name in names:
        setattr(products, name, False)
    try:
        with convolutions.flags(enabled=convolutions.enabled, allow_tf32=False):
            yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(products, name, value)


class TorchGraph:
    """A graph of a bundle, to be run on tensors of a device.

    Nodes with constant inputs are run once, when the graph is opened. The others are run and recorded for each new
    combination of input shapes.
    """

    def __init__(self, file: OnnxFile, store: WeightStore) -> None:
        """Read the weights. Raises BundleError that names an operator or content that the backend lacks."""
        self._path, self._store = file.path, store
        if file.opset < OLDEST_OPSET:
            raise BundleError(f"{file.path} has opset {file.opset}, --backend torch needs {OLDEST_OPSET} or later")
        self._inputs = [port.name for port in file.inputs]
        self._outputs = [port.name for port in file.outputs]
        self._recordings: dict[tuple[object, ...], Recording] = {}
        self._raised = set[str]()
        """Values that half precision casts to float32: logits, so that scores are float32 as in an fp16 export."""
        if store.half is not None:
            self._raised = {node.inputs[0] for node in file.nodes if node.kind == "LogSoftmax"}
        self._constants: dict[str, Known] = {"": np.empty(0)}
        for name, (dtype, dims, content) in file.tensors.items():
            self._constants[name] = (
                store.take(dtype, dims, content) if isinstance(content, Weights) else self._small(content)
            )
        tape, self._nodes = Tape(store), list[Node]()
        for node in file.nodes:
            if self._constants.keys() >= set(node.inputs):
                self._run(tape, node, self._constants)
            else:
                self._nodes.append(node)
        used = {name for node in self._nodes for name in node.inputs} | set(self._outputs)
        self._constants = {name: value for name, value in self._constants.items() if name in used}
        self._unused = _last_uses(self._nodes, {*self._constants, *self._outputs})

    def _small(self, array: NDArray[Any]) -> Known:
        is_host = array.size == 1 or (array.dtype.kind in "ib" and array.size <= MOST_HOST_ELEMENTS)
        return array if is_host else self._store.place(array)

    def run(self, feed: Mapping[str, Tensor | NDArray[Any]]) -> list[Tensor]:
        """Run the graph on {input: tensor on the device} and return its outputs.

        An input that decides shapes, such as the number of candidates, is an array on the host.
        """
        key = tuple(one.shape if isinstance(one, Tensor) else one.tobytes() for one in feed.values())
        if key in self._recordings:
            return self._recordings[key].run([one for one in feed.values() if isinstance(one, Tensor)])
        if len(self._recordings) >= MOST_RECORDINGS:
            self._recordings.clear()
        outputs, self._recordings[key] = self._record(feed)
        return outputs

    def _record(self, feed: Mapping[str, Tensor | NDArray[Any]]) -> tuple[list[Tensor], Recording]:
        tape = Tape(self._store)
        known: dict[str, Known] = dict(self._constants)
        for name, one in feed.items():
            known[name] = Value(one) if isinstance(one, Tensor) else one
        fed = [value for name in feed if isinstance(value := known[name], Value)]
        tape.recording.inputs = [tape.register(value) for value in fed]
        for node, unused in zip(self._nodes, self._unused, strict=True):
            self._run(tape, node, known)
            for name in unused:  # the first run needs no more memory than others
                del known[name]
        outputs = [tape.on_device(known[name]) for name in self._outputs]
        tape.recording.end([tape.register(value) for value in outputs])
        return [value.tensor for value in outputs], tape.recording

    def _run(self, tape: Tape, node: Node, known: dict[str, Known]) -> None:
        try:
            made = run_node(tape, node, [known[name] if name else None for name in node.inputs])
        except UnsupportedError as error:
            raise BundleError(
                f"{self._path}: --backend torch does not support the operator {node.kind} ({error}): use another "
                "--backend"
            ) from error
        for name, value in zip(node.outputs, made, strict=False):
            if name in self._raised and isinstance(value, Value):
                value = tape.cast(value, torch.float32)
            known[name] = value


def _last_uses(nodes: Sequence[Node], kept: set[str]) -> list[list[str]]:
    """Return for each node the names that no later node uses, except those in `kept`."""
    needed, unused = set(kept), list[list[str]]()
    for node in reversed(nodes):
        names = {*node.inputs, *node.outputs} - needed
        needed |= names
        unused.append(sorted(names))
    return unused[::-1]


@dataclass
class TorchCache:
    """The KV cache of B slots: flat lists of 2L tensors, keys and values of each layer in turn.

    cross [B0,H,S,d]: allocated for B0 >= B slots, of which the first B are in use; `admit` overwrites them in place.
    settled [B,H,F,d] and recent [B,H,R,d]: the folded and the recent block. With `fixed_recent`, recent is
    [B0,H,R,d] and stays in place, like cross.
    attention f32[B,T,S]: that of the latest step, if prepare_attention was called.
    """

    num_slots: int
    cross: list[Tensor]
    settled: list[Tensor]
    recent: list[Tensor]
    fixed_recent: bool = False
    attention: Tensor | None = None


class TorchBackend:
    """The bundle's three graphs in torch. Implements FillableBackend.

    With `decoder="log_probs"` a step ends at the log-probabilities: call `log_probs` instead of `step`.
    """

    name = "torch"

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        *,
        precision: str = "fp32",
        threads: int | None = None,
        decoder: str = "decoder",
    ) -> None:
        """Load the graphs onto a device (see find_device).

        With `precision` fp16 or bf16 a float32 bundle is rounded to half precision, and captions may differ from
        generate's. Raises BundleError if the graphs do not match the manifest or have an operator that is not
        supported, UsageError for half precision with a bundle that is not float32.
        """
        refuse_rounded_twice(bundle, precision)
        self._device = torch.device(device)
        self._dtype = HALVES.get(precision, torch.float16 if bundle.precision == "fp16" else torch.float32)
        self._is_cuda = self._device.type == "cuda"
        self.batch_sizes: BatchSizes = CPU_BATCH_SIZES
        if self._device.type == "cpu":
            torch.set_num_threads(threads or available_cores())
        else:
            with torch_errors(f"torch cannot use {device}"):
                sizes = gpu_batch_sizes(bundle, free_bytes(self._device))
            self.batch_sizes = replace(sizes, item_bytes=self._dtype.itemsize)
        self._bundle, self._model, self._half = bundle, bundle.model, HALVES.get(precision)
        self._attention_layers: tuple[int, ...] = ()
        self._step_inputs = {
            name: field
            for name, field in step_inputs(bundle.format).items()
            if decoder != LOG_PROBS or field in LOG_PROBS_INPUTS
        }
        self._names = {
            part: cache_names(bundle.model.num_layers, part) for part in ("cross", "settled", "recent", "extended")
        }
        store = WeightStore(bundle, self._device, self._half)
        self._encoder, self._decoder, self._regroup = open_graphs(bundle, ("encoder", decoder, "regroup"), store)
        self._is_short = False

    @classmethod
    def load(cls, bundle: Bundle, runtime: Runtime, *, decoder: str = "decoder") -> TorchBackend:
        """Load the graphs for a runtime whose device is known (engine.backends.resolve_runtime)."""
        precision, threads = runtime.cpu_precision, runtime.threads
        return cls(bundle, runtime.device or "cpu", precision=precision, threads=threads, decoder=decoder)

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[Tensor]:
        """See Backend.encode. Returns 2L tensors [N,H,S,d] on the device."""
        encoded = self._run(self._encoder, {"pixel_values": self._upload(pixel_values)})
        shape = (len(pixel_values), self._model.num_heads, self._model.encoder_positions, self._model.head_width)
        for value in encoded:
            if value.shape != shape:
                raise BundleError(
                    f"the encoder returns {tuple(value.shape)}, but the manifest has {shape}: export it again"
                )
        return encoded

    def allocate(self, num_slots: int, settled: int = 0) -> TorchCache:
        """See FillableBackend.allocate."""
        if self._is_short and self._device.type != "cpu":  # of the attempt before, which had more slots
            getattr(torch, self._device.type).empty_cache()
        self._is_short = False
        cross = [self._zeros(num_slots, self._model.encoder_positions) for _ in self._names["cross"]]
        return TorchCache(
            num_slots, cross, [self._zeros(num_slots, settled)] * len(cross), [self._zeros(num_slots, 0)] * len(cross)
        )

    def set_recent(self, cache: TorchCache, recent: int) -> None:
        """See FillableBackend.set_recent."""
        cache.recent = [self._zeros(cache.num_slots, recent) for _ in cache.cross]
        cache.fixed_recent = True

    def admit(self, cache: TorchCache, slot: int, encoded: list[Tensor], image: int) -> None:
        """See Backend.admit."""
        self._copy([one.narrow(0, slot, 1) for one in cache.cross], [one.narrow(0, image, 1) for one in encoded])

    def step(self, cache: TorchCache, inputs: StepInputs, at: int | None = None) -> Candidates:
        """See FillableBackend.step."""
        count = {NUM_CANDIDATES: np.array([inputs.num_candidates], np.int64)}
        return to_host(self._decode(cache, inputs, count, at))

    def log_probs(self, cache: TorchCache, inputs: StepInputs, at: int | None = None) -> Tensor:
        """Run a step and return log-probabilities f32[B,T,V]; scores, marks and penalties of `inputs` are ignored."""
        (log_probs,) = self._decode(cache, inputs, {}, at)
        return log_probs

    def _decode(
        self, cache: TorchCache, inputs: StepInputs, more: dict[str, NDArray[Any]], at: int | None
    ) -> list[Tensor]:
        """Run the decoder, which extends the recent block, and return its other outputs."""
        feed = {name: self._upload(getattr(inputs, field)) for name, field in self._step_inputs.items()}
        outputs = self._run(self._decoder, {**feed, **more, **self._cached(cache, "cross", "settled", "recent")})
        if self._attention_layers:
            *outputs, cache.attention = outputs
        count = len(outputs) - len(cache.recent)
        extended = outputs[count:]
        if at is None:
            cache.recent = extended
        else:
            rows = inputs.input_ids.shape[1]
            kept = [one.narrow(0, 0, cache.num_slots).narrow(2, at, rows) for one in cache.recent]
            self._copy(kept, [one.narrow(2, one.shape[2] - rows, rows) for one in extended])
        return outputs[:count]

    def prepare_attention(self, layers: Sequence[int]) -> None:
        """See AttentionBackend.prepare_attention. Loads the decoder again, instead of the one without attention."""
        if self._attention_layers == tuple(layers):
            return
        file = read_onnx(self._bundle.path / "decoder.onnx", attention_graph(self._bundle, layers))
        store = WeightStore(self._bundle, self._device, self._half)
        with self._errors(), torch.inference_mode():
            self._decoder = TorchGraph(file, store)
        self._attention_layers = tuple(layers)

    def attention(self, cache: TorchCache) -> NDArray[np.float32]:
        """See AttentionBackend.attention."""
        assert cache.attention is not None, "prepare_attention and a step come first"
        with torch_errors(FAILED):
            weights: NDArray[np.float32] = cache.attention.float().cpu().numpy()
        return weights

    def regroup(
        self, cache: TorchCache, slots: NDArray[np.int64], columns: NDArray[np.int64], *, keep_recent: bool = False
    ) -> None:
        """See FillableBackend.regroup."""
        if columns.size:
            feed = {"slots": self._upload(slots), "columns": self._upload(columns)}
            cache.settled = self._run(self._regroup, feed | self._cached(cache, "settled", "recent"))
        else:
            cache.settled = [self._zeros(len(slots), 0)] * len(cache.cross)
        if not keep_recent:
            cache.recent, cache.fixed_recent = [self._zeros(len(slots), 0)] * len(cache.cross), False
        # in ascending order a source is never overwritten before it is read, see Backend.regroup
        for slot, source in enumerate(slots.tolist()):
            if slot != source:
                self.admit(cache, slot, cache.cross, source)
        cache.num_slots = len(slots)

    def _cached(self, cache: TorchCache, *parts: str) -> dict[str, Tensor]:
        """Return {input: keys or values of the slots in use} for parts of the cache."""
        tensors = {part: getattr(cache, part) for part in parts}
        return {
            name: tensor.narrow(0, 0, cache.num_slots)
            for part, several in tensors.items()
            for name, tensor in zip(self._names[part], several, strict=True)
        }

    def _zeros(self, num_slots: int, positions: int) -> Tensor:
        """Return keys or values of positions that are not attended to; not uninitialised: 0 * NaN is NaN."""
        shape = (num_slots, self._model.num_heads, positions, self._model.head_width)
        with self._errors(), torch.inference_mode():
            return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return to_device(array, self._device)

    def _copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        with self._errors(), torch.inference_mode():
            torch._foreach_copy_(targets, sources)  # one launch instead of 2L on a GPU

    def _run(self, graph: TorchGraph, feed: Mapping[str, Tensor | NDArray[Any]]) -> list[Tensor]:
        with self._errors(), torch.inference_mode(), exact_products() if self._is_cuda else nullcontext():
            return graph.run(feed)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with torch_errors(FAILED):
                yield
        except OutOfMemoryError:
            self._is_short = True
            raise


def open_graphs(bundle: Bundle, graphs: Sequence[str], store: WeightStore) -> list[TorchGraph]:
    """Open graphs after checking them against the manifest. Raises BundleError."""
    files = {graph: read_onnx(bundle.path / f"{graph}.onnx") for graph in graphs}
    check_graphs(bundle, files)
    with torch_errors(f"{bundle.path} cannot be loaded"), torch.inference_mode():
        opened = [TorchGraph(file, store) for file in files.values()]
    store.release()
    return opened


def open_choice(bundle: Bundle, runtime: Runtime) -> Callable[[Tensor, StepInputs], Candidates]:
    """Return the second half of the split decoder: (log-probabilities f32[B,T,V], inputs) -> see Backend.step."""
    store = WeightStore(bundle, torch.device(runtime.device or "cpu"))
    (graph,) = open_graphs(bundle, (CHOICE,), store)

    def choose(log_probs: Tensor, inputs: StepInputs) -> Candidates:
        feed = {field: to_device(getattr(inputs, field), store.device) for field in CHOICE_INPUTS}
        with torch_errors(FAILED), torch.inference_mode():
            found = graph.run({LOG_PROBS: log_probs, **feed, NUM_CANDIDATES: np.array([inputs.num_candidates])})
        return to_host(found)

    return choose


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device. On the CPU, the tensor shares its memory."""
    return upload(torch.from_numpy(np.require(array, requirements=("C", "W"))), device)


def to_host(candidates: Sequence[Tensor]) -> Candidates:
    """Copy scores f32[B,C] and ids i64[B,C] to the host."""
    with torch_errors(FAILED):  # a device reports its errors here
        scores, ids = (tensor.cpu().numpy() for tensor in candidates)
    return scores, ids

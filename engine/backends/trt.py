"""The TensorRT backend: runs the plans of a bundle, with growing device memory and captured CUDA graphs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.device import CapturingDevice, CudaDevice, Region
from engine.backends.plans import (
    MODULES,
    PORTABLE,
    Plan,
    build_plans,
    default_folder,
    import_builder,
    make_logger,
    read_plan,
)
from engine.backends.providers import find_gpu
from engine.backends.shapes import FEWEST_SETTLED, Bounds, Shape, gpu_batch_sizes
from engine.bundle.manifest import (
    CANDIDATES,
    GRAPHS,
    NUM_CANDIDATES,
    STEP_INPUTS,
    TASK_IDS,
    Bundle,
    cache_names,
    step_inputs,
)
from engine.decoding.backend import StepInputs
from engine.errors import BackendError, OutOfMemoryError

MOST_CAPTURED = 32
"""Limit of captured steps: each keeps a context with its scratch memory. Two sets of slots with two buffers each need
about 8.
"""


@dataclass
class PlanRunner:
    """One plan, ready to run on a device.

    With `capturing`, a step that occurs a second time with the same shapes and addresses is captured and replayed from
    then on. TensorRT requires an ordinary run before a capture and no other shape in the captured context, so every
    captured step has its own context from `new_context`.
    """

    new_context: Callable[[], Any]
    device: CapturingDevice
    on_host: frozenset[str] = frozenset()
    capturing: bool = False
    captured: dict[Any, Any] = field(default_factory=dict)
    contexts: list[Any] = field(default_factory=list)
    last_error: Callable[[], str] = lambda: "no reason given"

    def __post_init__(self) -> None:
        self.contexts.append(self.new_context())

    def run(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int], values: Shape = ()) -> None:
        """Queue the plan for inputs of `shapes`; all tensors are read and written at `addresses`.

        `values` are the values of inputs that TensorRT reads on the host: another value needs another capture.
        """
        key = (tuple(shapes.items()), tuple(addresses.items()), values)
        recorded = self.captured.get(key)
        if recorded is not None:
            self.device.replay(recorded)
        elif not self.capturing or len(self.contexts) > MOST_CAPTURED:
            self._queue(self.contexts[0], shapes, addresses)
        elif key not in self.captured:
            self._queue(self.contexts[0], shapes, addresses)
            self.captured[key] = None  # seen once; the next time it is captured
        else:
            self.contexts.append(self.new_context())
            self._queue(self.contexts[-1], shapes, addresses)  # this step runs even if the capture fails
            try:
                self.captured[key] = self.device.capture(lambda: self._execute(self.contexts[-1]))
            except OutOfMemoryError:
                raise
            except BackendError as error:
                self.capturing = False
                print(f"CUDA graphs are disabled for the rest of the run: {error}", file=sys.stderr)

    def _queue(self, context: Any, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                sizes = "x".join(map(str, shape))
                raise BackendError(f"TensorRT rejects {name} of {sizes} ({self.last_error()}): run `engine plan` again")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(
                    f"TensorRT rejects the address of {name} ({self.last_error()}): run `engine plan` again"
                )
        self._execute(context)

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self.device.stream):
            raise BackendError(
                f"TensorRT could not run a plan ({self.last_error()}): build it again with `engine plan`"
            )


OTHER_PLANS = "build plans for this search: `engine plan` with --beams, --max-new-tokens and --rows"


@dataclass
class TrtCache:
    """The KV cache of B slots in GPU memory, 2L regions per list: cross [B0,H,S,d] of which the first B slots are in
    use, settled [B,H,F,d], recent [B0,H,R,d]. `regroup` writes into `spare_settled` and swaps the two.
    """

    num_slots: int
    num_settled: int
    num_recent: int
    cross: list[Region]
    settled: list[Region]
    recent: list[Region]
    spare_settled: list[Region]


class TrtBackend:
    """The three plans of a bundle. Implements FillableBackend; refuses sizes beyond the plans' bounds."""

    name = "trt"

    def __init__(
        self, bundle: Bundle, graphs: Mapping[str, PlanRunner], bounds: Bounds, device: CapturingDevice
    ) -> None:
        model = bundle.model
        self.batch_sizes = gpu_batch_sizes(bundle, device.free_bytes(), bounds)
        self._graphs, self._bounds, self._device = graphs, bounds, device
        self._heads, self._width, self._encoder_positions = model.num_heads, model.head_width, model.encoder_positions
        self._item_bytes = 2 if bundle.precision == "fp16" else 4
        self._names = {
            part: cache_names(model.num_layers, part)
            for part in ("cross", "settled", "recent", "extended", "regrouped")
        }
        self._step_inputs = step_inputs(bundle.format)
        self._task = {TASK_IDS: np.array(bundle.task_ids, np.int64)} if bundle.tasks else {}
        small = (*self._step_inputs, NUM_CANDIDATES, "pixel_values", *self._task, "slots", "columns", *CANDIDATES)
        self._small = {name: Region(device) for name in small}
        self._encoded = self._regions()
        self._extended = self._regions()
        """[B,H,R+T,d], of which the last T positions are kept. One buffer serves all caches: steps run one by one."""
        self._count = _aligned(1)
        """num_candidates. TensorRT reads it on the host, because output shapes depend on it."""

    @classmethod
    def load(cls, bundle: Bundle, folder: Path | None = None, *, uses_cuda_graphs: bool = False) -> TrtBackend:
        """Load the plans in `folder` (None: default_folder). A plan that does not load is rebuilt once.

        Raises BackendError if plans are missing or belong to another bundle or machine.
        """
        find_gpu()
        folder = folder or default_folder(bundle)
        plans = {graph: read_plan(folder, bundle, graph) for graph in GRAPHS}
        if any(plan.bounds != plans["decoder"].bounds for plan in plans.values()):
            raise BackendError(f"the plans in {folder} were built for different sizes: run `engine plan` again")
        if uses_cuda_graphs and plans["decoder"].target.builder == PORTABLE:
            raise BackendError(f"plans of {PORTABLE} do not support CUDA graphs: remove --cuda-graphs")
        device = CudaDevice()
        graphs = {}
        for graph, plan in plans.items():
            new_context, on_host, last_error = _loaded(plan, folder, bundle, graph)
            is_captured = uses_cuda_graphs and graph == "decoder"
            graphs[graph] = PlanRunner(new_context, device, on_host, is_captured, last_error=last_error)
        return cls(bundle, graphs, plans["decoder"].bounds, device)

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[Region]:
        """See Backend.encode."""
        count = len(pixel_values)
        self._bounds.refuse_beyond(OTHER_PLANS, encode_batch=count)
        arrays: dict[str, NDArray[Any]] = {"pixel_values": pixel_values, **self._task}
        addresses = self._sent(arrays)
        addresses |= self._addresses("cross", self._encoded, count, self._encoder_positions)
        self._graphs["encoder"].run({name: array.shape for name, array in arrays.items()}, addresses)
        return self._encoded

    def allocate(self, num_slots: int, settled: int = 0) -> TrtCache:
        """See FillableBackend.allocate."""
        self._bounds.refuse_beyond(OTHER_PLANS, slots=num_slots)
        parts = [self._regions() for _ in range(4)]
        usual = min(2 * FEWEST_SETTLED, self._bounds.settled)  # now, not later: captured graphs contain addresses
        for regions, positions in zip(parts, (self._encoder_positions, usual, 0, usual), strict=True):
            for region in regions:
                region.at_least(self._bytes(num_slots, positions))
        return TrtCache(num_slots, settled, 0, *parts)

    def set_recent(self, cache: TrtCache, recent: int) -> None:
        """See FillableBackend.set_recent."""
        for region in cache.recent:
            region.at_least(self._bytes(cache.num_slots, recent))
        cache.num_recent = recent

    def admit(self, cache: TrtCache, slot: int, encoded: list[Region], image: int) -> None:
        """See Backend.admit."""
        for region, new in zip(cache.cross, encoded, strict=True):
            self._copy_slot(region, slot, new, image)

    def step(
        self, cache: TrtCache, inputs: StepInputs, at: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See FillableBackend.step. `at` is required: the recent block does not grow here."""
        assert at is not None
        slots, rows, count = *inputs.input_ids.shape, inputs.num_candidates
        marks = inputs.marked_ids.shape[2]
        self._bounds.refuse_beyond(
            OTHER_PLANS, beams=rows, candidates=count, settled=cache.num_settled, marked_ids=marks
        )
        small: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(getattr(inputs, field), STEP_INPUTS[field])
            for name, field in self._step_inputs.items()
        }
        addresses = self._sent(small)
        self._count[0] = count
        if NUM_CANDIDATES in self._graphs["decoder"].on_host:
            addresses[NUM_CANDIDATES] = self._count.ctypes.data
        else:
            addresses |= self._sent({NUM_CANDIDATES: self._count})
        scores, ids = np.empty((slots, count), np.float32), np.empty((slots, count), np.int64)
        for name, array in (("candidate_scores", scores), ("candidate_ids", ids)):
            addresses[name] = self._small[name].at_least(array.nbytes)
        grown = cache.num_recent + rows
        addresses |= self._addresses("cross", cache.cross, slots, self._encoder_positions)
        addresses |= self._addresses("settled", cache.settled, slots, cache.num_settled)
        addresses |= self._addresses("recent", cache.recent, slots, cache.num_recent)
        addresses |= self._addresses("extended", self._extended, slots, grown)
        shapes: dict[str, Shape] = {name: array.shape for name, array in small.items()}
        shapes |= dict.fromkeys(self._names["cross"], (slots, self._heads, self._encoder_positions, self._width))
        self._graphs["decoder"].run(shapes | self._past_shapes(cache), addresses, (count,))
        position = self._width * self._item_bytes
        for region, new in zip(cache.recent, self._extended, strict=True):
            self._device.copy_blocks(
                (region.address + at * position, cache.num_recent * position),
                (new.address + cache.num_recent * position, grown * position),
                rows * position,
                slots * self._heads,
            )
        self._device.download(scores, addresses["candidate_scores"])
        self._device.download(ids, addresses["candidate_ids"])
        return scores, ids

    def regroup(
        self, cache: TrtCache, slots: NDArray[np.int64], columns: NDArray[np.int64], *, keep_recent: bool = False
    ) -> None:
        """See FillableBackend.regroup. Requires `keep_recent`."""
        assert keep_recent
        num_slots, settled = columns.shape
        self._bounds.refuse_beyond(OTHER_PLANS, settled=settled)
        small = {"slots": np.ascontiguousarray(slots), "columns": np.ascontiguousarray(columns)}
        addresses = self._sent(small)
        addresses |= self._addresses("settled", cache.settled, cache.num_slots, cache.num_settled)
        addresses |= self._addresses("recent", cache.recent, cache.num_slots, cache.num_recent)
        addresses |= self._addresses("regrouped", cache.spare_settled, num_slots, settled)
        shapes: dict[str, Shape] = {name: array.shape for name, array in small.items()}
        self._graphs["regroup"].run(shapes | self._past_shapes(cache), addresses)
        for slot, source in enumerate(slots.tolist()):
            if slot != source:
                for region in cache.cross:
                    self._copy_slot(region, slot, region, source)
        cache.settled, cache.spare_settled = cache.spare_settled, cache.settled
        cache.num_slots, cache.num_settled = num_slots, settled

    def _regions(self) -> list[Region]:
        return [Region(self._device) for _ in self._names["cross"]]

    def _bytes(self, slots: int, positions: int) -> int:
        return slots * self._heads * positions * self._width * self._item_bytes

    def _copy_slot(self, target: Region, slot: int, source: Region, image: int) -> None:
        size = self._bytes(1, self._encoder_positions)
        self._device.copy(target.address + slot * size, source.address + image * size, size)

    def _sent(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """Upload small arrays to the device; return their addresses."""
        addresses = {}
        for name, array in arrays.items():
            addresses[name] = self._small[name].at_least(array.nbytes)
            self._device.upload(addresses[name], np.ascontiguousarray(array))
        return addresses

    def _addresses(self, part: str, regions: list[Region], slots: int, positions: int) -> dict[str, int]:
        """Return the addresses of keys and values; regions that are too small are reallocated."""
        size = self._bytes(slots, positions)
        return {name: region.at_least(size) for name, region in zip(self._names[part], regions, strict=True)}

    def _past_shapes(self, cache: TrtCache) -> dict[str, Shape]:
        past = (("settled", cache.num_settled), ("recent", cache.num_recent))
        return {
            name: (cache.num_slots, self._heads, positions, self._width)
            for part, positions in past
            for name in self._names[part]
        }


def require_tensorrt() -> None:
    """Raise BackendError if plans cannot run on this machine."""
    find_gpu()
    builders = [builder for builder in MODULES if _is_installed(builder)]
    if not builders:
        import_builder("tensorrt")
    CudaDevice()


def _is_installed(builder: str) -> bool:
    return importlib.util.find_spec(MODULES[builder]) is not None


def _loaded(
    plan: Plan, folder: Path, bundle: Bundle, graph: str
) -> tuple[Callable[[], Any], frozenset[str], Callable[[], str]]:
    """Load a plan; one that TensorRT rejects is rebuilt once.

    Returns a factory of execution contexts, the tensors that TensorRT reads on the host, and a getter of its last
    error.
    """
    trt = import_builder(plan.target.builder)
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan.content)
    if engine is None:
        (path,) = build_plans(bundle, folder, plan.bounds, plan.target, lambda _: None, graphs=(graph,), force=True)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise BackendError(f"{folder / graph}.plan was just built and does not load: {logger.last()}")
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    on_host = frozenset(name for name in names if engine.get_tensor_location(name) == trt.TensorLocation.HOST)

    settings = () if plan.target.builder != PORTABLE else (_without_specialised_kernels(trt, engine),)

    def new_context() -> Any:
        context = engine.create_execution_context(*settings)
        if context is None:
            raise OutOfMemoryError(f"not enough GPU memory for {folder / graph}.plan: {logger.last()}")
        return context

    return new_context, on_host, logger.last


def _without_specialised_kernels(trt: Any, engine: Any) -> Any:
    """Return TensorRT-RTX's settings for contexts without kernels specialised to a shape.

    By default it compiles kernels for each new shape in the background, which takes CPU cores, and the new kernels
    round differently in the middle of a run.
    """
    settings = engine.create_runtime_config()
    settings.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.NONE
    return settings


def _aligned(count: int) -> NDArray[np.int64]:
    """Return zeros i64[count] at an address that is a multiple of 256 bytes, as TensorRT requires."""
    memory = np.zeros(8 * count + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + 8 * count].view(np.int64)

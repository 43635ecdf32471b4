"""Running plans: growing device memory, and the execution contexts and captured graphs of one plan."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.backends.device import CapturingDevice, Device
from engine.backends.shapes import Shape
from engine.errors import BackendError, OutOfMemoryError

MOST_CAPTURED = 32
"""Limit of captured steps: each keeps a context with its scratch memory. Two sets of slots with two buffers each need
about 8.
"""


class Region:
    """Device memory that grows on demand. Growing discards the content: the new memory is zeroed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address, self._size = 0, 0
        self._give_back: Callable[[], object] = lambda: None

    def at_least(self, size_bytes: int) -> int:
        """Return the address of at least `size_bytes`; they are freed with this object."""
        if size_bytes > self._size:
            self._give_back()
            self.address, self._size = self._device.allocate(size_bytes), size_bytes
            self._give_back = weakref.finalize(self, self._device.free, self.address)
        return self.address


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
        known = self.captured.get(key)
        if known is not None:
            self.device.replay(known)
        elif not self.capturing or len(self.contexts) > MOST_CAPTURED:
            self._queue(self.contexts[0], shapes, addresses)
        elif key not in self.captured:
            self._queue(self.contexts[0], shapes, addresses)
            self.captured[key] = None
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

"""Running plans: memory that grows on a device, and one plan's contexts with what was captured of them."""

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
"""Captured steps: each keeps a context, and a context its scratch memory. Two sets of slots in two halves of their
memory run through some 8 shapes.
"""


class Region:
    """Memory of the device that grows when more is asked for; what was in it is lost then, and zeros come instead."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address, self._size = 0, 0
        self._give_back: Callable[[], object] = lambda: None

    def at_least(self, size_bytes: int) -> int:
        """Return the address of at least so many bytes, which are given back with this object."""
        if size_bytes > self._size:
            self._give_back()
            self.address, self._size = self._device.allocate(size_bytes), size_bytes
            self._give_back = weakref.finalize(self, self._device.free, self.address)
        return self.address


@dataclass
class PlanRunner:
    """One plan, ready to run on a device.

    With `capturing` what runs twice in the same way is captured and replayed: TensorRT wants an ordinary run before a
    capture, and no other shape in the context it was captured from, so each gets one of `new_context`.
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
        """Queue the plan for inputs of `shapes`, everything read and written at `addresses`.

        `values` are those of inputs that TensorRT reads on the host.
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
            self._queue(self.contexts[-1], shapes, addresses)  # does the step, whatever becomes of the capture
            try:
                self.captured[key] = self.device.capture(lambda: self._execute(self.contexts[-1]))
            except OutOfMemoryError:
                raise
            except BackendError as error:
                self.capturing = False
                print(f"no more CUDA graphs are captured: {error}", file=sys.stderr)

    def _queue(self, context: Any, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                sizes = "x".join(map(str, shape))
                raise BackendError(f"TensorRT refuses {name} of {sizes} ({self.last_error()}): run `engine plan` again")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(
                    f"TensorRT refuses the address of {name} ({self.last_error()}): run `engine plan` again"
                )
        self._execute(context)

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self.device.stream):
            raise BackendError(
                f"TensorRT could not run a plan ({self.last_error()}): build it again with `engine plan`"
            )

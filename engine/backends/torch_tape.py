"""Values and recorded calls of the torch backend, and the weights of a bundle on a device.

Values are torch tensors on the device, or numpy arrays on the host: shapes and what is computed from them. Host values
depend on nothing but the shapes of a graph's inputs. So the first run with new shapes records the calls of torch, with
all host values filled in, and later runs with these shapes only replay them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.bundle.manifest import Bundle
from engine.bundle.onnx import Weights
from engine.errors import BundleError

FEWEST_HALF_ELEMENTS = 64
"""Smaller float constants stay float32 in half precision: the mean and deviation of pixels, which are normalised in
float32 as in an fp16 export.
"""


class Value:
    """A tensor on the device. `register` is its number in a recording; a constant keeps what is `derived` from it."""

    __slots__ = ("derived", "is_constant", "register", "tensor")

    def __init__(self, tensor: Tensor, *, is_constant: bool = False) -> None:
        self.tensor, self.is_constant = tensor, is_constant
        self.register: int | None = None
        self.derived: dict[torch.dtype, Value] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


Known = Value | NDArray[Any]
"""A value on the device, or one on the host."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device."""
    return tensor.to(device)


class WeightStore:
    """Reads a bundle's weights, each once for all graphs, onto a device.

    With `half`, float weights are cast to this type. On the CPU, weights that are not cast stay in the mapped file.
    """

    def __init__(self, bundle: Bundle, device: torch.device, half: torch.dtype | None = None) -> None:
        self.device, self.half = device, half
        self._bundle = bundle
        self._files: dict[str, NDArray[np.uint8]] = {}
        self._values: dict[tuple[object, ...], Value] = {}

    def take(self, dtype: type[np.generic], dims: tuple[int, ...], weights: Weights) -> Value:
        """Return a weight. Raises BundleError if it is not in a file that the manifest lists."""
        key = dtype, dims, weights
        if key not in self._values:
            path = self._bundle.path / weights.file
            if weights.file not in self._bundle.files:
                raise BundleError(f"{path} is not in the manifest, but a graph reads weights from it: export it again")
            if weights.file not in self._files:
                # copy on write, because torch warns of memory that it may not write to
                self._files[weights.file] = np.memmap(path, np.uint8, "c")
            content = self._files[weights.file][weights.offset : weights.offset + weights.size]
            if len(content) != weights.size:
                raise BundleError(f"{path} is shorter than a graph needs: export it again")
            if weights.offset % np.dtype(dtype).itemsize:
                content = content.copy()  # torch expects aligned memory
            self._values[key] = self.place(content.view(dtype).reshape(dims))
        return self._values[key]

    def place(self, array: NDArray[Any]) -> Value:
        """Copy an array to the device, as a constant."""
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        if self.half is not None and tensor.is_floating_point() and tensor.numel() >= FEWEST_HALF_ELEMENTS:
            tensor = tensor.to(self.half)
        return Value(upload(tensor, self.device), is_constant=True)

    def release(self) -> None:
        """Forget the weights: graphs keep those that they need."""
        self._values.clear()


Step = tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""A function, the registers of its arguments, those of its results, and those that are not needed any more."""


class Recording:
    """The calls of torch for one set of input shapes. `registers` holds constants, and None for what is computed."""

    def __init__(self) -> None:
        self.registers: list[Tensor | None] = []
        self.steps: list[Step] = []
        self.inputs: list[int] = []
        self.outputs: list[int] = []

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Replay the calls."""
        values: list[Any] = self.registers.copy()
        for register, tensor in zip(self.inputs, inputs, strict=True):
            values[register] = tensor
        for function, arguments, results, unused in self.steps:
            made = function(*[values[i] for i in arguments])
            if len(results) == 1:
                values[results[0]] = made
            else:
                for register, tensor in zip(results, made, strict=True):
                    values[register] = tensor
            for i in unused:
                values[i] = None
        return [values[i] for i in self.outputs]

    def end(self, outputs: list[int]) -> None:
        """Set the outputs, drop steps that nothing uses, and note when a register is not needed any more."""
        self.outputs = outputs
        needed, kept = set(outputs), list[Step]()
        for function, arguments, results, _ in reversed(self.steps):
            if not needed.isdisjoint(results):
                kept.append((function, arguments, results, tuple({*arguments, *results} - needed)))
                needed |= {*arguments}
        self.steps = kept[::-1]


class Tape:
    """Calls functions of torch, and records calls whose arguments are not all constants."""

    def __init__(self, store: WeightStore) -> None:
        self.store, self.recording = store, Recording()
        self._constants: dict[Value, int] = {}

    def __call__(self, function: Callable[..., Tensor], *arguments: Any) -> Value:
        """Call a function. Arguments that are not a Value are the same in each replay."""
        (value,) = self._call(function, arguments, lambda made: (made,))
        return value

    def several(self, function: Callable[..., Sequence[Tensor]], *arguments: Any) -> list[Value]:
        """Call a function that returns several tensors."""
        return self._call(function, arguments, lambda made: made)

    def _call(self, function: Callable[..., Any], arguments: Sequence[Any], listed: Callable[..., Any]) -> list[Value]:
        values = [one for one in arguments if isinstance(one, Value)]
        if len(values) < len(arguments):
            function = _filled_in(function, arguments)
        is_constant = all(value.is_constant for value in values)
        made = listed(function(*[value.tensor for value in values]))
        results = [Value(tensor, is_constant=is_constant) for tensor in made]
        if not is_constant:
            fed = tuple(self.register(value) for value in values)
            self.recording.steps.append((function, fed, tuple(self.register(value) for value in results), ()))
        return results

    def register(self, value: Value) -> int:
        """Return the register of a value: a new one if it has none in this recording."""
        number = self._constants.get(value) if value.is_constant else value.register
        if number is None:
            number = len(self.recording.registers)
            self.recording.registers.append(value.tensor if value.is_constant else None)
            if value.is_constant:
                self._constants[value] = number
            else:
                value.register = number
        return number

    def on_device(self, value: Known) -> Value:
        """Return a value on the device."""
        return value if isinstance(value, Value) else self.store.place(np.ascontiguousarray(value))

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """Return a value in another type. A constant is cast once for all recordings."""
        if value.tensor.dtype == dtype:
            return value
        if dtype not in value.derived:
            made = self(lambda tensor: tensor.to(dtype), value)
            if not value.is_constant:
                return made
            value.derived[dtype] = made
        return value.derived[dtype]


def _filled_in(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """Return a function of the arguments that are Values; the others are filled in."""
    first = next(i for i, one in enumerate(arguments) if not isinstance(one, Value))
    if not any(isinstance(one, Value) for one in arguments[first:]):
        rest = arguments[first:]
        return lambda *tensors: function(*tensors, *rest)
    fixed = [None if isinstance(one, Value) else (one,) for one in arguments]

    def call(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return function(*[next(given) if one is None else one[0] for one in fixed])

    return call

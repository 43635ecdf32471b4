"""Emulate a second torch device without a GPU: its tensors compute on the CPU, but do not mix with CPU tensors.

A build of torch without CUDA cannot hold CUDA tensors. These tensors report the device "meta" and wrap a CPU tensor, so
that a whole model runs and its numbers can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("meta")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""Operators that accept tensors of two devices."""


@contextmanager
def other_device() -> Iterator[None]:
    """Allow tensors on DEVICE in this context. Operators that mix devices raise RuntimeError, as on CUDA."""
    with _Made(), _Dispatched():
        yield


class OtherTensor(torch.Tensor):
    """A tensor on DEVICE. `held` is the CPU tensor with its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OtherTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE, requires_grad=held.requires_grad
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Calls that never reach an operator. For example, torch.tensor(values, device="meta") drops its values."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            return function(*args, **kwargs | {"device": None}).to(kwargs["device"])
        if function is torch.Tensor.tolist and isinstance(
            args[0], OtherTensor
        ):  # torch does not support it for subclasses
            return args[0].held.tolist()
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1]).to(args[0].device)]
        return function(*args, **kwargs)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    has_other = any(isinstance(tensor, OtherTensor) for tensor in tensors)
    # CUDA operators accept scalars on the CPU
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OtherTensor) and tensor.dim()]
    if has_other and on_cpu and function not in MOVES:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
    device = kwargs.get("device")
    on_other = has_other if device is None else torch.device(device) == DEVICE
    args, kwargs = tree_map_only(OtherTensor, lambda tensor: tensor.held, (args, kwargs))
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    if not on_other:
        return function(*args, **kwargs)
    with torch.inference_mode(False):  # a view of a weight is not an inference tensor, so its wrapper must not be one
        return tree_map_only(torch.Tensor, OtherTensor, function(*args, **kwargs))

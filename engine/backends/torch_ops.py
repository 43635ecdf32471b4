"""The operators of bundles' ONNX graphs in torch, for the torch backend.

onnx2torch was looked at: it needs the package onnx, lacks MatMulInteger and QuantizeLinear, is tested up to opset 16,
and computes shapes on the device, which an accelerator would wait for at every step.

Each operator gets the tape, its node and its inputs: Values on the device, numpy arrays on the host, or None for an
input that is left out. Tensors are not indexed with [], which FakeTensorMode does not support for a device that this
build of torch lacks (tests/parity/test_torch.py).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.torch_tape import Known, Tape, Value
from engine.bundle.onnx import DTYPES, Node

TYPES = {
    np.float32: torch.float32,
    np.float16: torch.float16,
    np.float64: torch.float64,
    np.uint8: torch.uint8,
    np.int8: torch.int8,
    np.int32: torch.int32,
    np.int64: torch.int64,
    np.bool_: torch.bool,
}
"""numpy's types and torch's."""
EXACT = 2**24
"""float32 holds integers up to this one exactly. Sums of products of 8-bit integers that stay below it are exact in any
order, so int8 bundles give exact integer sums on every device; few of them multiply integers.
"""
Operator = Callable[..., Any]
"""(tape, node, *inputs) -> a Value, an array, or a list of them."""


class UnsupportedError(ValueError):
    """A node needs what this file does not have."""


def host(value: Known | None, what: str) -> NDArray[Any]:
    """Return a value that must be on the host. Raises UnsupportedError if it depends on numbers on the device."""
    if value is None or isinstance(value, Value):
        raise UnsupportedError(f"{what} must not depend on the numbers of an input")
    return value


def sizes(value: Known | None, what: str) -> list[int]:
    """Return integers that must be on the host."""
    return [int(size) for size in host(value, what).reshape(-1)]


def elementwise(on_host: Callable[..., Any], on_device: Callable[..., Any]) -> Operator:
    """Return an operator that broadcasts. Host values with one element are passed to torch as Python numbers."""

    def run(tape: Tape, _: Node, *inputs: Known) -> Known:
        if not any(isinstance(one, Value) for one in inputs):
            return np.asarray(on_host(*inputs))
        rank = max(len(one.shape) for one in inputs if isinstance(one, Value))
        arguments = [
            one.item() if not isinstance(one, Value) and one.size == 1 and one.ndim <= rank else tape.on_device(one)
            for one in inputs
        ]
        if not isinstance(arguments[0], Value):  # not every function of torch takes a number first
            arguments[0] = tape.on_device(inputs[0])
        return tape(on_device, *arguments)

    return run


def _divide_on_host(a: NDArray[Any], b: NDArray[Any]) -> Any:
    if np.issubdtype(np.result_type(a, b), np.integer):
        return np.trunc(a / b).astype(np.result_type(a, b))  # shapes are far below 2**53
    return a / b


def _divide(a: Tensor, b: Any) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _where(tape: Tape, _: Node, condition: Known, a: Known, b: Known) -> Known:
    if not any(isinstance(one, Value) for one in (condition, a, b)):
        return np.where(condition, a, b)  # type: ignore[arg-type]  # all are arrays
    numbers = [one.item() if not isinstance(one, Value) and one.size == 1 else tape.on_device(one) for one in (a, b)]
    made = tape(torch.where, tape.on_device(condition), *numbers)
    if not any(isinstance(one, Value) for one in numbers):  # torch chooses the type of two numbers
        made = tape.cast(made, TYPES[host(a, "").dtype.type])
    return made


def _clip(tape: Tape, _: Node, x: Known, low: Known | None = None, high: Known | None = None) -> Known:
    limits = [None if one is None else host(one, "a limit of Clip").item() for one in (low, high)]
    return tape(torch.clamp, x, *limits) if isinstance(x, Value) else np.clip(x, *limits)


def _max(tape: Tape, _: Node, *inputs: Known) -> Known:
    found = inputs[0]
    for one in inputs[1:]:
        if not isinstance(found, Value) and not isinstance(one, Value):
            found = np.maximum(found, one)
        elif isinstance(found, Value) and not isinstance(one, Value) and one.size == 1 and one.ndim <= len(found.shape):
            found = tape(torch.clamp, found, one.item())
        else:
            found = tape(torch.maximum, tape.on_device(found), tape.on_device(one))
    return found


def _cast(tape: Tape, node: Node, x: Known) -> Known:
    dtype = DTYPES[node.attributes["to"]]
    if not isinstance(x, Value):
        return x.astype(dtype)
    if dtype == np.float32 and x.is_constant and x.tensor.is_floating_point() and tape.store.half is not None:
        return x  # a weight that is stored as float16, and was cast to half precision
    return tape.cast(x, TYPES[dtype])


def _shape(_: Tape, node: Node, x: Known) -> NDArray[np.int64]:
    return np.array(x.shape, np.int64)[node.attributes.get("start", 0) : node.attributes.get("end")]


def _constant(_: Tape, node: Node) -> NDArray[Any]:
    value = node.attributes.get("value")
    if not isinstance(value, np.ndarray):
        raise UnsupportedError("a constant that is not a tensor")
    return value


def _constant_of_shape(_: Tape, node: Node, shape: Known) -> NDArray[Any]:
    value = node.attributes.get("value", np.zeros(1, np.float32))
    return np.broadcast_to(np.asarray(value).reshape(()), sizes(shape, "a shape"))


def _range(_: Tape, __: Node, *limits: Known) -> NDArray[Any]:
    return np.arange(*(host(one, "a limit of Range").item() for one in limits))


def _reshape(tape: Tape, node: Node, x: Known, shape: Known) -> Known:
    dims = sizes(shape, "a shape")
    if not node.attributes.get("allowzero"):
        dims = [x.shape[i] if size == 0 else size for i, size in enumerate(dims)]
    return tape(Tensor.reshape, x, dims) if isinstance(x, Value) else x.reshape(dims)


def _flatten(tape: Tape, node: Node, x: Known) -> Known:
    axis = _axis(node, x, 1)
    dims = [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])]
    return tape(Tensor.reshape, x, dims) if isinstance(x, Value) else x.reshape(dims)


def _axis(node: Node, x: Known, default: int) -> int:
    axis = node.attributes.get("axis", default)
    assert isinstance(axis, int)
    return axis + len(x.shape) if axis < 0 else axis


def _expand(tape: Tape, _: Node, x: Known, shape: Known) -> Known:
    dims = np.broadcast_shapes(x.shape, tuple(sizes(shape, "a shape")))
    return tape(Tensor.expand, x, dims) if isinstance(x, Value) else np.broadcast_to(x, dims)


def _unsqueeze(tape: Tape, _: Node, x: Known, axes: Known) -> Known:
    given = sizes(axes, "an axis")
    rank = len(x.shape) + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = tape(torch.unsqueeze, x, axis) if isinstance(x, Value) else np.expand_dims(x, axis)
    return x


def _squeeze(tape: Tape, _: Node, x: Known, axes: Known | None = None) -> Known:
    rank = len(x.shape)
    given = [i for i in range(rank) if x.shape[i] == 1] if axes is None else sizes(axes, "an axis")
    for axis in sorted((axis % rank for axis in given), reverse=True):
        x = tape(torch.squeeze, x, axis) if isinstance(x, Value) else np.squeeze(x, axis)
    return x


def _transpose(tape: Tape, node: Node, x: Known) -> Known:
    order = node.attributes.get("perm", tuple(range(len(x.shape)))[::-1])
    return tape(torch.permute, x, order) if isinstance(x, Value) else np.transpose(x, order)


def _concat(tape: Tape, node: Node, *inputs: Known) -> Known:
    axis = _axis(node, inputs[0], 0)
    if not any(isinstance(one, Value) for one in inputs):
        return np.concatenate(inputs, axis)  # type: ignore[arg-type]  # all are arrays
    return tape(lambda *tensors: torch.cat(tensors, axis), *map(tape.on_device, inputs))


def _slice(tape: Tape, _: Node, x: Known, starts: Known, ends: Known, axes: Any = None, steps: Any = None) -> Known:
    first, last = sizes(starts, "a limit of Slice"), sizes(ends, "a limit of Slice")
    which = range(len(first)) if axes is None else sizes(axes, "an axis")
    strides = [1] * len(first) if steps is None else sizes(steps, "a step of Slice")
    for axis, start, end, step in zip(which, first, last, strides, strict=True):
        picked = range(x.shape[axis])[start:end:step]
        if isinstance(x, Value):
            if step == 1:
                x = tape(torch.narrow, x, axis, picked.start if picked else 0, len(picked))
            else:
                x = tape(torch.index_select, x, axis, tape.on_device(np.array(picked)))
        else:
            x = np.take(x, picked, axis)
    return x


def _split(tape: Tape, node: Node, x: Value, split: Known | None = None) -> list[Value]:
    axis, count = _axis(node, x, 0), len(node.outputs)
    parts = [-(-x.shape[axis] // count)] * count if split is None else sizes(split, "a size of Split")
    parts[-1] = x.shape[axis] - sum(parts[:-1])
    edges = np.cumsum([0, *parts])
    return [tape(torch.narrow, x, axis, int(edge), size) for edge, size in zip(edges, parts, strict=False)]


def _pad(tape: Tape, node: Node, x: Value, pads: Known, value: Known | None = None, axes: Any = None) -> Value:
    if node.attributes.get("mode", "constant") != "constant":
        raise UnsupportedError("a mode other than constant")
    before_after, rank = sizes(pads, "a size of Pad"), len(x.shape)
    which = list(range(rank)) if axes is None else [axis % rank for axis in sizes(axes, "an axis")]
    by_axis = {axis: (before_after[i], before_after[len(which) + i]) for i, axis in enumerate(which)}
    flat = [size for axis in reversed(range(rank)) for size in by_axis.get(axis, (0, 0))]  # torch starts at the last
    return tape(F.pad, x, flat, "constant", 0 if value is None else host(value, "the value of Pad").item())


def _gather(tape: Tape, node: Node, x: Known, indices: Known) -> Known:
    axis = _axis(node, x, 0)
    if not isinstance(x, Value) and not isinstance(indices, Value):
        return np.take(x, indices, axis)
    if not isinstance(indices, Value) and isinstance(x, Value):
        if indices.size == 1:
            one = tape(torch.narrow, x, axis, int(indices.item()) % x.shape[axis], 1)
            return tape(Tensor.reshape, one, [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])
        indices = indices % x.shape[axis]
    # negative indices that are computed on the device are not handled: torch reports them as out of range
    data, rows = tape.on_device(x), tape.on_device(indices)
    if axis == 0 and len(data.shape) == 2:
        return tape(F.embedding, rows, data)
    picked = tape(torch.index_select, data, axis, tape(Tensor.reshape, rows, [-1]))
    return tape(Tensor.reshape, picked, [*data.shape[:axis], *rows.shape, *data.shape[axis + 1 :]])


def _gather_elements(tape: Tape, node: Node, x: Known, indices: Known) -> Value:
    return tape(torch.gather, tape.on_device(x), _axis(node, x, 0), tape.on_device(indices))


def _scatter_elements(tape: Tape, node: Node, x: Known, indices: Known, updates: Known) -> Value:
    if node.attributes.get("reduction", "none") != "none":
        raise UnsupportedError("a reduction")
    data, axis = tape.on_device(x), _axis(node, x, 0)
    return tape(torch.scatter, data, axis, tape.on_device(indices), tape.on_device(updates))


def _scatter_nd(_: Tape, node: Node, x: Known, indices: Known, updates: Known) -> NDArray[Any]:
    if node.attributes.get("reduction", "none") != "none":
        raise UnsupportedError("a reduction")
    made = host(x, "the data of ScatterND").copy()  # masks of windows and tables of positions
    made[tuple(np.moveaxis(host(indices, "an index"), -1, 0))] = host(updates, "an update")
    return made


def _resize(_: Tape, __: Node, x: Known, roi: Any = None, scales: Any = None, shape: Known | None = None) -> Known:
    if roi is not None or scales is not None or tuple(sizes(shape, "a size of Resize")) != tuple(x.shape):
        raise UnsupportedError("another size than that of its input")
    return x  # a table of positions for the size of its images


def _top_k(tape: Tape, node: Node, x: Value, k: Known) -> list[Value]:
    (count,) = sizes(k, "the number of candidates")
    largest, is_sorted = (bool(node.attributes.get(name, 1)) for name in ("largest", "sorted"))
    return tape.several(torch.topk, x, count, _axis(node, x, -1), largest, is_sorted)


def _reduce(on_host: Callable[..., Any], on_device: Callable[..., Tensor]) -> Operator:
    def run(tape: Tape, node: Node, x: Known, axes: Known | None = None) -> Known:
        if axes is None and node.attributes.get("noop_with_empty_axes"):
            return x
        which = list(range(len(x.shape))) if axes is None else sizes(axes, "an axis")
        keepdims = bool(node.attributes.get("keepdims", 1))
        if isinstance(x, Value):
            return tape(on_device, x, which, keepdims)
        return np.asarray(on_host(x, axis=tuple(which), keepdims=keepdims))

    return run


def _over_axis(function: Callable[..., Tensor]) -> Operator:
    def run(tape: Tape, node: Node, x: Value) -> Value:
        return tape(function, x, _axis(node, x, -1))

    return run


def _one_input(function: Callable[..., Tensor]) -> Operator:
    def run(tape: Tape, _: Node, x: Known) -> Value:
        return tape(function, tape.on_device(x))

    return run


def _gelu(tape: Tape, node: Node, x: Value) -> Value:
    approximate = node.attributes.get("approximate", "none")
    return tape(lambda tensor: F.gelu(tensor, approximate=approximate), x)


def _layer_norm(tape: Tape, node: Node, x: Value, scale: Known, bias: Known | None = None) -> Value:
    dims = x.shape[_axis(node, x, -1) :]
    epsilon = node.attributes.get("epsilon", 1e-5)
    if bias is None:
        return tape(lambda a, b: F.layer_norm(a, dims, b, None, epsilon), x, tape.on_device(scale))
    three = (x, tape.on_device(scale), tape.on_device(bias))
    return tape(lambda a, b, c: F.layer_norm(a, dims, b, c, epsilon), *three)


def _mat_mul(tape: Tape, _: Node, a: Known, b: Known) -> Value:
    return tape(torch.matmul, tape.on_device(a), tape.on_device(b))


def _gemm(tape: Tape, node: Node, a: Known, b: Known, c: Known | None = None) -> Value:
    alpha, beta = (node.attributes.get(name, 1.0) for name in ("alpha", "beta"))
    turned_a, turned_b = (node.attributes.get(name, 0) for name in ("transA", "transB"))
    x, weight = tape.on_device(a), tape.on_device(b)
    x = tape(torch.t, x) if turned_a else x
    weight = weight if turned_b else tape(torch.t, weight)
    if c is None or alpha != 1.0 or beta != 1.0 or len(c.shape) != 1:
        made = tape(lambda one, two: F.linear(one, two) * alpha, x, weight)
        return made if c is None else tape(lambda one, two: one + two * beta, made, tape.on_device(c))
    return tape(F.linear, x, weight, tape.on_device(c))


def _conv(tape: Tape, node: Node, x: Value, weight: Known, bias: Known | None = None) -> Value:
    rank = len(x.shape) - 2
    if node.attributes.get("auto_pad", "NOTSET") != "NOTSET" or rank != 2:
        raise UnsupportedError("automatic padding, or another number of axes than two")
    strides, dilations = (node.attributes.get(name, (1,) * rank) for name in ("strides", "dilations"))
    pads = node.attributes.get("pads", (0,) * 2 * rank)
    assert isinstance(pads, tuple)
    if pads[:rank] != pads[rank:]:
        raise UnsupportedError("padding that differs between the sides")
    group = node.attributes.get("group", 1)
    inputs = (x, tape.on_device(weight), *(() if bias is None else (tape.on_device(bias),)))
    return tape(
        lambda image, kernel, offset=None: F.conv2d(image, kernel, offset, strides, pads[:rank], dilations, group),
        *inputs,
    )


def _quantize_linear(tape: Tape, _: Node, x: Value, scale: Known, zero: Known) -> Value:
    step, offset = host(scale, "a scale").item(), host(zero, "a zero point")
    if offset.dtype != np.uint8:
        raise UnsupportedError("another type than uint8")
    middle = offset.item()
    # both round halves to even
    return tape(lambda tensor: torch.clamp(torch.round(tensor / step) + middle, 0, 255).to(torch.uint8), x)


def _mat_mul_integer(
    tape: Tape, _: Node, a: Value, b: Known, a_zero: Known | None = None, b_zero: Known | None = None
) -> Value:
    zeros = [0 if one is None else host(one, "a zero point").item() for one in (a_zero, b_zero)]
    weight = tape.cast(tape.on_device(b), torch.float32)
    length = a.shape[-1]
    largest, largest_weight = (max(zero, 255 - zero) for zero in (zeros[0], zeros[1] + 128))  # of u8 and i8
    terms = EXACT // (largest * largest_weight)

    def product(rows: Tensor, columns: Tensor) -> Tensor:
        rows, columns = rows.to(torch.float32) - zeros[0], columns - zeros[1] if zeros[1] else columns
        parts = [
            torch.matmul(rows.narrow(-1, at, size), columns.narrow(-2, at, size)).to(torch.int32)
            for at in range(0, length, terms)
            for size in (min(terms, length - at),)
        ]
        return sum(parts[1:], parts[0])

    return tape(product, a, weight)


def _attention(tape: Tape, node: Node, q: Value, k: Value, v: Value, mask: Known | None = None, *past: Known) -> Value:
    if any(one is not None for one in past) or node.attributes.get("softcap", 0) or len(node.outputs) > 1:
        raise UnsupportedError("a cache, a soft cap or more than one output")
    scale, is_causal = node.attributes.get("scale"), bool(node.attributes.get("is_causal", 0))
    is_flat = len(q.shape) == 3
    if is_flat:  # [B,T,H*d] to [B,H,T,d]
        counts = (node.attributes[name] for name in ("q_num_heads", "kv_num_heads", "kv_num_heads"))
        q, k, v = (
            tape(torch.transpose, tape(Tensor.reshape, one, [*one.shape[:2], heads, -1]), 1, 2)
            for one, heads in zip((q, k, v), counts, strict=True)
        )
    shared = q.shape[1] != k.shape[1]
    inputs = (q, k, v, *(() if mask is None else (tape.on_device(mask),)))
    mixed: Value = tape(
        lambda a, b, c, bias=None: F.scaled_dot_product_attention(
            a, b, c, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=shared
        ),
        *inputs,
    )
    if is_flat:
        mixed = tape(Tensor.reshape, tape(torch.transpose, mixed, 1, 2), [mixed.shape[0], mixed.shape[2], -1])
    return mixed


def _identity(_: Tape, __: Node, x: Known) -> Known:
    return x


OPERATORS: dict[str, Operator] = {
    "Abs": _one_input(torch.abs),
    "Add": elementwise(operator.add, operator.add),
    "And": elementwise(np.logical_and, torch.logical_and),
    "Attention": _attention,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Div": elementwise(_divide_on_host, _divide),
    "Equal": elementwise(operator.eq, operator.eq),
    "Erf": _one_input(torch.erf),
    "Exp": _one_input(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": elementwise(operator.gt, operator.gt),
    "GreaterOrEqual": elementwise(operator.ge, operator.ge),
    "Identity": _identity,
    "LayerNormalization": _layer_norm,
    "Less": elementwise(operator.lt, operator.lt),
    "LessOrEqual": elementwise(operator.le, operator.le),
    "LogSoftmax": _over_axis(torch.log_softmax),
    "MatMul": _mat_mul,
    "MatMulInteger": _mat_mul_integer,
    "Max": _max,
    "Mod": elementwise(np.mod, torch.remainder),
    "Mul": elementwise(operator.mul, operator.mul),
    "Neg": _one_input(torch.neg),
    "Not": _one_input(torch.logical_not),
    "Or": elementwise(np.logical_or, torch.logical_or),
    "Pad": _pad,
    "Pow": elementwise(operator.pow, operator.pow),
    "QuantizeLinear": _quantize_linear,
    "Range": _range,
    "ReduceMax": _reduce(np.max, torch.amax),
    "ReduceMean": _reduce(np.mean, torch.mean),
    "ReduceSum": _reduce(np.sum, torch.sum),
    "Relu": _one_input(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _one_input(torch.round),
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Sigmoid": _one_input(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _over_axis(torch.softmax),
    "Split": _split,
    "Sqrt": _one_input(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": elementwise(operator.sub, operator.sub),
    "Tanh": _one_input(torch.tanh),
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
"""Kind of node -> the function that runs it."""


def run_node(tape: Tape, node: Node, inputs: Sequence[Known | None]) -> list[Known]:
    """Run one node and return its outputs.

    In half precision, float32 tensors that meet others of half precision are rounded to it, as a fp16 export does with
    pixels and masks. Raises UnsupportedError for an operator that is not in OPERATORS.
    """
    if node.kind not in OPERATORS:
        raise UnsupportedError("an unknown operator")
    if tape.store.half is not None:
        on_device = [one for one in inputs if isinstance(one, Value) and one.tensor.is_floating_point()]
        if len({one.tensor.dtype for one in on_device}) > 1:
            half = tape.store.half
            inputs = [tape.cast(one, half) if any(one is other for other in on_device) else one for one in inputs]  # type: ignore[arg-type]
    made = OPERATORS[node.kind](tape, node, *inputs)
    return made if isinstance(made, list) else [made]

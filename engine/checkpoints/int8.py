"""Weights in 8 bits: rotated so that they have no outliers, then rounded with one scale per output. Numpy only.

A dense layer y = x W^T + b becomes, for each row x (a token or a patch) by itself,

    s = max|x| / 127,  q = round(x / s) + 128 as u8,  y = (q - 128) W8 * scale * s + b

Integer sums are exact, so a row's result does not depend on the other rows of its batch. export/graphs/quantise.py has
two variants: finer steps for the outputs of GELU, and a second rounding of what the first leaves in the decoder.

Rotation. In a transformer whose layer norms come before its layers, a few channels are many times as large as the
others, and with one scale per row these channels take up most of the 255 levels. A rotation R, an orthogonal matrix,
spreads them over all channels, and moving it into the weights changes nothing but the rounding of float32:

    What is added to the residual stream x becomes R x: tables and outputs of layers, W to R W and c to R c.
    A layer that reads LayerNorm(x) = g n + b gets W diag(g) R^T and the bias c + W b, and g becomes 1, b becomes 0.

R leaves the vector of ones as it is, so that x and R x have the same mean and variance. The values of each attention
head are rotated in the same way, and rotated back by the weights of the output projection.

References: Ashkboos et al., QuaRot and SliceGPT (2024). They replace LayerNorm by RMSNorm, so any rotation will do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
LARGEST = 127
"""Largest absolute value of a quantised weight."""
SUFFIX, SCALE_SUFFIX = ".int8", ".scale"
"""Appended to the checkpoint's name of a weight."""
SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Scale of an output whose weights are all 0."""
BEST_LOGITS = 32
"""Logits of a row that are computed again in float32, in decoders whose head shares the table of word embeddings.

They are the largest of those that are rounded once: as many as 16 beams look at, which is 2 per beam. Sampling, more
beams, and bans of some of these tokens reach logits that stay rounded.
"""
BLOCK = 128
"""Columns that are transformed at once, so that they stay in the processor's cache."""


def quantise_weight(weight: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return a dense layer's weight [outputs,inputs] as i8[inputs,outputs] and f32[outputs].

    Each output has a scale of its own: weight ≈ quantised.T * scale[:, None]. The quantised weight is transposed, as
    ONNX's MatMulInteger wants it.

        quantised, scale = quantise_weight(np.array([[1.0, -0.5]]))  # [[127], [-64]], [1 / 127]
    """
    weight = np.asarray(weight, np.float32)
    scale = np.maximum(np.abs(weight).max(1) / LARGEST, SMALLEST_SCALE).astype(np.float32)
    quantised = np.rint(weight / scale[:, None]).astype(np.int8)
    return np.ascontiguousarray(quantised.T), scale


@dataclass(frozen=True)
class Residual:
    """The residual stream of a transformer whose layer norms come before its layers, by names in the checkpoint.

    tables   embeddings f32[...,D] that are added to the stream
    outputs  layers whose outputs are added to it: weights f32[D,...] and a bias
    readers  {layer norm: layers with weights f32[outputs,D] and a bias that read it}; every layer norm of the stream
    values   {output projection of an attention: the layer whose last D outputs are the values}
    head     width of an attention head
    """

    tables: tuple[str, ...]
    outputs: tuple[str, ...]
    readers: Mapping[str, tuple[str, ...]]
    values: Mapping[str, str]
    head: int


class RotatedWeights(Mapping[str, Array]):
    """A checkpoint's weights, with those of a residual stream rotated. Each access reads and rotates a weight again."""

    def __init__(self, weights: Mapping[str, Array], residual: Residual) -> None:
        self._weights, self._residual = weights, residual
        self._norms = {layer: norm for norm, layers in residual.readers.items() for layer in layers}
        self._value_layers = set(residual.values.values())

    def __getitem__(self, name: str) -> Array:
        """Return a weight as float32."""
        array, residual = self._weights[name], self._residual
        layer, _, kind = name.rpartition(".")
        if layer in residual.readers:
            return np.ones_like(array) if kind == "weight" else np.zeros_like(array)
        if name in residual.tables:
            return rotated(array.reshape(-1, array.shape[-1]).T).T.reshape(array.shape)
        if norm := self._norms.get(layer):
            if kind == "weight":
                array = rotated((array * self._weights[f"{norm}.weight"]).T).T
            else:
                moved = self._weights[f"{layer}.weight"] * self._weights[f"{norm}.bias"]
                array = array + moved.sum(1, np.float64).astype(np.float32)
        if layer in self._value_layers:
            keys = len(array) // 3 * 2
            array = np.concatenate([array[:keys], _spread(array[keys:], residual.head)])
        if layer in residual.values and kind == "weight":
            array = _spread(array.T, residual.head).T
        return rotated(array) if layer in residual.outputs else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def rotate(weights: Mapping[str, Array], residual: Residual | None) -> Mapping[str, Array]:
    """Return weights with those of a residual stream rotated; with None all of them as they are."""
    return weights if residual is None else RotatedWeights(weights, residual)


def rotated(array: Array) -> Array:
    """Return R times an array f32[D,...].

    With D = m 2^k and m odd, R is the Kronecker product of 2/m J - I (J is all ones) and H S H / 2^k, where H is the
    Walsh-Hadamard matrix and S has 1 and then random signs on its diagonal. Both are symmetric and orthogonal, and
    leave the vector of ones as it is. Only sums and products of two numbers are computed, in a fixed order, so that
    the result has the same bits on every machine. A product of matrices would not.
    """
    power = _power_of_two(len(array))
    drawn = np.frombuffer(hashlib.shake_256(b"rotation").digest(power), np.uint8)
    signs = np.where(drawn & 1, np.float32(1), np.float32(-1))
    signs[0] = 1
    return _by_blocks(array, len(array), signs)


def _spread(array: Array, width: int) -> Array:
    """Return an array f32[n*width,...] with each `width` rows multiplied by an orthogonal, symmetric matrix."""
    return _by_blocks(array, width, None)


def _by_blocks(array: Array, width: int, signs: Array | None) -> Array:
    """Multiply each `width` rows by (2/m J - I) x H S H / 2^k, or without `signs` by (2/m J - I) x H / sqrt(2^k)."""
    power = _power_of_two(width)
    columns = np.array(array, np.float32).reshape(len(array), -1)
    for start in range(0, columns.shape[1], BLOCK):
        block = np.ascontiguousarray(columns[:, start : start + BLOCK])
        _hadamard(block, power)
        if signs is None:
            block *= np.float32(1 / np.sqrt(power))
        else:
            rows = block.reshape(-1, power, block.shape[1])
            rows *= signs[:, None] / np.float32(power)
            _hadamard(block, power)
        if power < width:
            parts = block.reshape(-1, width // power, power, block.shape[1])
            total = parts[:, 0].copy()
            for i in range(1, parts.shape[1]):  # not sum(), which may add in any order
                total += parts[:, i]
            np.subtract(np.float32(2 * power / width) * total[:, None], parts, out=parts)
        columns[:, start : start + BLOCK] = block
    return columns.reshape(array.shape)


def _hadamard(block: Array, power: int) -> None:
    """Multiply each `power` rows, a power of two, of f32[n*power,columns] by the Walsh-Hadamard matrix, in place."""
    half = 1
    while half < power:
        pairs = block.reshape(-1, 2, half, block.shape[1])
        difference = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] += pairs[:, 1]
        pairs[:, 1] = difference
        half *= 2


def _power_of_two(width: int) -> int:
    """Return the largest power of two that divides a width."""
    return width & -width

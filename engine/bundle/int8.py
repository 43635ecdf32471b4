"""Weights in 8 bits: one scale per output. Numpy only, for the export and for converting checkpoints without torch.

A dense layer y = x W^T + b becomes, for each row x (a token or a patch) by itself,

    s = max|x| / 127,  q = round(x / s) + 128 as u8,  y = (q - 128) W8 * scale * s + b

Integer sums are exact, so a row's result does not depend on the other rows of its batch. export/graphs/quantise.py has
two variants: finer steps for the outputs of GELU, and a second rounding of what the first leaves in the decoder.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST = 127
"""Largest absolute value of a quantised weight."""
SUFFIX, SCALE_SUFFIX = ".int8", ".scale"
"""Appended to the checkpoint's name of a weight."""
SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Scale of an output whose weights are all 0."""


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

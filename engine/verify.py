"""Replay a bundle's golden recordings: PyTorch's own answers, stored at export, checked without PyTorch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends import Backend
from engine.bundle import Bundle
from engine.captioner import Captioner
from engine.decoding.scheduler import Scheduler
from engine.errors import BundleError
from engine.options import DecodeOptions

SCORE_TOLERANCE = {"fp32": 1e-4}
"""Largest accepted difference of a score, relative where it is beyond -1: float32 sums over a caption agree to about
1e-5 between two programs."""


@dataclass(frozen=True)
class Check:
    """One golden setting: how many images gave PyTorch's ids, and the largest difference of their scores.

    The difference is divided by the score where that is beyond -1 (length penalties make scores of any size).
    """

    setting: str
    images: int
    identical: int
    max_score_difference: float
    passed: bool


def verify(bundle: Bundle, backend: Backend) -> list[Check]:
    """Replay every setting recorded in golden.npz and return a Check each.

    A setting passes when every image's ids equal PyTorch's and the scores agree within SCORE_TOLERANCE. Raises
    BundleError when the recording cannot be read.
    """
    path = bundle.path / "golden.npz"
    try:
        with np.load(path, allow_pickle=False) as archive:
            golden = {name: archive[name] for name in archive.files}
        settings: list[dict[str, Any]] = json.loads(str(golden["settings"]))
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"{path} cannot be read ({error}): export the bundle again") from error
    captioner = Captioner(bundle, backend)
    return [
        _replay(captioner, golden["pixel_values"], options, golden[f"ids.{i}"], golden[f"scores.{i}"])
        for i, options in enumerate(settings)
    ]


def _replay(
    captioner: Captioner,
    pixel_values: NDArray[np.uint8],
    options: dict[str, Any],
    ids: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> Check:
    """Decode once; ids i64[N,L] are padded with -1, scores f32[N] are NaN where PyTorch reports none (greedy)."""
    search = captioner.search(DecodeOptions(**options))
    scheduler = Scheduler(captioner.backend, search, num_slots=len(pixel_values))
    results = dict(scheduler.decode(pixel_values))
    best = [results[i][0] for i in range(len(pixel_values))]
    identical = sum(h.ids == tuple(row[row >= 0].tolist()) for h, row in zip(best, ids, strict=True))
    recorded = ~np.isnan(scores)
    found = np.array([h.score for h in best], np.float32)[recorded]
    differences = np.abs(found - scores[recorded]) / np.maximum(1, np.abs(scores[recorded]))
    largest = float(differences.max(initial=0.0))
    tolerance = SCORE_TOLERANCE.get(captioner.bundle.precision, SCORE_TOLERANCE["fp32"])
    name = ", ".join(f"{key} {value}" for key, value in options.items())
    return Check(name, len(best), identical, largest, identical == len(best) and bool(largest <= tolerance))

"""Replay a bundle's golden recordings: PyTorch's own answers, stored at export, checked without PyTorch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends import OF_ENSEMBLES, Backend, open_backend, require_backend
from engine.bundle.manifest import Bundle
from engine.bundle.open import on_halves
from engine.captioner import Captioner
from engine.decoding.beam import Hypothesis
from engine.decoding.scheduler import Scheduler
from engine.errors import BundleError
from engine.options import options_from
from engine.runtime import Runtime

Ids = tuple[int, ...]

UNRECORDED = -1
SCORE_TOLERANCE = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.4}
"""Largest accepted difference of a score from PyTorch's in float32, relative where it is beyond -1.

fp32: sums over a caption agree to about 1e-5 between two programs. fp16: a logit between 16 and 32 is rounded by up to
2^-7 = 0.008, and a score is a mean of such; 0.005 is the most seen (tiny random models; the demo 0.0005). int8: 0.21 is
the most seen (tiny random models; the demo 0.02), twice that: loose, and so the ids are what this check rests on."""


@dataclass(frozen=True)
class Check:
    """One golden setting: how many images gave PyTorch's ids, and the largest difference of their scores.

    The difference is divided by the score where that is beyond -1 (length penalties make scores of any size). With
    num_return_sequences the ids of every recorded alternative count.
    """

    setting: str
    images: int
    identical: int
    max_score_difference: float
    passed: bool

    def __str__(self) -> str:
        return (
            f"{self.identical} of {self.images} golden images get PyTorch's ids, scores differ by up to "
            f"{self.max_score_difference:.1e} ({self.setting})"
        )


@dataclass(frozen=True)
class Golden:
    """What golden.npz holds.

    pixel_values u8[N,height,width,3]; for each setting (DecodeOptions by name) ids i64[N,L], padded with UNRECORDED,
    and scores f32[N], NaN where PyTorch reports none (greedy). A row of UNRECORDED alone is an image that is skipped,
    because two of its candidates tie or the bundle's precision changes its caption. `alternatives` i64[N,n-1,L] has, by
    setting, the ids of the captions after the best where num_return_sequences n is larger than 1.
    """

    pixel_values: NDArray[np.uint8]
    settings: list[dict[str, Any]]
    ids: list[NDArray[np.int64]]
    scores: list[NDArray[np.float32]]
    alternatives: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read golden.npz; raise BundleError when it cannot be read."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                settings = json.loads(str(archive["settings"]))
                ids = [archive[f"ids.{i}"] for i in range(len(settings))]
                scores = [archive[f"scores.{i}"] for i in range(len(settings))]
                names = {i: f"alternatives.{i}" for i in range(len(settings))}
                alternatives = {i: archive[name] for i, name in names.items() if name in archive}
                return cls(archive["pixel_values"], settings, ids, scores, alternatives)
        except (OSError, ValueError, KeyError) as error:
            raise BundleError(f"{path} cannot be read ({error}): export the bundle again") from error

    def save(self, path: Path) -> None:
        """Write golden.npz."""
        arrays: dict[str, Any] = {f"ids.{i}": ids for i, ids in enumerate(self.ids)}
        arrays |= {f"scores.{i}": scores for i, scores in enumerate(self.scores)}
        arrays |= {f"alternatives.{i}": ids for i, ids in self.alternatives.items()}
        settings = np.array(json.dumps(self.settings))
        np.savez_compressed(path, pixel_values=self.pixel_values, settings=settings, **arrays)

    def expected(self, setting: int) -> list[tuple[int, ...] | None]:
        """Return the recorded ids of each image's best caption, None where the image is skipped."""
        return [_recorded(row) or None for row in self.ids[setting]]

    def n_best(self, setting: int) -> list[list[Ids]]:
        """Return the recorded ids of each image's captions, best first: none where the image is skipped."""
        found = [[best] if best else [] for best in self.expected(setting)]
        for captions, rows in zip(found, self.alternatives.get(setting, ()), strict=False):
            captions += [ids for row in rows if captions and (ids := _recorded(row))]
        return found

    def skip(self, setting: int, image: int, rank: int) -> None:
        """Remove an image's captions from `rank` on from the recording of a setting; with 0 all of them."""
        if rank == 0:
            self.ids[setting][image] = UNRECORDED
        if setting in self.alternatives:
            self.alternatives[setting][image, max(0, rank - 1) :] = UNRECORDED


def _recorded(row: NDArray[np.int64]) -> Ids:
    return tuple(row[row != UNRECORDED].tolist())


def first_difference(found: list[Hypothesis], expected: list[Ids]) -> int | None:
    """Return the first rank at which an image's captions have other ids than the recorded ones; None if none has."""
    ours = [hypothesis.ids for hypothesis in found[: len(expected)]]
    return next((rank for rank, ids in enumerate(expected) if ours[rank : rank + 1] != [ids]), None)


def verify(bundle: Bundle, backend: Backend) -> list[Check]:
    """Replay every setting recorded in golden.npz and return a Check each.

    A setting passes when every image's ids equal PyTorch's and the scores agree within SCORE_TOLERANCE; captions that
    another precision changes were left out of the recording at export (manifest.json, `conversion`). Raises
    BundleError when the recording cannot be read.
    """
    golden, captioner = Golden.load(bundle.path / "golden.npz"), Captioner(bundle, backend)
    return [_check(captioner, golden, setting) for setting in range(len(golden.settings))]


def verify_halves(bundle: Bundle, runtime: Runtime) -> list[Check]:
    """Replay the settings on the halves of the decoder, by which bundles caption together, as `verify` does.

    Only those that `same_on_halves` names. Returns no checks for a bundle without halves, or if `runtime` is not a
    backend for several bundles.
    """
    single = on_halves(bundle)
    if single is None or require_backend(runtime.backend) not in OF_ENSEMBLES:
        return []
    golden, captioner = Golden.load(bundle.path / "golden.npz"), Captioner(single, open_backend(single, runtime))
    checks = [_check(captioner, golden, number) for number in same_on_halves(golden)]
    return [replace(check, setting=f"as one of several bundles: {check.setting}") for check in checks]


def same_on_halves(golden: Golden) -> list[int]:
    """Return the numbers of the settings under which one bundle gives the same captions on its halves.

    This does not include greedy search with a repetition penalty: Hugging Face divides logits by it, and the halves
    have only log-probabilities.
    """
    return [
        number
        for number, setting in enumerate(golden.settings)
        if setting.get("num_beams", 1) > 1 or setting.get("repetition_penalty", 1.0) == 1.0
    ]


def replay(captioner: Captioner, golden: Golden, setting: int) -> list[list[Hypothesis]]:
    """Decode the golden images under one setting; return the num_return_sequences hypotheses of each, best first."""
    search = captioner.search(options_from({}, golden.settings[setting]))
    scheduler = Scheduler(captioner.backend, search, num_slots=len(golden.pixel_values))
    results = dict(scheduler.decode(golden.pixel_values))
    return [results[i] for i in range(len(results))]


def _check(captioner: Captioner, golden: Golden, setting: int) -> Check:
    found = replay(captioner, golden, setting)
    expected, scores = golden.n_best(setting), golden.scores[setting]
    recorded = [i for i, captions in enumerate(expected) if captions]
    identical = sum(first_difference(found[i], expected[i]) is None for i in recorded)
    scored = [i for i in recorded if not np.isnan(scores[i])]
    differences = [abs(found[i][0].score - scores[i]) / max(1.0, abs(scores[i])) for i in scored]
    largest = float(max(differences, default=0.0))
    tolerance = SCORE_TOLERANCE[captioner.bundle.precision]
    passed = identical == len(recorded) and all(difference <= tolerance for difference in differences)
    name = ", ".join(f"{key} {value}" for key, value in golden.settings[setting].items())
    return Check(name, len(recorded), identical, largest, passed)

"""Replay a bundle's golden recordings: compare captions with those of PyTorch, recorded at export, without PyTorch."""

from __future__ import annotations

import json
import zipfile
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
from engine.options import DecodeOptions, options_from
from engine.runtime import Runtime

Ids = tuple[int, ...]

UNRECORDED = -1
TASK = "task"
"""Name of the task in a recorded setting, next to the decoding options."""
SCORE_TOLERANCE = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.4}
"""Largest accepted difference of a score from PyTorch's in float32; relative for scores below -1.

fp32: sums over a caption agree to about 1e-5 between two programs. fp16: a logit between 16 and 32 is rounded by up to
2^-7 = 0.008, and a score is a mean of logits; the largest difference seen is 0.005 (tiny random models; the demo:
0.0005). int8: twice the largest difference seen, 0.21 (tiny random models; the demo: 0.02). This is loose, so for int8
the check relies on the ids.
"""


@dataclass(frozen=True)
class Check:
    """The result for one golden setting: how many images got PyTorch's ids, and the largest difference of scores.

    For scores below -1 the difference is divided by the score, because length penalties scale scores arbitrarily. With
    num_return_sequences, an image is identical only if all of its recorded captions are. `left_out` counts the images
    without a recorded caption: their candidates tie, or they get another caption in the bundle's precision.
    """

    setting: str
    images: int
    identical: int
    max_score_difference: float
    passed: bool
    left_out: int = 0

    def __str__(self) -> str:
        return (
            f"{self.identical} of {self.images} golden images get PyTorch's ids, scores differ by up to "
            f"{self.max_score_difference:.1e} ({self.setting})"
        )


@dataclass(frozen=True)
class Golden:
    """The content of golden.npz.

    pixel_values u8[N,height,width,3]. For each setting (DecodeOptions by name, and TASK for models with tasks): ids
    i64[N,L], padded with UNRECORDED, and scores f32[N], NaN if PyTorch reports no score (greedy search). A row that is
    all UNRECORDED is an image that is skipped, because two of its candidates tie or the bundle's precision changes its
    caption. For settings with num_return_sequences n > 1, `alternatives` i64[N,n-1,L] has the ids of the captions after
    the best one.
    """

    pixel_values: NDArray[np.uint8]
    settings: list[dict[str, Any]]
    ids: list[NDArray[np.int64]]
    scores: list[NDArray[np.float32]]
    alternatives: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read golden.npz. Raises BundleError if it cannot be read."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                settings = json.loads(str(archive["settings"]))
                ids = [archive[f"ids.{i}"] for i in range(len(settings))]
                scores = [archive[f"scores.{i}"] for i in range(len(settings))]
                names = {i: f"alternatives.{i}" for i in range(len(settings))}
                alternatives = {i: archive[name] for i, name in names.items() if name in archive}
                return cls(archive["pixel_values"], settings, ids, scores, alternatives)
        except FileNotFoundError as error:
            raise BundleError(
                f"{path.parent} has no recorded answers of PyTorch, because it was converted without torch: export the "
                "checkpoint with `python -m export` to record them"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path} cannot be read ({error}): export the bundle again") from error

    def save(self, path: Path) -> None:
        """Write golden.npz."""
        arrays: dict[str, Any] = {f"ids.{i}": ids for i, ids in enumerate(self.ids)}
        arrays |= {f"scores.{i}": scores for i, scores in enumerate(self.scores)}
        arrays |= {f"alternatives.{i}": ids for i, ids in self.alternatives.items()}
        settings = np.array(json.dumps(self.settings))
        np.savez_compressed(path, pixel_values=self.pixel_values, settings=settings, **arrays)

    def expected(self, setting: int) -> list[tuple[int, ...] | None]:
        """Return the recorded ids of each image's best caption, or None for a skipped image."""
        return [_recorded(row) or None for row in self.ids[setting]]

    def n_best(self, setting: int) -> list[list[Ids]]:
        """Return the recorded ids of each image's captions, best first; an empty list for a skipped image."""
        recorded = [[best] if best else [] for best in self.expected(setting)]
        for captions, rows in zip(recorded, self.alternatives.get(setting, ()), strict=False):
            captions += [ids for row in rows if captions and (ids := _recorded(row))]
        return recorded

    def options(self, setting: int) -> DecodeOptions:
        """Return the decoding options of a setting."""
        return options_from({}, {name: value for name, value in self.settings[setting].items() if name != TASK})

    def of_task(self, task: str | None) -> list[int]:
        """Return the indices of the settings that were recorded for a task; None for models without tasks."""
        return [number for number, setting in enumerate(self.settings) if setting.get(TASK) == task]

    def skip(self, setting: int, image: int, rank: int) -> None:
        """Remove an image's captions of `rank` and below from the recording of a setting; rank 0 removes all."""
        if rank == 0:
            self.ids[setting][image] = UNRECORDED
        if setting in self.alternatives:
            self.alternatives[setting][image, max(0, rank - 1) :] = UNRECORDED


def _recorded(row: NDArray[np.int64]) -> Ids:
    return tuple(row[row != UNRECORDED].tolist())


def first_difference(hypotheses: list[Hypothesis], expected: list[Ids]) -> int | None:
    """Return the first rank at which an image's captions differ from the recorded ids, or None if all are equal."""
    ours = [hypothesis.ids for hypothesis in hypotheses[: len(expected)]]
    return next((rank for rank, ids in enumerate(expected) if ours[rank : rank + 1] != [ids]), None)


def verify(bundle: Bundle, backend: Backend) -> list[Check]:
    """Replay every setting recorded in golden.npz, for models with tasks those of the bundle's task; return Checks.

    A setting passes if every image's ids equal PyTorch's and the scores agree within SCORE_TOLERANCE. Captions that
    change with the bundle's precision were removed from the recording at export (manifest.json, `conversion`). Raises
    BundleError if the recording cannot be read.
    """
    golden, captioner = Golden.load(bundle.path / "golden.npz"), Captioner(bundle, backend)
    return [_check(captioner, golden, setting) for setting in golden.of_task(bundle.task)]


def verify_halves(bundle: Bundle, runtime: Runtime, backend: Backend | None = None) -> list[Check]:
    """Replay the settings of `same_on_halves` like `verify`, but on the split decoder, which ensembles use.

    `backend` is that of the split decoder if it is open already. Returns no checks if the bundle has no split decoder
    or the backend of `runtime` does not support ensembles.
    """
    single = on_halves(bundle)
    if single is None or require_backend(runtime.backend) not in OF_ENSEMBLES:
        return []
    golden, captioner = (
        Golden.load(bundle.path / "golden.npz"),
        Captioner(single, backend or open_backend(single, runtime)),
    )
    checks = [_check(captioner, golden, number) for number in same_on_halves(golden, bundle.task)]
    return [replace(check, setting=f"as one of several bundles: {check.setting}") for check in checks]


def same_on_halves(golden: Golden, task: str | None = None) -> list[int]:
    """Return the settings of a task for which the split decoder gives the same captions as the whole decoder.

    Greedy search with a repetition penalty is not among them: Hugging Face divides the logits by the penalty, but the
    split decoder only has log-probabilities.
    """
    return [
        number
        for number, setting in ((number, golden.settings[number]) for number in golden.of_task(task))
        if setting.get("num_beams", 1) > 1 or setting.get("repetition_penalty", 1.0) == 1.0
    ]


def replay(captioner: Captioner, golden: Golden, setting: int) -> list[list[Hypothesis]]:
    """Decode the golden images with one setting; return num_return_sequences hypotheses per image, best first."""
    search = captioner.search(golden.options(setting))
    scheduler = Scheduler(captioner.backend, search, num_slots=len(golden.pixel_values))
    results = dict(scheduler.decode(golden.pixel_values))
    return [results[i] for i in range(len(results))]


def _check(captioner: Captioner, golden: Golden, setting: int) -> Check:
    replayed = replay(captioner, golden, setting)
    expected, scores = golden.n_best(setting), golden.scores[setting]
    recorded = [i for i, captions in enumerate(expected) if captions]
    identical = sum(first_difference(replayed[i], expected[i]) is None for i in recorded)
    scored = [i for i in recorded if not np.isnan(scores[i])]
    differences = [abs(replayed[i][0].score - scores[i]) / max(1.0, abs(scores[i])) for i in scored]
    largest = float(max(differences, default=0.0))
    tolerance = SCORE_TOLERANCE[captioner.bundle.precision]
    passed = identical == len(recorded) and all(difference <= tolerance for difference in differences)
    name = ", ".join(f"{key} {value}" for key, value in golden.settings[setting].items())
    return Check(name, len(recorded), identical, largest, passed, len(expected) - len(recorded))

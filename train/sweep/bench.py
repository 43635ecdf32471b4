"""Captions and scores of any decoding settings on one half of a split, each made once. Knows nothing of searching."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.captioner import Captioner
from engine.errors import EngineError, UsageError
from engine.inputs.images import ImageFile
from engine.options import DecodeOptions
from engine.scoring.base import Items, MetricInputs
from engine.scoring.bootstrap import compare
from engine.scoring.files import in_order_of_ids
from engine.scoring.profiles import make_metric
from engine.scoring.score import ScoreReport, measure, score_run
from train.sweep.prompted import PromptedSource
from train.sweep.runs import caption_run
from train.sweep.settings import in_file_name, with_settings
from train.sweep.sweep import prefixed, score_request

Say = Callable[[str], None]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Half:
    """Images of one half, their references by id, the prompts of their captions, and the folder of their files."""

    name: str
    images: list[ImageFile]
    references: dict[str, tuple[str, ...]]
    prompts: dict[str, str] | None
    folder: Path

    @property
    def references_file(self) -> Path:
        """What the half is scored against."""
        return self.folder / f"{self.name}_references.jsonl"

    def run_file(self, settings: Settings) -> Path:
        """Return where the captions with these settings are."""
        return self.folder / f"{self.name}_{in_file_name(settings)}.csv"


@dataclass(frozen=True)
class Bench:
    """What captions and scores. Settings lie over what is `given`, and that over the bundle's."""

    captioner: Captioner
    given: DecodeOptions
    inputs: MetricInputs
    say: Say

    def options(self, settings: Settings) -> DecodeOptions:
        """Return every option of a run with these settings."""
        asked = with_settings(self.given, settings).replace(num_return_sequences=1)
        return asked.over(self.captioner.bundle.generation)

    def measure(self, settings: Settings, half: Half, metrics: tuple[str, ...]) -> ScoreReport:
        """Caption the half, unless its captions are there; return what `engine score` says of them."""
        path = half.run_file(settings)
        say = prefixed(path.stem, self.say)
        source = PromptedSource(self.captioner)
        caption_run(source, self.options(settings), half.images, half.prompts, path, say)
        return score_run(score_request(path, half.references_file, half.images, metrics, self.inputs), say)

    def value(self, settings: Settings, half: Half, metric: str) -> float:
        """Return the value of one metric. Raises EngineError where it has none."""
        (score,) = self.measure(settings, half, (metric,)).scores
        if score.value is None or not math.isfinite(score.value):
            reason = score.unavailable or f"its value is {score.value}"
            raise EngineError(f"{metric} says nothing of {half.run_file(settings)}: {reason}")
        return score.value


def check_metric(metric: str, half: Half, inputs: MetricInputs) -> None:
    """Raise UsageError, before an image is captioned, where the metric that settings are chosen by is unavailable."""
    some = half.images[:2]
    texts = [half.references[image.id] for image in some]
    request = score_request(half.run_file({}), half.references_file, half.images, (metric,), inputs)
    paths = [image.path for image in some] if request.images else None
    items = Items([image.id for image in some], [several[0] for several in texts], texts, paths)
    (score,), _ = measure({metric: make_metric(metric, inputs, {})}, items, lambda _: None)
    if score.unavailable:
        raise UsageError(
            f"{metric} is to choose the settings and is unavailable: {score.unavailable}; or begin --metrics with "
            "another one"
        )


def difference(first: ScoreReport, second: ScoreReport) -> dict[str, dict[str, Any]]:
    """Return, by metric, the values of two runs on the same images, and their paired difference, second minus first,
    with its 95 % interval: what `engine score compare` says.
    """
    measured = [in_order_of_ids(report.items.ids, report.measured)[1] for report in (first, second)]
    found: dict[str, dict[str, Any]] = {}
    for one, other in zip(first.scores, second.scores, strict=True):
        if one.unavailable or other.unavailable:
            found[one.name] = {"unavailable": one.unavailable or other.unavailable}
            continue
        paired = asdict(compare(measured[0][one.name], measured[1][one.name]))
        found[one.name] = {"own": one.value, "chosen": other.value, **paired, "signature": other.signature}
    return found

"""The metrics of each challenge, the names its organisers use for them, and the built-in metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import UsageError
from engine.options import CLIP
from engine.scoring.base import Metric, MetricInputs
from engine.scoring.meteor import Meteor, MeteorMean, meteor_of_counts
from engine.scoring.neural import BertScore, Bleurt, ClipScore, RefClipScore
from engine.scoring.overlap import Bleu, Cider, Novelty, Rouge1, RougeL, bleu_of_counts
from engine.scoring.plugin import NEEDS, Plugin

BUILT_IN: dict[str, Callable[[MetricInputs, Mapping[str, Any]], Metric]] = {
    "bertscore": lambda setting, options: BertScore(
        setting, idf=bool(options.get("idf")), layer=options.get("bertscore_layer")
    ),
    "rouge1": lambda *_: Rouge1(),
    "rouge_l": lambda *_: RougeL(),
    "bleu1": lambda *_: Bleu(1),
    "bleu2": lambda *_: Bleu(2),
    "bleu3": lambda *_: Bleu(3),
    "bleu4": lambda *_: Bleu(4),
    "bleurt": lambda setting, _: Bleurt(setting),
    "meteor": lambda *_: Meteor(),
    "meteor_mean": lambda *_: MeteorMean(),
    "cider": lambda *_: Cider(),
    "clipscore": lambda setting, options: ClipScore(setting, **_pixel_options(options)),
    "refclipscore": lambda setting, options: RefClipScore(setting, **_pixel_options(options)),
    "novelty": lambda _, options: Novelty(options.get("training_captions")),
}
COMBINE = {**{f"bleu{n}": bleu_of_counts for n in (1, 2, 3, 4)}, "meteor": meteor_of_counts}
"""Corpus metric -> function that computes its value from summed counts."""
CHEAP = ("rouge1", "bleu1", "cider")
"""Metrics that take seconds: the default ones, and those of the constant-caption baseline."""


@dataclass(frozen=True)
class Profile:
    """A challenge: its metrics in order, their options, the organisers' key of each metric, and averages of metrics."""

    metrics: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    averages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


IMAGECLEF_2024 = Profile(
    (
        *("bertscore", "rouge1", "bleu1", "bleurt", "meteor", "cider", "clipscore", "refclipscore"),
        *("clinicalbleurt", "medbertscore"),
    ),
    averages={"score": ("bertscore",), "score_secondary": ("rouge1",)},
)
IMAGECLEF_2025 = Profile(
    ("bertscore", "rouge1", "similarity", "bleurt", "umls_f1", "alignscore"),
    options={"idf": True},
    keys={"bertscore": "bert", "rouge1": "rouge", "umls_f1": "medcat", "alignscore": "align"},
    averages={
        "score": ("bertscore", "rouge1", "similarity", "bleurt"),
        "score_secondary": ("umls_f1", "alignscore"),
        "overall": ("score", "score_secondary"),
    },
)
"""`score` is the relevance, `score_secondary` the factuality."""
PROFILES = {"imageclef2024": IMAGECLEF_2024, "imageclef2025": IMAGECLEF_2025, "imageclef2026": IMAGECLEF_2025}


def make_metric(name: str, setting: MetricInputs, options: Mapping[str, Any]) -> Metric:
    """Return a built-in metric or a plug-in by name. Raises UsageError for an unknown name."""
    if name in setting.plugins or name in NEEDS:
        return Plugin(name, setting)
    if name not in BUILT_IN:
        known = ", ".join([*BUILT_IN, *NEEDS])
        raise UsageError(f"unknown metric {name!r}: choose from {known}, or define it with --plugin NAME=COMMAND")
    return BUILT_IN[name](setting, options)


def _pixel_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for reading images as keyword arguments of ClipScore."""
    return {"frame": options.get("dicom_frame", 0), "depth": options.get("high_bit_depth", CLIP)}


def organisers_names(profile: Profile, values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the values under the organisers' keys, averages first; an average with a missing part is None."""
    known: dict[str, float | None] = dict(values)
    for name, parts in profile.averages.items():
        numbers = [known.get(part) for part in parts]
        known[name] = sum(numbers) / len(numbers) if None not in numbers else None  # type: ignore[arg-type]
    named = {profile.keys.get(name, name): known.get(name) for name in profile.metrics}
    return {name: known[name] for name in profile.averages} | named

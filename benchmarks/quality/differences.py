"""Runs of the same pictures measured by the same metrics, and how far each is from one of them, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.setting.workload import BUILD
from engine.scoring import bootstrap
from engine.scoring.base import Items, Measured, MetricInputs
from engine.scoring.profiles import make_metric
from train.demo.assets import SMALL_BERT, fetch_assets

METRICS = ("rouge1", "bleu1", "cider", "bertscore")


def small_bert() -> MetricInputs:
    """Return what METRICS need: BERTScore is measured with all-MiniLM-L6-v2, a proxy for the organisers' model."""
    folder = BUILD.parent / "small-bert"
    fetch_assets(folder, SMALL_BERT)
    return MetricInputs(weights={"bertscore": folder})


def measure_all(run: Mapping[str, str], references: Mapping[str, str], setting: MetricInputs) -> dict[str, Measured]:
    """Measure captions by id against one reference each."""
    items = Items(list(references), [run[one] for one in references], [(text,) for text in references.values()])
    return {metric: make_metric(metric, setting, {}).measure(items) for metric in METRICS}


def difference_row(found: Mapping[str, Measured], base: Mapping[str, Measured]) -> dict[str, Any]:
    """Return each metric's value, and its difference to the base's with the 95 % interval."""
    row = {}
    for metric, measured in found.items():
        difference = bootstrap.compare(base[metric], measured)
        row[metric] = {
            "value": round(measured.value, 4),
            "difference": round(difference.difference, 4),
            "low": round(difference.low, 4),
            "high": round(difference.high, 4),
        }
    return row

"""Do tuned decoding settings caption better? `train sweep --tune` of the demo on its validation volume.

python -m benchmarks.tuned --pairs build/demo/pairs
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.setting.machine import describe_machine
from benchmarks.setting.workload import BUILD
from engine.bundle.manifest import Bundle
from engine.options import DecodeOptions
from train.sweep.settings import Tuning
from train.sweep.sweep import Sweep
from train.sweep.tune import tune

RECORD = Path("benchmarks/results/tuned.json")
METRICS = ("rouge1", "bleu1")
KEPT = ("images", "halves", "metric", "grids", "trials", "rounds", "own", "chosen", "tuning", "held_back")


@click.command()
@click.option("--pairs", type=click.Path(path_type=Path), default=Path("build/demo/pairs"), show_default=True)
def main(pairs: Path) -> None:
    """Measure and keep the record."""
    bundle = Bundle.load()
    job = Sweep(None, pairs, BUILD / "tuned", decoding=DecodeOptions(), bundle=bundle.path, metrics=METRICS)
    result = tune(job, Tuning(tune=True), lambda line: click.echo(line, err=True))
    record = {"benchmark": "tuned", "machine": describe_machine(), "bundle": bundle.digest[:12]}
    record |= {name: result[name] for name in KEPT}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(record))


if __name__ == "__main__":
    main()

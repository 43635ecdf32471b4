"""Do averaged weights caption better? Checkpoints of one run against the first of them, on validation and held-out.

    python -m benchmarks.averages --pairs build/demo/pairs --checkpoint "best epoch=RUN/best" --checkpoint "mean=MEAN"

Each checkpoint is exported, and captions with the same settings. Differences are paired by picture, with
95 % intervals.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.quality.differences import METRICS, difference_row, measure_all, small_bert
from benchmarks.setting.machine import describe_machine
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.options import DecodeOptions
from export.bundle import export_bundle
from train.demo.volumes import read_pairs

RESULTS = Path("benchmarks/results")
OPTIONS = DecodeOptions(num_beams=4, no_repeat_ngram_size=3, max_new_tokens=64)
SPLITS = ("valid", "test")


def captions_of(bundle: Bundle, pictures: list[Path]) -> dict[str, str]:
    """Return id -> caption."""
    return {one.id: one.text for one in Captioner.load(bundle.path, backend="cpu").caption(pictures, OPTIONS)}


def parse(_context: object, _parameter: object, given: tuple[str, ...]) -> dict[str, Path]:
    """Return {name: folder} of NAME=DIR texts."""
    pairs = [text.partition("=") for text in given]
    if any(not (name and folder) for name, _, folder in pairs):
        raise click.BadParameter("give NAME=DIR")
    return {name: Path(folder) for name, _, folder in pairs}


@click.command()
@click.option("--pairs", type=click.Path(path_type=Path), default=Path("build/demo/pairs"), show_default=True)
@click.option("--checkpoint", "checkpoints", multiple=True, required=True, callback=parse, metavar="NAME=DIR")
def main(pairs: Path, checkpoints: dict[str, Path]) -> None:
    """Measure and keep the record."""
    setting = small_bert()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        for number, (name, checkpoint) in enumerate(checkpoints.items()):
            bundle = export_bundle(checkpoint, Path(work) / str(number), lambda _: None)
            found[name] = {}
            for split in SPLITS:
                chosen = [pair for pair in read_pairs(pairs) if pair.split == split]
                run = captions_of(bundle, [pairs / pair.image for pair in chosen])
                references = {Path(pair.image).stem: pair.caption for pair in chosen}
                found[name][split] = measure_all(run, references, setting)
            click.echo(f"{name}: {found[name]['test']['rouge1'].value:.4f}", err=True)
    first = next(iter(found.values()))
    record = {
        "benchmark": "averages",
        "machine": describe_machine(),
        "setting": {
            "images": {split: sum(pair.split == split for pair in read_pairs(pairs)) for split in SPLITS},
            "metrics": METRICS,
            "options": OPTIONS.values(),
        },
        "runs": {
            name: {split: difference_row(one[split], first[split]) for split in SPLITS} for name, one in found.items()
        },
    }
    (RESULTS / "averages.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(record))


if __name__ == "__main__":
    main()

"""Does consensus help? The demo's held-out volume, best beam against minimum Bayes risk over beams and drawn captions.

    python -m benchmarks.consensus --pairs build/demo/pairs

The pairs are the slices that `make demo` cuts; BERTScore is measured with all-MiniLM-L6-v2, a proxy for the
organisers' model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from benchmarks.setting.machine import describe_machine
from benchmarks.setting.workload import BUILD
from engine.captioner import Captioner
from engine.captions import Caption
from engine.files.run_files import write_n_best
from engine.options import DecodeOptions
from engine.scoring import bootstrap
from engine.scoring.base import Items, Measured, MetricInputs
from engine.scoring.profiles import make_metric
from engine.scoring.rerank import read_n_best, rerank_candidates
from train.demo.assets import SMALL_BERT, fetch_assets
from train.demo.volumes import read_pairs

RESULTS = Path("benchmarks/results")
METRICS = ("rouge1", "bleu1", "cider", "bertscore")
BEAMS = DecodeOptions(num_beams=4, no_repeat_ngram_size=3, max_new_tokens=64, num_return_sequences=4)


def candidates_of(captioner: Captioner, pictures: Iterable[Path], options: DecodeOptions, out: Path) -> Path:
    """Caption pictures into an n-best file."""
    captions: list[Caption] = list(captioner.caption(pictures, options))
    write_n_best(out, captions, drawn=options.do_sample)
    return out


@click.command()
@click.option("--pairs", type=click.Path(path_type=Path), default=Path("build/demo/pairs"), show_default=True)
@click.option("--samples", type=click.IntRange(2), default=16, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True)
@click.option("--top-p", type=float, default=0.95, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(pairs: Path, samples: int, temperature: float, top_p: float, seed: int) -> None:
    """Measure and keep the record."""
    held_out = [pair for pair in read_pairs(pairs) if pair.split == "test"]
    pictures = [pairs / pair.image for pair in held_out]
    ids = [path.stem for path in pictures]
    bert = BUILD.parent / "small-bert"
    fetch_assets(bert, SMALL_BERT)
    setting = MetricInputs(weights={"bertscore": bert})
    captioner = Captioner.load(backend="cpu")
    drawing = DecodeOptions(
        do_sample=True,
        num_return_sequences=samples,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_new_tokens=64,
        no_repeat_ngram_size=3,
    )
    work = BUILD / "consensus"
    work.mkdir(parents=True, exist_ok=True)
    beams = candidates_of(captioner, pictures, BEAMS, work / "beams.jsonl")
    drawn = candidates_of(captioner, pictures, drawing, work / "drawn.jsonl")
    best = {name: several[0].text for name, several in read_n_best([beams]).items()}
    runs: dict[str, dict[str, str]] = {"best beam": best}
    for name, files in (("beams", [beams]), ("drawn", [drawn]), ("beams and drawn", [beams, drawn])):
        for utility in ("rouge1", "bertscore"):
            runs[f"{name}, by {utility}"] = rerank_candidates(read_n_best(files), utility, setting)
    references = [(pair.caption,) for pair in held_out]
    measured = {
        name: {
            metric: make_metric(metric, setting, {}).measure(Items(ids, [run[one] for one in ids], references))
            for metric in METRICS
        }
        for name, run in runs.items()
    }
    record = {
        "benchmark": "consensus",
        "machine": describe_machine(),
        "setting": {"images": len(ids), "samples": samples, "temperature": temperature, "top_p": top_p, "seed": seed},
        "bundle": captioner.bundle.digest[:12],
        "runs": {name: _row(found, measured["best beam"]) for name, found in measured.items()},
        "other_than_best_beam": {name: sum(run[one] != best[one] for one in ids) for name, run in runs.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "consensus.json").write_text(json.dumps(record, indent=1) + "\n")
    click.echo(json.dumps(record))


def _row(found: dict[str, Measured], base: dict[str, Measured]) -> dict[str, Any]:
    """Return each metric's value, and its difference to the best beam with the 95 % interval."""
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


if __name__ == "__main__":
    main()

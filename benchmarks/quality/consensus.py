"""Does consensus help? The demo's held-out volume, best beam against minimum Bayes risk over beams and drawn captions,
over the beams of several bundles, and with the captions of the training head as support; and what several bundles say
in one search.

    python -m benchmarks.consensus --pairs build/demo/pairs --bundle OTHER --together DEMO --together OTHER

The pairs are the slices that `make demo` cuts; BERTScore is measured with all-MiniLM-L6-v2, a proxy for the
organisers' model. DEMO is the demo's checkpoint exported anew: the embedded bundle cannot caption together with others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.quality.differences import difference_row, measure_all, small_bert
from benchmarks.quality.rewards import spread
from benchmarks.setting.machine import describe_machine
from benchmarks.setting.workload import BUILD
from engine.captioner import Captioner
from engine.captions import Caption
from engine.errors import UsageError
from engine.files.run_files import write_n_best
from engine.inputs.tables import Table
from engine.options import DecodeOptions
from engine.scoring.base import MetricInputs
from engine.scoring.rerank import make_utility, read_n_best, rerank_candidates
from engine.scoring.support import SupportCaptions
from train.demo.volumes import read_pairs

RECORD = Path("benchmarks/results/consensus.json")
UTILITIES = ("rouge1", "bertscore")
"""The second compares all pairs of candidates by a neural model, which is by far slower."""
SUPPORT = {"nearest": 8, "share": 0.5}
"""The defaults of `engine rerank`."""
BEAMS = DecodeOptions(num_beams=4, no_repeat_ngram_size=3, max_new_tokens=64, num_return_sequences=4)


def candidates_of(captioner: Captioner, pictures: Iterable[Path], options: DecodeOptions, out: Path) -> Path:
    """Caption pictures into an n-best file."""
    captions: list[Caption] = list(captioner.caption(pictures, options))
    write_n_best(out, captions, drawn=options.do_sample)
    return out


@click.command()
@click.option("--pairs", type=click.Path(path_type=Path), default=Path("build/demo/pairs"), show_default=True)
@click.option("--bundle", "others", type=click.Path(path_type=Path), multiple=True, help="Beside the demo; several.")
@click.option("--together", type=click.Path(path_type=Path), multiple=True, help="Bundles for one search.")
@click.option("--images", type=click.IntRange(1), help="So many held-out slices, evenly spaced; all when absent.")
@click.option("--utility", "utilities", type=click.Choice(UTILITIES), multiple=True, default=UTILITIES)
@click.option("--samples", type=click.IntRange(2), default=16, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True)
@click.option("--top-p", type=float, default=0.95, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RECORD, show_default=True)
def main(
    pairs: Path,
    others: tuple[Path, ...],
    together: tuple[Path, ...],
    images: int | None,
    utilities: tuple[str, ...],
    out: Path,
    **drawing: Any,
) -> None:
    """Measure and keep the record."""
    everything = read_pairs(pairs)
    held_out = [pair for pair in everything if pair.split == "test"]
    held_out = spread(held_out, images or len(held_out))
    training = SupportCaptions(Table(pairs, {p.image: (p.caption,) for p in everything if p.split == "train"}))
    pictures = [pairs / pair.image for pair in held_out]
    setting = small_bert()
    captioners = load_bundles(others)
    candidates, best = caption_all(captioners, pictures, drawing)
    runs = best | rerank_all(candidates, utilities, setting, training)
    if together:
        mean = Captioner.load(together, backend="cpu")
        captions = mean.caption(pictures, BEAMS.replace(num_return_sequences=1))
        runs[f"one search of {len(together)} bundles"] = {one.id: one.text for one in captions}
    references = {path.stem: pair.caption for path, pair in zip(pictures, held_out, strict=True)}
    measured = {name: measure_all(run, references, setting) for name, run in runs.items()}
    first, *further = captioners
    record = {
        "benchmark": "consensus",
        "machine": describe_machine(),
        "setting": {"images": len(references), **drawing, "support": {"captions": len(training), **SUPPORT}},
        "bundle": first,
        "further_bundles": further,
        "together": mean.bundle.short_digest if together else None,
        "runs": {name: difference_row(found, measured["best beam"]) for name, found in measured.items()},
        "other_than_best_beam": {
            name: sum(run[one] != best["best beam"][one] for one in references) for name, run in runs.items()
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    click.echo(json.dumps(record))


def load_bundles(others: Sequence[Path]) -> dict[str, Captioner]:
    """Return the demo and other bundles by the first 12 digits of their digests. Raises UsageError for one twice."""
    captioners: dict[str, Captioner] = {}
    for path in (None, *others):
        captioner = Captioner.load(path, backend="cpu")
        if captioners.setdefault(captioner.bundle.digest[:12], captioner) is not captioner:
            raise UsageError(f"--bundle {path}: it is the demo, or there twice")
    return captioners


def caption_all(
    captioners: dict[str, Captioner], pictures: Sequence[Path], drawing: dict[str, Any]
) -> tuple[dict[str, list[Path]], dict[str, dict[str, str]]]:
    """Caption pictures with every bundle; return the sets of n-best files to choose among, and the best beams."""
    work = BUILD / "consensus"
    work.mkdir(parents=True, exist_ok=True)
    beams = {
        digest: candidates_of(captioner, pictures, BEAMS, work / f"beams_{digest}.jsonl")
        for digest, captioner in captioners.items()
    }
    first, *further = captioners
    sampling = DecodeOptions(
        do_sample=True,
        num_beams=1,
        num_return_sequences=drawing["samples"],
        temperature=drawing["temperature"],
        top_p=drawing["top_p"],
        seed=drawing["seed"],
        max_new_tokens=64,
        no_repeat_ngram_size=3,
    )
    drawn = candidates_of(captioners[first], pictures, sampling, work / "drawn.jsonl")
    sets = {"beams": [beams[first]], "drawn": [drawn], "beams and drawn": [beams[first], drawn]}
    if further:
        sets[f"beams of {len(beams)} bundles"] = list(beams.values())
    best = {f"best beam of {digest}": best_of(beams[digest]) for digest in further}
    return sets, {"best beam": best_of(beams[first])} | best


def best_of(beams: Path) -> dict[str, str]:
    """Return the first candidate of every image."""
    return {name: several[0].text for name, several in read_n_best([beams]).items()}


def rerank_all(
    sets: dict[str, list[Path]], utilities: Sequence[str], setting: MetricInputs, training: SupportCaptions
) -> dict[str, dict[str, str]]:
    """Return the captions that are chosen among each set by each utility, then the same with support."""
    alone: dict[str, dict[str, str]] = {}
    supported: dict[str, dict[str, str]] = {}
    for name, files in sets.items():
        candidates = read_n_best(files)
        for utility in utilities:
            alone[f"{name}, by {utility}"] = rerank_candidates(candidates, utility, setting)
            support = training.near(candidates, make_utility(utility, setting), **SUPPORT)
            supported[f"{name} with support, by {utility}"] = rerank_candidates(
                candidates, utility, setting, support=support
            )
    return alone | supported


if __name__ == "__main__":
    main()

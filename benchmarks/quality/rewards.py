"""Does reward training help? Self-critical training of the demo, judged on slices it learns from and on another head.

    python -m benchmarks.rewards --set epochs=2 --set likelihood_share=0.2
    python -m benchmarks.rewards --learn-from valid --slices 110 --judged 110 --set epochs=6

The slices are those of `make demo`: of the head it was trained on, or, with --learn-from valid, of the one that chose
its epochs, which no gradient has seen. The start is the embedded bundle turned back into its checkpoint, or, with
--decoder-epochs, a demo whose first stage had that many epochs and whose second did not come: one with something left
to learn. The epoch is chosen on slices of the other of these two heads; the held-out one is looked at twice, before and
after. BERTScore is measured with all-MiniLM-L6-v2, a proxy for the organisers' model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from benchmarks.setting.machine import describe_machine
from benchmarks.setting.workload import BUILD
from engine.bundle.manifest import Bundle, demo_bundle
from engine.bundle.tokenizer import detokenise
from engine.cli.shared import say
from engine.options import DecodeOptions, options_from
from engine.scoring import bootstrap
from engine.scoring.base import Items, Measured, MetricInputs
from engine.scoring.profiles import make_metric
from export.manifest import generation_defaults
from export.reference.huggingface import Reference
from export.reference.torch_backend import caption_live
from export.restore import restore_checkpoint
from train.data.batches import PixelSpec
from train.data.dataset import read_dataset
from train.demo.assets import SMALL_BERT, fetch_assets
from train.demo.build import STAGES, demo_pairs, initial_checkpoint
from train.demo.volumes import Pair
from train.finetune import DataInputs, Job, finetune
from train.learning.reward import SAMPLED_WORDS, make_reward
from train.learning.setup import evaluation_options
from train.recipes import load_recipe, parse_changes

RESULTS = Path("benchmarks/results")
HEADS = ("train", "valid")
VALIDATING = 110
"""Slices that choose the epoch: as many as the smaller head has."""
METRICS = ("rouge1", "bertscore", "bleu1", "cider")
DRAWS = DecodeOptions(do_sample=True, top_k=SAMPLED_WORDS, seed=1, max_new_tokens=64)


@dataclass(frozen=True)
class Judged:
    """What one model says: mean rewards of the training slices, and metrics of the held-out ones."""

    greedy_reward: Measured
    drawn_reward: Measured
    held_out: dict[str, Measured]


def spread(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Return `count` of them, evenly spaced, or all."""
    return [pairs[i * len(pairs) // count] for i in range(count)] if count < len(pairs) else list(pairs)


def write_subset(everything: Sequence[Pair], folder: Path, out: Path, count: int, learn_from: str) -> list[Pair]:
    """Copy `count` slices of one head to learn from and VALIDATING of the other into a data set; return the former."""
    heads = {name: [pair for pair in everything if pair.split == name] for name in HEADS}
    (other,) = set(HEADS) - {learn_from}
    chosen = [replace(pair, split="train") for pair in spread(heads[learn_from], count)]
    kept = [*chosen, *(replace(pair, split="valid") for pair in spread(heads[other], VALIDATING))]
    out.mkdir(parents=True, exist_ok=True)
    for pair in kept:
        shutil.copyfile(folder / pair.image, out / pair.image)
    (out / "pairs.jsonl").write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in kept))
    return chosen


def begun_demo(work: Path, out: Path, epochs: int) -> Path:
    """Train the first stage of the demo alone, with so many epochs of its own schedule; return the checkpoint."""
    recipe = load_recipe(STAGES[0], {"epochs": epochs})
    finetune(Job(initial_checkpoint(work), DataInputs(work / "pairs"), out, recipe), say)
    return out / "best"


def captions_of(reference: Reference, folder: Path, pairs: Sequence[Pair], options: DecodeOptions) -> list[str]:
    """Caption slices with a live model."""
    spec = PixelSpec.of(reference.image_processor)
    images = ((i, spec.read(folder / pair.image)) for i, pair in enumerate(pairs))
    found = dict(caption_live(reference.model, reference.image_processor, images, options))
    ids = (found[i][0].ids for i in range(len(pairs)))
    return [detokenise(reference.tokenizer.decode(one, skip_special_tokens=True)) for one in ids]


def judge(
    checkpoint: Path, folder: Path, learnt: Sequence[Pair], held_out: Sequence[Pair], job: Job, setting: MetricInputs
) -> Judged:
    """Measure one checkpoint: rewards as the training counts them, held-out captions with its own beams."""
    reference = Reference.load(checkpoint)
    reward = make_reward(job.recipe.rewards(), setting, read_dataset(job.data.directory)["train"].examples)
    options = options_from(generation_defaults(reference), {})
    truth = [(pair.caption,) for pair in learnt]

    def mean_reward(decoding: DecodeOptions) -> Measured:
        rewards = reward(captions_of(reference, folder, learnt, decoding), truth)
        return Measured(rewards, float(rewards.mean()))

    items = Items(
        [pair.image for pair in held_out],
        captions_of(reference, folder, held_out, options),
        [(pair.caption,) for pair in held_out],
    )
    return Judged(
        greedy_reward=mean_reward(evaluation_options(job.recipe)),
        drawn_reward=mean_reward(DRAWS),
        held_out={name: make_metric(name, setting, {}).measure(items) for name in METRICS},
    )


def difference(before: Measured, after: Measured) -> dict[str, float]:
    """Return both values and their difference with its 95 % interval (paired bootstrap over images)."""
    found = bootstrap.compare(before, after)
    values = {"before": before.value, "after": after.value, "difference": found.difference}
    return {name: round(value, 4) for name, value in (values | {"low": found.low, "high": found.high}).items()}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=BUILD.parent / "demo", show_default=True)
@click.option("--learn-from", type=click.Choice(HEADS), default="train", show_default=True, help="Head, by its split.")
@click.option("--slices", type=click.IntRange(16), default=640, show_default=True, help="Slices of it taken.")
@click.option("--judged", type=click.IntRange(2), default=200, show_default=True, help="Of these, judged.")
@click.option(
    "--decoder-epochs", type=click.IntRange(1), help="Start from a demo begun so; else from the finished one."
)
@click.option("--out", type=click.Path(path_type=Path), default=BUILD.parent / "rewards", show_default=True)
@click.option("--record", type=click.Path(path_type=Path), help="JSON file; benchmarks/results/rewards_HEAD.json.")
@click.option("--set", "changes", multiple=True, metavar="SETTING=VALUE", help="Any setting of the recipe scst.")
def main(
    work: Path,
    learn_from: str,
    slices: int,
    judged: int,
    decoder_epochs: int | None,
    out: Path,
    record: Path | None,
    changes: tuple[str, ...],
) -> None:
    """Train, measure and keep the record."""
    bert = BUILD.parent / "small-bert"
    fetch_assets(bert, SMALL_BERT)
    setting = MetricInputs(weights={"bertscore": bert})
    pairs, folder = demo_pairs(work), work / "pairs"
    if decoder_epochs is None:
        checkpoint = restore_checkpoint(demo_bundle(), out / "start")
    else:
        checkpoint = begun_demo(work, out / f"begun_{decoder_epochs}", decoder_epochs)
    chosen = write_subset(pairs, folder, out / "data", slices, learn_from)
    learnt = spread(chosen, judged)
    held_out = [pair for pair in pairs if pair.split == "test"]
    recipe = load_recipe("scst", parse_changes(changes))
    job = Job(checkpoint, DataInputs(out / "data"), out / "run", recipe, setting)
    before = judge(checkpoint, folder, learnt, held_out, job, setting)
    say(f"before: greedy {before.greedy_reward.value:.4f}, drawn {before.drawn_reward.value:.4f}")
    summary = finetune(job, say)
    after = judge(job.out / "best", folder, learnt, held_out, job, setting)
    found = {
        "benchmark": "rewards",
        "machine": describe_machine(),
        "start": f"{STAGES[0]}, epochs={decoder_epochs}" if decoder_epochs else f"bundle {Bundle.load().digest[:12]}",
        "recipe": recipe.settings(),
        "training": {name: summary[name] for name in ("steps", "seconds", "best")},
        "slices learnt from": {
            "head": learn_from,
            "images": len(learnt),
            "reward of greedy captions": difference(before.greedy_reward, after.greedy_reward),
            "reward of drawn captions": difference(before.drawn_reward, after.drawn_reward),
        },
        "held-out volume": {"images": len(held_out)}
        | {name: difference(before.held_out[name], after.held_out[name]) for name in METRICS},
    }
    record = record or RESULTS / f"rewards_{learn_from}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()

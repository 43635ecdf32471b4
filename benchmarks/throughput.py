"""Compare the engine with Hugging Face generate, other ONNX loops and OpenVINO: same images, weights and tokens.

    python -m benchmarks.throughput --workload base --beams 4

Each program runs in its own process. All are warmed up and then run alternately. Their ids are compared. If a
difference is not a tie, the measurement is void and the exit code is 1. For programs with a batch size, several sizes
are tried first and the best is used. The record is written to build/benchmarks/ (with --record: benchmarks/results/)
and, as one JSON line, to stdout.

    python -m benchmarks.throughput --workload demo --program engine-int8 --program generate-bf16

compares precisions: time, captions that are the same as the engine's in float32, and the difference in ROUGE-1. Only
the demo's captions have a meaning. The other workloads have random weights: they show the speed.

    python -m benchmarks.throughput --checkpoint my-blip --input images

measures your own checkpoint on your own images, with the checkpoint's generation settings, next to `generate`.

    python -m benchmarks.throughput --workload git-base --images 32 --images-of generate 4 --forced-tokens 16

gives a program that takes minutes per image fewer images.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.programs import BATCHED, EXACT, PROGRAMS, ROUNDED, Comparison, Ids, Timing, Worker
from benchmarks.roofline import ModelWork, count_work, measure_matmul
from benchmarks.workload import (
    MAX_NEW_TOKENS,
    OWN_IMAGES,
    PUBLISHED_SHAPES,
    Workload,
    describe_machine,
    prepare,
    prepare_own,
    read_pictures,
    read_pixels,
    read_references,
    record_options,
    record_path,
)
from engine.bundle.manifest import Bundle
from engine.bundle.tokenizer import CaptionTokenizer, detokenise
from engine.captioner import Captioner
from engine.cli.shared import NAME, PATH, OneLine
from engine.decoding.beam import Hypothesis
from engine.errors import EngineError, UsageError, counted
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions
from engine.scoring.base import Items, Measured, compare
from engine.scoring.overlap import Rouge1
from export.parity import judge
from export.reference.huggingface import Reference, UncachedBackend
from export.reference.trace import summed_log_prob

Ids1 = tuple[int, ...]
BLIP_PROGRAMS = tuple(program for program in EXACT if program != "optimum")
"""Programs for the workloads that are a BLIP, which optimum-onnx does not run."""
BATCH_SIZES = (4, 8, 16, 32)
"""Tried in this order for programs with a batch size, until one takes more than SLOWER times the best time."""
SLOWER = 1.1
TRIAL_IMAGES = 32
LEAST_IDENTICAL = 0.75
"""If fewer captions than this share are identical to the engine's, the measurement is void even if all differences are
explained. Random weights tie often: long captions of flat distributions have sums near -200, where float32 has a
resolution of 1.5e-5."""
NEAR = 0.02
"""Nats per token by which a caption from a batch may score below the reference's caption of the image alone."""


@click.command(cls=OneLine)
@click.option("--workload", "name", type=click.Choice(sorted(MAX_NEW_TOKENS)), help="Model; default: base.")
@click.option(
    "--checkpoint",
    type=NAME,
    help="Your checkpoint instead of a --workload: a folder, a Hugging Face id or a .pth file.",
)
@click.option("--input", "pictures", type=PATH, help="Folder of images, with --checkpoint.")
@click.option(
    "--images",
    type=click.IntRange(1),
    help=f"Number of images, several for each slot; default: 160, with --checkpoint {OWN_IMAGES} or all of --input.",
)
@click.option("--beams", type=click.IntRange(1), help="Number of beams; default: 4, with --checkpoint its own.")
@click.option(
    "--forced-tokens",
    type=click.IntRange(1),
    help="Length of every caption in new tokens; by default captions end by themselves.",
)
@click.option(
    "--program",
    "programs",
    type=click.Choice(list(PROGRAMS)),
    multiple=True,
    help="Program to measure next to the engine; may be repeated. By default those in float32 that have the "
    "model; with --checkpoint, generate.",
)
@click.option(
    "--images-of",
    "few",
    type=(click.Choice(list(PROGRAMS)), click.IntRange(1)),
    multiple=True,
    help="Program and number of images, for a slow program: it runs once, in one batch, without trials or warm-up.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=BATCH_SIZES,
    show_default=True,
    help="Batch size to try; may be repeated.",
)
@click.option("--rows", type=click.IntRange(1), help="Beams in flight in the engine; chosen by the engine by default.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of every program; by default all cores.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs of each program.")
@record_options
def main(
    name,
    checkpoint,
    pictures,
    images,
    beams,
    forced_tokens,
    programs,
    few,
    batches,
    rows,
    threads,
    repeats,
    out,
    record,
) -> None:
    """Measure the programs, compare their captions and write a record."""
    if (checkpoint is None) != (pictures is None):
        raise UsageError("--checkpoint and --input go together: your checkpoint and a folder of your images")
    is_own = checkpoint is not None
    usual = PUBLISHED_SHAPES[name].programs if name in PUBLISHED_SHAPES else BLIP_PROGRAMS
    programs = programs or (("generate",) if is_own else usual)
    rounded = [program for program in ROUNDED if program in programs]
    if is_own and (name is not None or record or rounded or "conventional" in programs):
        raise UsageError(
            "--checkpoint measures engine, generate and openvino into build/: remove --workload, --record and "
            "other values of --program"
        )
    if out is not None:
        record_path("", out, record)  # before hours of measuring
    if is_own:
        workload = prepare_own(checkpoint, pictures, images)
        images = workload.most
    else:
        images, beams = images or 160, beams or 4
        ours = [program.removeprefix("engine-") for program in rounded if program.startswith("engine-")]
        workload = prepare(name or "base", images, ours)
    options = workload.options(beams, forced_tokens=forced_tokens)
    few = {program: min(count, images) for program, count in few}
    setting = {
        "images": images,
        "beams": options.num_beams,
        "no_repeat_ngram": options.no_repeat_ngram_size,
        "most_new_tokens": options.max_new_tokens,
        "forced_tokens": forced_tokens,
        "rows": rows or "auto",
        "threads": threads,
        "repeats": repeats,
    } | ({"images_of": few} if few else {})
    runs = _measure(Comparison(workload, options, rows, threads), programs, batches, images, repeats, few)
    with_roofline = not is_own and workload.name not in PUBLISHED_SHAPES
    report = _report(workload, options, setting, runs, rounded, with_roofline=with_roofline)
    what = (f"_{forced_tokens}tokens" if forced_tokens else "") + ("_precisions" if rounded else "")
    out = record_path(f"{workload.name}_{options.num_beams}beams{what}.json", out, record)
    out = out if report["valid"] else out.with_suffix(".void.json")
    out.write_text(json.dumps(report, indent=1) + "\n")
    _print(report, out)
    if not report["valid"]:
        raise EngineError(f"the programs returned different ids that are not ties: the measurement is void ({out})")


class Runs(NamedTuple):
    """What was measured of each program: its runs, its batch size and the seconds it took to load."""

    timings: dict[str, list[Timing]]
    batch: dict[str, int]
    load_s: dict[str, float]


def _measure(
    comparison: Comparison,
    programs: Sequence[str],
    batches: tuple[int, ...],
    images: int,
    repeats: int,
    few: dict[str, int],
) -> Runs:
    """Run the engine and the programs in turn, each with the batch size that suits it best."""
    workers = {program: Worker(program, comparison) for program in dict.fromkeys(("engine", *programs))}
    chosen = {program: few.get(program) or _best_batch(worker, batches, images) for program, worker in workers.items()}
    timings = _take_turns(workers, chosen, images, repeats, few)
    for worker in workers.values():
        worker.stop()
    return Runs(timings, chosen, {program: round(worker.load_s, 2) for program, worker in workers.items()})


def _report(
    workload: Workload,
    options: DecodeOptions,
    setting: dict[str, Any],
    runs: Runs,
    rounded: Sequence[str],
    *,
    with_roofline: bool,
) -> dict[str, Any]:
    """Return the record of a comparison. `rounded` are the programs in lower precision."""
    timings, images, few = runs.timings, setting["images"], setting.get("images_of", {})
    last = {program: own[-1].ids for program, own in timings.items()}
    agreement = agreement_of(workload, options, {program: ids for program, ids in last.items() if program in EXACT})
    roofline = None
    if with_roofline:
        roofline = _roofline(workload, options, timings["engine"], images, setting["threads"])
    return {
        "benchmark": "throughput",
        "workload": workload.name,
        "machine": describe_machine(),
        "setting": setting,
        "new_tokens": _lengths(last["engine"]),
        "programs": {
            program: _summary(own, timings["engine"], images, few.get(program, images))
            for program, own in timings.items()
        },
        "batch": {program: runs.batch[program] for program in BATCHED if program in runs.batch},
        "load_s": runs.load_s,
        "agreement": agreement,
        "fidelity": {program: fidelity_of(workload, last["engine"], last[program]) for program in rounded},
        "turns_with_other_ids": {
            program: sum(one.ids != last[program] for one in own) for program, own in timings.items()
        },
        "valid": is_valid(agreement),
        "bundle_sha256": Bundle.load(workload.bundle).digest,
        "roofline": roofline,
        "ids_sha256": hashlib.sha256(json.dumps(last["engine"]).encode()).hexdigest()[:16],
    }


def _best_batch(worker: Worker, batches: tuple[int, ...], images: int) -> int:
    """Return the fastest batch size on a few images. This also warms up the program."""
    count = min(images, TRIAL_IMAGES)
    if worker.name not in BATCHED:
        worker.caption(count)
        return 1
    worker.caption(min(count, batches[0]), batches[0])
    seconds: dict[int, float] = {}
    for batch in sorted(batches):
        seconds[batch] = worker.caption(count, batch).seconds
        click.echo(f"{worker.name}, batch {batch}: {seconds[batch] / count:.3f} s per image on {count}", err=True)
        if seconds[batch] > SLOWER * min(seconds.values()):
            break
    return min(seconds, key=seconds.__getitem__)


def _take_turns(
    workers: dict[str, Worker], batch: dict[str, int], images: int, repeats: int, few: dict[str, int]
) -> dict[str, list[Timing]]:
    timings: dict[str, list[Timing]] = {program: [] for program in workers}
    for turn in range(repeats):
        for program, worker in workers.items():
            if turn and program in few:
                continue
            count = few.get(program, images)
            timings[program].append(worker.caption(count, batch[program]))
            click.echo(f"{program}: {timings[program][-1].seconds / count:.3f} s per image", err=True)
    return timings


def _summary(runs: list[Timing], ours: list[Timing], images: int, count: int) -> dict[str, float]:
    """Return seconds per image and their ratio to the engine's of the same turn (median, least, most), and memory.

    The engine captioned `images`, the program `count` images.
    """
    seconds = [run.seconds / count for run in runs]
    ratios = [own * images / mine.seconds for own, mine in zip(seconds, ours, strict=False)]
    return {
        "seconds_per_image": round(statistics.median(seconds), 4),
        "seconds_least": round(min(seconds), 4),
        "seconds_most": round(max(seconds), 4),
        "times_engine": round(statistics.median(ratios), 3),
        "times_least": round(min(ratios), 3),
        "times_most": round(max(ratios), 3),
        "peak_gib": round(max(run.peak_gib or 0.0 for run in runs), 2),
    } | _unfilled(runs)


def _unfilled(runs: list[Timing]) -> dict[str, float]:
    """Return the median share of the time in which slots were empty because no image was left; {} without slots."""
    shares = [run.unfilled_s / run.seconds for run in runs if run.unfilled_s is not None]
    return {"unfilled_share": round(statistics.median(shares), 3)} if shares else {}


def _lengths(ids: Ids) -> dict[str, float]:
    lengths = sorted(len(caption) - 1 for caption in ids)
    return {
        "mean": round(statistics.mean(lengths), 1),
        "median": statistics.median(lengths),
        "least": lengths[0],
        "most": lengths[-1],
    }


def agreement_of(workload: Workload, options: DecodeOptions, ids: dict[str, Ids]) -> dict[str, dict[str, int]]:
    """Count for each program the captions identical to the engine's, and the verdicts on the others.

    A program may have captioned fewer images than the engine.
    """
    ours = ids["engine"]
    differing = {
        program: [i for i, other in enumerate(theirs) if ours[i] != other]
        for program, theirs in ids.items()
        if program != "engine"
    }
    verdict_of = _judge(workload, options) if any(differing.values()) else None
    counts = {}
    for program, indices in differing.items():
        verdicts = Counter(verdict_of(i, ours[i], ids[program][i]) for i in indices) if verdict_of else Counter()
        counts[program] = {"identical": len(ids[program]) - len(indices), "tie": 0, "batch": 0, "real": 0} | verdicts
    return counts


def _judge(workload: Workload, options: DecodeOptions) -> Callable[[int, Ids1, Ids1], str]:
    """Return a function (image index, engine's ids, the other program's ids) -> reason for the difference.

    The engine's caption must pass export.parity.judge. By the reference, both captions must score at most NEAR below
    the caption that it generates for the image alone. Otherwise the difference is "real".
    """
    reference, pictures = Reference.load(workload.checkpoint), list(read_pictures(workload))
    captioner = Captioner.load(workload.bundle, backend="cpu")
    backend, spec = UncachedBackend(reference), captioner.bundle.image
    search = captioner.search(options)
    prompt_length = len(search.prompt)
    known: dict[int, str] = {}
    least: dict[int, float] = {}

    def verdict(i: int, mine: Ids1, theirs: Ids1) -> str:
        pixels = read_image(pictures[i], spec.height, spec.width, spec.resample, resize=spec.resize)
        picture = reference.pixels([pictures[i]])

        def per_token(ids: Ids1) -> float:
            return reference.caption_log_prob(picture, ids, prompt_length) / (len(ids) - prompt_length)

        if i not in known:
            hypothesis = Hypothesis(mine, summed_log_prob(backend, search, pixels, mine), 0.0)
            known[i], _ = judge(reference, captioner, pictures[i], options, hypothesis)
            ((alone, *_),) = reference.generate(picture, options)
            least[i] = per_token(alone.ids) - NEAR
        is_near = all(per_token(ids) >= least[i] for ids in (mine, theirs))
        return known[i] if is_near else "real"

    return verdict


def fidelity_of(workload: Workload, ours: Ids, theirs: Ids) -> dict[str, Any]:
    """Compare the captions of a program in lower precision with the engine's in float32, of as many images as it got.

    Returns the numbers of captions and of those with the same ids and, if the workload has references, the difference
    in ROUGE-1 with its 95 % interval (paired bootstrap).
    """
    ours = ours[: len(theirs)]
    identical = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    same = {"images": len(theirs), "identical": identical}
    references = read_references(workload)
    if references is None:
        return same | {"rouge1": None}
    tokenizer = CaptionTokenizer(Bundle.load(workload.bundle))

    def score(ids: Ids) -> Measured:
        texts = [detokenise(tokenizer.decode(caption)) for caption in ids]
        names = [str(number) for number in range(len(ids))]
        return Rouge1().measure(Items(names, texts, [(reference,) for reference in references[: len(ids)]]))

    difference = compare(score(ours), score(theirs))
    return same | {"rouge1": {key: round(getattr(difference, key), 5) for key in ("difference", "low", "high")}}


def is_valid(agreement: dict[str, dict[str, int]]) -> bool:
    """Return whether no program has a real mismatch, and enough of its captions are identical to the engine's."""
    return all(
        not counts["real"] and counts["identical"] >= LEAST_IDENTICAL * sum(counts.values())
        for counts in agreement.values()
    )


def _roofline(
    workload: Workload, options: DecodeOptions, runs: list[Timing], images: int, threads: int | None
) -> dict[str, Any]:
    captioner = Captioner.load(workload.bundle, backend="cpu", threads=threads)
    work = count_work(captioner, read_pixels(workload, captioner.bundle), options)
    flops = work.flops(ModelWork.of(workload.checkpoint))
    peak = measure_matmul(threads)
    achieved = flops / statistics.median(run.seconds for run in runs)
    return {
        "work": asdict(work),
        "gflop_per_image": round(flops / images / 1e9, 2),
        "achieved_gflops": round(achieved / 1e9, 1),
        "matmul_gflops": {library: round(value / 1e9, 1) for library, value in peak.items()},
        "share": round(achieved / max(peak.values()), 3),
    }


def _print(record: dict[str, Any], out: Path) -> None:
    table = [("program", "batch", "s per image", "x engine", "memory", "same ids as the engine")]
    for program, row in record["programs"].items():
        cells = (
            f"{row['seconds_per_image']:.3f} ({row['seconds_least']:.3f}-{row['seconds_most']:.3f})",
            f"{row['times_engine']:.2f} ({row['times_least']:.2f}-{row['times_most']:.2f})",
            f"{row['peak_gib']:.1f} GiB",
            _same_ids(record, program),
        )
        table.append((program, str(record["batch"].get(program, "")), *cells))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        click.echo("  ".join(map(str.ljust, line, widths)).rstrip(), err=True)
    machine, tokens = record["machine"], record["new_tokens"]
    click.echo(
        f"{machine['cores']} cores of {machine['processor']}; {counted(record['setting']['images'], 'image')}, "
        f"{tokens['mean']:.1f} new tokens per caption (at most {tokens['most']}), "
        f"{counted(record['setting']['beams'], 'beam')}",
        err=True,
    )
    for program, found in record["fidelity"].items():
        images = found["images"]
        if found["rouge1"] is None:
            click.echo(
                f"{program}: {found['identical']} of {images} captions as in float32; random weights, so that neither "
                "this nor ROUGE-1 means anything: use --workload demo",
                err=True,
            )
        else:
            click.echo(
                f"{program}: {found['identical']} of {images} captions as in float32, ROUGE-1 "
                "{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**found["rouge1"]),
                err=True,
            )
    if record["roofline"] is not None:
        click.echo(f"share of the matrix-multiply roofline: {record['roofline']['share']:.0%}", err=True)
    click.echo(f"record: {out}", err=True)
    click.echo(json.dumps(record))


def _same_ids(record: dict[str, Any], program: str) -> str:
    """Return how many captions of a program have the engine's ids, and the reasons of the others."""
    counts = record["agreement"].get(program)
    if counts is None:
        return ""
    others = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count and verdict != "identical")
    return f"{counts['identical']} of {sum(counts.values())}" + (f" ({others})" if others else "")


if __name__ == "__main__":
    main()

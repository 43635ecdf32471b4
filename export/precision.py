"""What a bundle of another precision says otherwise than its float32 twin on ONNX Runtime's CPU provider.

    python -m export.precision --bundle FP16 --against FP32 --images DIR --beams 4 --out report.json

The same of a float32 bundle whose products a CPU rounds: `--bundle FP32 --backend openvino --cpu-precision bf16`.

Rounded weights change scores, and where two captions score nearly alike they change the caption. Every caption that
differs is listed with its gap: how much less the float32 bundle thinks of the other caption than of its own. Knows
nothing of torch or of how bundles are made.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from engine.backends import Backend, StepInputs
from engine.captioner import Captioner
from engine.cli.shared import PATH, OneLine
from engine.errors import UsageError
from engine.files.atomic import check_outputs, write_atomically
from engine.inputs.images import find_images
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions
from engine.runtime import CPU_BACKENDS

PACKAGES = {"cpu": "onnxruntime", "openvino": "openvino"}
ENCODED_PICTURES = 8
"""So many pictures' encoder outputs are compared in a report; captions are of all."""


@dataclass(frozen=True)
class ScoredCaption:
    """One picture's caption by one bundle: ids (prompt and end included) and score."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Difference:
    """One picture with two captions: where their ids part, and what the float32 bundle thinks of the other caption.

    `position` counts ids from 0, the prompt included; `gap` is float32's score of its own caption less its score of the
    other one, in the units of scores (nats a token where length_penalty is 1). A gap below 0: float32's search missed
    a caption it likes better.
    """

    image: str
    float32: list[int]
    other: list[int]
    position: int
    gap: float


@dataclass(frozen=True)
class PrecisionReport:
    """All pictures under one setting; drifts are |score - float32's| of identical captions, relative beyond -1."""

    options: dict
    images: int
    identical: int
    mean_score_drift: float
    max_score_drift: float
    differences: list[Difference]

    @property
    def share(self) -> float:
        """Share of pictures with the same ids."""
        return self.identical / max(1, self.images)


def encoder_error(float32: Backend, other: Backend, pictures: NDArray[np.uint8]) -> float:
    """Return how far `other`'s encoder is off on pictures u8[N,height,width,3]: the largest difference over the peak.

    Taken for every layer's cross keys and values by itself, the worst of them returned; infinite where a value is none.
    """
    worst = 0.0
    for mine, theirs in zip(float32.encode(pictures), other.encode(pictures), strict=True):
        difference = np.abs(np.asarray(theirs, np.float32) - np.asarray(mine, np.float32))
        if not np.isfinite(difference).all():
            return float("inf")
        worst = max(worst, float(difference.max() / np.abs(np.asarray(mine)).max()))
    return worst


def forced_log_prob(
    backend: Backend, vocab_size: int, picture: NDArray[np.uint8], ids: tuple[int, ...], prompt_length: int
) -> float:
    """Return the summed log-probability of a caption's ids behind the prompt, given a picture u8[height,width,3].

    NaN where the backend's scores are no numbers.
    """
    cache, total = backend.allocate(1), 0.0
    backend.admit(cache, 0, backend.encode(picture[None]), 0)
    for place, following in enumerate(ids[1:]):
        inputs = StepInputs(
            input_ids=np.array([[ids[place]]]),
            positions=np.array([[place]]),
            scores=np.zeros((1, 1), np.float32),
            marked_ids=np.full((1, 1, 1), -1),
            penalties=np.ones(2, np.float32),
            ancestry=np.ones((1, 1, place + 1), bool),
            num_candidates=vocab_size,
        )
        scores, candidates = backend.step(cache, inputs)
        if place + 1 >= prompt_length:
            found = scores[0, candidates[0] == following]
            total += float(found[0]) if len(found) else float("nan")
    return total


def compare_captions(
    float32: Captioner,
    options: DecodeOptions,
    pictures: Iterable[tuple[str, NDArray[np.uint8]]],
    theirs: Iterable[ScoredCaption],
    others: Iterable[ScoredCaption],
) -> PrecisionReport:
    """Compare the float32 bundle's captions (`theirs`) of (name, u8[height,width,3]) with another bundle's."""
    prompt_length, vocab_size, count = len(float32.search(options).prompt), float32.bundle.model.vocab_size, 0
    drifts, differences = [], []
    for (name, picture), expected, found in zip(pictures, theirs, others, strict=True):
        count += 1
        if found.ids == expected.ids:
            drifts.append(abs(found.score - expected.score) / max(1.0, abs(expected.score)))
            continue
        position = next(i for i, (a, b) in enumerate(zip_longest(expected.ids, found.ids)) if a != b)
        own, other = (
            forced_log_prob(float32.backend, vocab_size, picture, ids, prompt_length)
            / (len(ids) - prompt_length) ** options.length_penalty
            for ids in (expected.ids, found.ids)
        )
        differences.append(Difference(name, list(expected.ids), list(found.ids), position, own - other))
    return PrecisionReport(
        options=options.values(),
        images=count,
        identical=len(drifts),
        mean_score_drift=float(np.mean(drifts or [0.0])),
        max_score_drift=float(np.max(drifts or [0.0])),
        differences=differences,
    )


def compare_bundles(float32: Captioner, other: Captioner, directory: Path, options: DecodeOptions) -> PrecisionReport:
    """Caption every image of a directory with both bundles under one setting; raise ImageError on one unreadable."""
    spec, images = float32.bundle.image, find_images(directory).images
    if not images:
        raise UsageError(f"{directory} holds no images")
    sayings = [
        [ScoredCaption(caption.ids, caption.score) for caption in captioner.caption(images, options)]
        for captioner in (float32, other)
    ]
    pictures = (
        (image.path.name, read_image(image.path, spec.height, spec.width, spec.resample, frame=image.frame))
        for image in images
    )
    return compare_captions(float32, options, pictures, *sayings)


def check_twins(float32: Captioner, other: Captioner) -> None:
    """Raise UsageError unless both bundles are of one checkpoint and `float32` is what it is called."""
    mine, theirs = float32.bundle, other.bundle
    if mine.precision != "fp32":
        raise UsageError(f"{mine.path} is {mine.precision}: --against takes the fp32 bundle")
    if (mine.checkpoint.get("sha256"), mine.model, mine.image) != (
        theirs.checkpoint.get("sha256"),
        theirs.model,
        theirs.image,
    ):
        raise UsageError(f"{theirs.path} and {mine.path} are not of one checkpoint: export both from the same weights")


def summary(report: PrecisionReport) -> str:
    """Return one line on a report."""
    gaps = [difference.gap for difference in report.differences]
    listed = f", float32 scores the others {min(gaps):.1e} to {max(gaps):.1e} lower" if gaps else ""
    return (
        f"{report.identical}/{report.images} captions as in float32 ({100 * report.share:.1f} %), their scores within "
        f"{report.max_score_drift:.1e} (mean {report.mean_score_drift:.1e}){listed}"
    )


@click.command(cls=OneLine)
@click.option("--bundle", type=PATH, required=True, help="The bundle in question.")
@click.option("--against", type=PATH, required=True, help="Its fp32 twin.")
@click.option("--images", type=PATH, required=True, help="Directory of pictures.")
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
@click.option("--no-repeat-ngram", type=click.IntRange(0), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="All cores when absent.")
@click.option("--backend", type=click.Choice(CPU_BACKENDS), default="cpu", show_default=True, help="Runs --bundle.")
@click.option("--cpu-precision", type=click.Choice(["fp32", "bf16"]), default="fp32", help="Of --backend.")
@click.option("--out", type=PATH, required=True, help="JSON report to write.")
def main(
    bundle: Path,
    against: Path,
    images: Path,
    beams: int,
    no_repeat_ngram: int,
    threads: int | None,
    backend: str,
    cpu_precision: str,
    out: Path,
) -> None:
    """Compare a bundle's captions with those of its float32 twin."""
    check_outputs({"--out": out}, [])
    float32 = Captioner.load(against, backend="cpu", threads=threads)
    other = Captioner.load(bundle, backend=backend, threads=threads, cpu_precision=cpu_precision)
    check_twins(float32, other)
    options = replace(float32.bundle.options(), num_beams=beams, no_repeat_ngram_size=no_repeat_ngram)
    report = compare_bundles(float32, other, images, options)
    spec = float32.bundle.image
    found = find_images(images).images[:ENCODED_PICTURES]
    some = [read_image(i.path, spec.height, spec.width, spec.resample, frame=i.frame) for i in found]
    error = encoder_error(float32.backend, other.backend, np.stack(some))
    document = {
        "bundle": other.bundle.digest,
        "precision": other.bundle.precision,
        "against": float32.bundle.digest,
        "backend": backend,
        "cpu_precision": cpu_precision,
        **{name: importlib.metadata.version(name) for name in dict.fromkeys(("onnxruntime", PACKAGES[backend]))},
        "encoder_error": error,
        "share": report.share,
        **asdict(report),
    }
    write_atomically(out, json.dumps(document, indent=1) + "\n")
    rounded = other.bundle.precision if cpu_precision == "fp32" else f"{cpu_precision} on {backend}"
    click.echo(f"{rounded}: {summary(report)}; encoder off by {error:.1e} of its peak -> {out}")


if __name__ == "__main__":
    main()

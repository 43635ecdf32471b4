"""Compare a bundle of lower precision with the float32 bundle of the same checkpoint on ONNX Runtime's CPU provider.

    python -m export.precision --bundle FP16 --against FP32 --images DIR --beams 4 --out report.json

`--bundle FP32 --backend openvino --cpu-precision bf16` measures a float32 bundle whose matrix products the CPU rounds.

Rounding changes scores, and if two captions have nearly the same score it changes the caption. The report lists every
caption that differs, with its gap: how much lower the float32 bundle scores the other caption than its own. This module
does not depend on torch or on how bundles are written.
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
import torch
from numpy.typing import NDArray

from engine.backends import Backend, StepInputs
from engine.bundle.manifest import ImageSpec
from engine.captioner import Captioner
from engine.cli.shared import PATH, OneLine
from engine.errors import UsageError
from engine.files.atomic import check_outputs, write_atomically
from engine.inputs.images import ImageFile, find_images
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions
from engine.runtime import ARITHMETIC

PACKAGES = {"cpu": "onnxruntime", "openvino": "openvino", "torch": "torch"}
ENCODED_IMAGES = 8
"""Number of images whose encoder outputs a report compares. Captions are compared for all images."""


@dataclass(frozen=True)
class ScoredCaption:
    """The caption of one image by one bundle: token ids (prompt and end token included) and score."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Difference:
    """An image with two different captions, and the float32 bundle's scores of both.

    `position` is the index of the first id that differs, counted from 0 with the prompt. `gap` is float32's score of
    its own caption minus its score of the other caption, in the unit of scores (nats per token if length_penalty is 1).
    A negative gap means that float32's beam search missed a caption with a higher score.
    """

    image: str
    float32: list[int]
    other: list[int]
    position: int
    gap: float


@dataclass(frozen=True)
class PrecisionReport:
    """The comparison of all images under one setting.

    Drifts are |score - float32's score| over the identical captions, divided by |float32's score| if that is above 1.
    """

    options: dict
    images: int
    identical: int
    mean_score_drift: float
    max_score_drift: float
    differences: list[Difference]

    @property
    def share(self) -> float:
        """Share of the images whose captions have the same ids."""
        return self.identical / max(1, self.images)


def encoder_error(float32: Backend, other: Backend, images: NDArray[np.uint8]) -> float:
    """Return the error of `other`'s encoder on images u8[N,height,width,3]: the largest difference over the peak value.

    It is computed for the cross-attention keys and values of each layer, and the largest of these errors is returned.
    It is infinite if a value is not finite.
    """
    worst = 0.0
    for values in zip(float32.encode(images), other.encode(images), strict=True):
        mine, theirs = (
            one.float().cpu().numpy() if isinstance(one, torch.Tensor) else np.asarray(one, np.float32)
            for one in values
        )
        difference = np.abs(theirs - mine)
        if not np.isfinite(difference).all():
            return float("inf")
        worst = max(worst, float(difference.max() / np.abs(mine).max()))
    return worst


def forced_log_prob(
    backend: Backend, vocab_size: int, image: NDArray[np.uint8], ids: tuple[int, ...], prompt_length: int
) -> float:
    """Return the summed log-probability of a caption's ids after the prompt, given an image u8[height,width,3].

    The ids are fed one by one (teacher forcing). Returns NaN if the backend's scores are not numbers.
    """
    cache, total = backend.allocate(1), 0.0
    backend.admit(cache, 0, backend.encode(image[None]), 0)
    for position, next_id in enumerate(ids[1:]):
        inputs = StepInputs(
            input_ids=np.array([[ids[position]]]),
            positions=np.array([[position]]),
            scores=np.zeros((1, 1), np.float32),
            marked_ids=np.full((1, 1, 1), -1),
            penalties=np.ones(2, np.float32),
            ancestry=np.ones((1, 1, position + 1), bool),
            num_candidates=vocab_size,
        )
        scores, candidates = backend.step(cache, inputs)
        if position + 1 >= prompt_length:
            log_prob = scores[0, candidates[0] == next_id]
            total += float(log_prob[0]) if len(log_prob) else float("nan")
    return total


def compare_captions(
    float32: Captioner,
    options: DecodeOptions,
    images: Iterable[tuple[str, NDArray[np.uint8]]],
    float32_captions: Iterable[ScoredCaption],
    other_captions: Iterable[ScoredCaption],
) -> PrecisionReport:
    """Compare the captions of the float32 bundle with those of another bundle.

    `images` are (name, u8[height,width,3]), in the order of the captions.
    """
    prompt_length, vocab_size, count = len(float32.search(options).prompt), float32.bundle.model.vocab_size, 0
    drifts, differences = [], []
    for (name, image), expected, other in zip(images, float32_captions, other_captions, strict=True):
        count += 1
        if other.ids == expected.ids:
            drifts.append(abs(other.score - expected.score) / max(1.0, abs(expected.score)))
            continue
        position = next(i for i, (a, b) in enumerate(zip_longest(expected.ids, other.ids)) if a != b)
        expected_score, other_score = (
            forced_log_prob(float32.backend, vocab_size, image, ids, prompt_length)
            / (len(ids) - prompt_length) ** options.length_penalty
            for ids in (expected.ids, other.ids)
        )
        differences.append(
            Difference(name, list(expected.ids), list(other.ids), position, expected_score - other_score)
        )
    return PrecisionReport(
        options=options.values(),
        images=count,
        identical=len(drifts),
        mean_score_drift=float(np.mean(drifts or [0.0])),
        max_score_drift=float(np.max(drifts or [0.0])),
        differences=differences,
    )


def compare_bundles(float32: Captioner, other: Captioner, directory: Path, options: DecodeOptions) -> PrecisionReport:
    """Caption every image of a directory with both bundles under one setting and compare the captions.

    Raises UsageError if the directory has no images, and ImageError if one cannot be read.
    """
    spec, images = float32.bundle.image, find_images(directory).images
    if not images:
        raise UsageError(f"{directory} holds no images")
    captions = [
        [ScoredCaption(caption.ids, caption.score) for caption in captioner.caption(images, options)]
        for captioner in (float32, other)
    ]
    pixels = ((image.path.name, _read(image, spec)) for image in images)
    return compare_captions(float32, options, pixels, *captions)


def _read(image: ImageFile, spec: ImageSpec) -> NDArray[np.uint8]:
    return read_image(image.path, spec.height, spec.width, spec.resample, resize=spec.resize, frame=image.frame)


def check_twins(float32: Captioner, other: Captioner) -> None:
    """Raise UsageError unless both bundles come from the same checkpoint and `float32` has that precision."""
    mine, theirs = float32.bundle, other.bundle
    if mine.precision != "fp32":
        raise UsageError(f"{mine.path} is {mine.precision}, but --against needs the fp32 bundle")
    if (mine.checkpoint.get("sha256"), mine.model, mine.image) != (
        theirs.checkpoint.get("sha256"),
        theirs.model,
        theirs.image,
    ):
        raise UsageError(
            f"{theirs.path} and {mine.path} come from different checkpoints: export both from the same weights"
        )


def summary(report: PrecisionReport) -> str:
    """Return a report in one line."""
    gaps = [difference.gap for difference in report.differences]
    others = f"{min(gaps):+.1e} to {max(gaps):+.1e}" if gaps else ""
    gap_range = f"; where they differ, float32's own scores {others} more by float32" if gaps else ""
    return (
        f"{report.identical}/{report.images} captions as in float32 ({100 * report.share:.1f} %), their scores within "
        f"{report.max_score_drift:.1e} (mean {report.mean_score_drift:.1e}){gap_range}"
    )


@click.command(cls=OneLine)
@click.option(
    "--bundle",
    type=PATH,
    required=True,
    help="Bundle to measure: fp16 or int8, or the fp32 bundle with --cpu-precision.",
)
@click.option("--against", type=PATH, required=True, help="The fp32 bundle of the same checkpoint.")
@click.option("--images", type=PATH, required=True, help="Folder of images to caption with both bundles.")
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True, help="Number of beams; 1 is greedy.")
@click.option(
    "--no-repeat-ngram",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Never repeat an n-gram of this size within a caption; 0 is off.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each backend. Default: all cores.")
@click.option(
    "--backend",
    type=click.Choice([*PACKAGES]),
    default="cpu",
    show_default=True,
    help="Backend that runs --bundle; --against always runs on cpu.",
)
@click.option(
    "--cpu-precision",
    type=click.Choice([*ARITHMETIC]),
    default="fp32",
    show_default=True,
    help="Precision of the matrix products of --bundle; bf16 needs a CPU with such instructions, fp16 --backend torch.",
)
@click.option("--out", type=PATH, required=True, help="JSON file to write the report to.")
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
    """Compare the captions of a bundle with those of the float32 bundle of the same checkpoint."""
    check_outputs({"--out": out}, [])
    float32 = Captioner.load(against, backend="cpu", threads=threads)
    other = Captioner.load(bundle, backend=backend, threads=threads, cpu_precision=cpu_precision)
    check_twins(float32, other)
    options = replace(float32.bundle.options(), num_beams=beams, no_repeat_ngram_size=no_repeat_ngram)
    report = compare_bundles(float32, other, images, options)
    spec = float32.bundle.image
    encoded = find_images(images).images[:ENCODED_IMAGES]
    pixels = [_read(image, spec) for image in encoded]
    error = encoder_error(float32.backend, other.backend, np.stack(pixels))
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
    precision = other.bundle.precision if cpu_precision == "fp32" else f"{cpu_precision} on {backend}"
    click.echo(f"{precision}: {summary(report)}; encoder error {error:.1e} of the peak value -> {out}")


if __name__ == "__main__":
    main()

"""Compare a bundle with Hugging Face's `generate`: caption the same images with both and explain every difference.

    python -m export.parity --checkpoint DIR --bundle DIR --images DIR --beams 1,3,4,5,10 --out parity.json

Two correct float32 programs can give different captions if two candidates have the same score up to rounding. So each
mismatch is traced: both programs decode the image again, step by step, and the scores at the first divergence decide
whether it is a tie or a real mismatch. Images that are decoded in a batch can diverge at a tie as well (verdict
"batch", see export.reference.trace.judge). The exit code is 1 if there is a real mismatch, if the same ids give another
text, or if a score differs by more than SCORE_TOLERANCE.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from PIL import Image

from engine.bundle.manifest import Bundle
from engine.bundle.open import BundleRef
from engine.captioner import Captioner
from engine.cli.shared import NAME, PATH, TASK_HELP, OneLine, takes
from engine.errors import CheckpointError, EngineError, ImageError, UsageError, counted
from engine.files.atomic import check_outputs, write_atomically
from engine.inputs.images import find_images
from engine.inputs.pixels import decode_image
from engine.options import SAMPLING, DecodeOptions
from engine.runtime import Runtime
from export.bundle import checkpoint_sha256
from export.checkpoints.find import find_checkpoint
from export.reference.golden import golden_pictures
from export.reference.huggingface import Reference, ReferenceCaption, ensemble
from export.reference.trace import SCORE_TOLERANCE, TIE_ABSOLUTE, TIE_ERRORS, TIE_RELATIVE, judge
from export.restore import graph_weights


@dataclass(frozen=True)
class Mismatch:
    """One image whose ids differ: the step at which the searches diverge, the score gap there, and the verdict."""

    image: str
    ours: list[int]
    theirs: list[int]
    step: int
    gap: float
    verdict: str


@dataclass(frozen=True)
class SettingReport:
    """The comparison of all images under one set of decoding options."""

    options: dict
    images: int
    identical: int
    identical_text: int
    max_score_difference: float
    mismatches: list[Mismatch]

    @property
    def real(self) -> int:
        return sum(mismatch.verdict == "real" for mismatch in self.mismatches)

    @property
    def passed(self) -> bool:
        """True if there is no real mismatch, the same ids give the same text, and scores are within tolerance."""
        same_text = self.identical_text >= self.identical
        return not self.real and same_text and self.max_score_difference <= SCORE_TOLERANCE


def compare_setting(
    reference: Reference,
    captioner: Captioner,
    images: dict[str, Image.Image],
    options: DecodeOptions,
    batch_size: int,
) -> SettingReport:
    """Caption {name: RGB image} with both programs under one setting.

    With num_return_sequences above 1, all alternatives of an image must agree.
    """
    names = list(images)
    theirs: list[list[ReferenceCaption]] = []
    for i in range(0, len(names), batch_size):
        theirs += reference.generate(reference.pixels([images[name] for name in names[i : i + batch_size]]), options)
    ours = list(captioner.caption(images.values(), options))
    same_text, differences, mismatches = 0, [0.0], []
    for name, caption, expected in zip(names, ours, theirs, strict=True):
        mine = caption.alternatives
        rank = next((i for i, (a, b) in enumerate(zip(mine, expected, strict=True)) if a.ids != b.ids), None)
        if rank is not None:
            verdict, divergence = judge(reference, captioner, images[name], options, mine[rank], rank)
            ids = list(mine[rank].ids), list(expected[rank].ids)
            mismatches.append(Mismatch(name, *ids, divergence.step, divergence.gap, verdict))
            continue
        same_text += all(
            a.raw_text == reference.tokenizer.decode(b.ids, skip_special_tokens=True)
            for a, b in zip(mine, expected, strict=True)
        )
        differences += [
            abs(a.score - b.score) / max(1.0, abs(b.score))
            for a, b in zip(mine, expected, strict=True)
            if b.score is not None
        ]
    return SettingReport(
        options=options.values(),
        images=len(names),
        identical=len(names) - len(mismatches),
        identical_text=same_text,
        max_score_difference=max(differences),
        mismatches=mismatches,
    )


def load_images(directory: Path | None, size: int, limit: int | None) -> dict[str, Image.Image]:
    """Return the images of a directory, or the synthetic golden images if it is None, as {name: RGB image}."""
    if directory is None:
        return {f"synthetic {i}": Image.fromarray(image) for i, image in enumerate(golden_pictures(size))}
    images, failures = {}, []
    for image in find_images(directory).images[:limit]:
        try:
            images[image.path.name] = decode_image(image.path)
        except ImageError as error:
            failures.append(str(error))
    if failures:
        raise EngineError(f"{counted(len(failures), 'image')} cannot be read: {'; '.join(failures)}")
    return images


def _check_float32(bundle: Bundle) -> None:
    """Raise UsageError for other precisions: they change some captions, which is neither a tie nor an error."""
    if bundle.precision != "fp32":
        raise UsageError(
            f"{bundle.path} is {bundle.precision}, but only fp32 bundles reproduce generate id for id: compare it with "
            "the fp32 bundle of the same checkpoint (python -m export.precision)"
        )


def _check_same_weights(reference: Reference, bundle: Bundle, checkpoint: Path) -> None:
    """Raise CheckpointError unless the bundle was exported from this checkpoint, which `reference` has loaded.

    If the sha256 of the weight files is equal, nothing else is compared. Otherwise the tensors are: other files can
    hold the same weights, such as a restored checkpoint or one that was saved again.
    """
    size = reference.sizes.image_size
    if size != bundle.image.height:
        raise CheckpointError(
            f"{bundle.path} takes images of {bundle.image.height} px, the checkpoint {size} px: "
            f"add --image-size {bundle.image.height}, or pass the checkpoint that the bundle was exported from"
        )
    if bundle.checkpoint.get("sha256") == checkpoint_sha256(checkpoint):
        return
    expected = reference.model.state_dict()
    weights = graph_weights(bundle.path / "encoder.onnx") | graph_weights(bundle.path / "decoder.onnx")
    weights = {name: weight for name, weight in weights.items() if name in expected}
    differing = sum(not torch.equal(weight, expected[name].float()) for name, weight in weights.items())
    if differing or not weights:
        raise CheckpointError(
            f"{bundle.path} was exported from another checkpoint than {checkpoint} ({differing} of {len(weights)} "
            "weights differ): pass the bundle's own checkpoint, or export this one"
        )


def _numbers(_context: object, _parameter: object, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers like 1,3,4") from error


@click.command(cls=OneLine)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=NAME,
    required=True,
    multiple=True,
    help="Captioning checkpoint: a folder, a Hugging Face Hub id such as owner/name, or a .pth file of the original "
    "BLIP. Repeat it for each --bundle, in the same order.",
)
@click.option(
    "--bundle",
    "bundles",
    type=PATH,
    required=True,
    multiple=True,
    help="Bundle to compare. Repeat it to compare an ensemble of several bundles.",
)
@click.option(
    "--bundle-weight",
    "weights",
    type=float,
    multiple=True,
    help="Weight of a bundle in the ensemble's mean log-probability, one for each --bundle. Default: equal weights.",
)
@click.option("--task", help=TASK_HELP)
@click.option("--images", type=PATH, help="Folder of images to caption. Default: three synthetic images.")
@click.option("--limit", type=click.IntRange(1), help="Use only the first N images of --images. Default: all.")
@click.option(
    "--beams",
    callback=_numbers,
    default="1,3,4,5,10",
    show_default=True,
    help="Numbers of beams to compare, separated by commas.",
)
@click.option(
    "--no-repeat-ngram",
    callback=_numbers,
    default="0,3",
    show_default=True,
    help="N-gram sizes that must not repeat within a caption, separated by commas; 0 is off.",
)
@click.option(
    "--image-size",
    type=click.IntRange(1),
    help="Image size in pixels that was passed to `python -m export`. Default: the checkpoint's size.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Images that Hugging Face's generate captions per call.",
)
@click.option("--out", type=PATH, required=True, help="JSON file to write the report to.")
@takes(decoding=DecodeOptions, leaving_out=("num_beams", "no_repeat_ngram_size", *SAMPLING))
def main(
    checkpoints,
    bundles,
    weights,
    task,
    images,
    limit,
    beams,
    no_repeat_ngram,
    image_size,
    batch_size,
    out,
    decoding,
) -> None:
    """Compare the captions of a bundle with those of Hugging Face generate, id for id.

    Decoding options apply to both programs; the default of each is the bundle's generation setting. Sampling options
    are not accepted, because the two programs draw different random numbers.
    """
    check_outputs({"--out": out}, [])
    if len(checkpoints) != len(bundles):
        raise UsageError(
            f"{counted(len(checkpoints), 'checkpoint')} for {counted(len(bundles), 'bundle')}: pass one --checkpoint "
            "for each --bundle"
        )
    checkpoints = [find_checkpoint(checkpoint) for checkpoint in checkpoints]
    captioner = Captioner.open(BundleRef(bundles, weights, task), Runtime("cpu"))
    settings = [
        decoding.replace(num_beams=count, no_repeat_ngram_size=size).over(captioner.bundle.generation)
        for count in beams
        for size in no_repeat_ngram
    ]
    for options in settings:
        captioner.search(options)  # raises an error for options that do not fit, before any image is captioned
    references = []
    for checkpoint, bundle in zip(checkpoints, captioner.bundle.members or (captioner.bundle,), strict=True):
        _check_float32(bundle)
        references.append(replace(Reference.load(checkpoint, image_size), task=captioner.bundle.task))
        _check_same_weights(references[-1], bundle, checkpoint)
    reference = ensemble(references, captioner.bundle.weights) if len(references) > 1 else references[0]
    pictures = load_images(images, captioner.bundle.image.height, limit)
    reports = []
    for options in settings:
        report = compare_setting(reference, captioner, pictures, options, batch_size)
        reports.append(report)
        click.echo(
            f"beams {options.num_beams:2}, no-repeat {options.no_repeat_ngram_size}: "
            f"{report.identical}/{report.images} identical, "
            f"{len(report.mismatches) - report.real} ties, {report.real} real, "
            f"{report.identical_text}/{report.identical} same text, "
            f"largest score difference {report.max_score_difference:.1e}"
        )
    passed = all(report.passed for report in reports)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxruntime")}
    document = {
        "checkpoint": " + ".join(map(str, checkpoints)),
        "bundle": captioner.bundle.digest,
        "versions": versions,
        "tie_gap": {"absolute": TIE_ABSOLUTE, "relative": TIE_RELATIVE, "errors": TIE_ERRORS},
        "settings": [asdict(report) for report in reports],
        "real_mismatches": sum(report.real for report in reports),
        "passed": passed,
    }
    write_atomically(out, json.dumps(document, indent=1) + "\n")
    click.echo(f"{'pass' if passed else 'FAIL'}: {document['real_mismatches']} real mismatches -> {out}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()

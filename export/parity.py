"""Does the bundle say what Hugging Face says? Captions the same pictures both ways and explains every difference.

    python -m export.parity --checkpoint DIR --bundle DIR --images DIR --beams 1,3,4,5,10 --out parity.json

Two correct float32 programs can differ where two candidates score the same to the last digits. So a mismatch is
traced: both decode the picture again, step by step, and the scores at the first divergence say whether it is a tie or
real. Pictures decoded side by side can turn at a tie as well ("batch", see judge). A real mismatch makes the exit code
1, and so do another text for the same ids and a score that is off.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from PIL import Image

from engine.bundle.ensemble import place_of
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.captions import Alternative
from engine.cli.group import OneLine
from engine.cli.shared import NAME, PATH
from engine.decoding.beam import Hypothesis
from engine.errors import CheckpointError, EngineError, ImageError, UsageError
from engine.files.atomic import check_outputs, write_atomically
from engine.inputs.images import find_images
from engine.inputs.pixels import decode_image, read_image
from engine.options import DecodeOptions
from engine.runtime import Runtime
from export.checkpoints.find import find_checkpoint
from export.manifest import checkpoint_sha256
from export.reference.ensemble import ensemble
from export.reference.golden import golden_pictures
from export.reference.huggingface import Reference, ReferenceCaption, UncachedBackend
from export.reference.trace import (
    TIE_ABSOLUTE,
    TIE_RELATIVE,
    Divergence,
    caption_gap,
    closest_candidates,
    closest_words,
    summed_log_prob,
    trace_both,
)

SCORE_TOLERANCE = 1e-4
"""Largest accepted difference of a score, relative where the score is beyond -1."""


@dataclass(frozen=True)
class Mismatch:
    """One picture whose ids differ: at which step the candidates first differ, by what gap, and the verdict."""

    image: str
    ours: list[int]
    theirs: list[int]
    step: int
    gap: float
    verdict: str


@dataclass(frozen=True)
class SettingReport:
    """All pictures under one setting."""

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
        """No real mismatch, the same text for the same ids, and scores within tolerance."""
        same_text = self.identical_text >= self.identical
        return not self.real and same_text and self.max_score_difference <= SCORE_TOLERANCE


def compare_setting(
    reference: Reference,
    captioner: Captioner,
    pictures: dict[str, Image.Image],
    options: DecodeOptions,
    batch_size: int,
) -> SettingReport:
    """Caption {name: RGB picture} both ways under one setting."""
    names = list(pictures)
    theirs: list[ReferenceCaption] = []
    for i in range(0, len(names), batch_size):
        pixel_values = reference.pixels([pictures[name] for name in names[i : i + batch_size]])
        theirs += [best for best, *_ in reference.generate(pixel_values, options)]
    ours = list(captioner.caption(pictures.values(), options))
    same_text, differences, mismatches = 0, [0.0], []
    for name, mine, expected in zip(names, ours, theirs, strict=True):
        if mine.ids == expected.ids:
            same_text += mine.raw_text == reference.tokenizer.decode(expected.ids, skip_special_tokens=True)
            if expected.score is not None:
                differences.append(abs(mine.score - expected.score) / max(1.0, abs(expected.score)))
            continue
        verdict, divergence = judge(reference, captioner, pictures[name], options, mine.best)
        mismatches.append(Mismatch(name, list(mine.ids), list(expected.ids), divergence.step, divergence.gap, verdict))
    return SettingReport(
        options=options.values(),
        images=len(names),
        identical=len(names) - len(mismatches),
        identical_text=same_text,
        max_score_difference=max(differences),
        mismatches=mismatches,
    )


def judge(
    reference: Reference,
    captioner: Captioner,
    picture: Image.Image,
    options: DecodeOptions,
    ours: Alternative | Hypothesis,
) -> tuple[str, Divergence]:
    """Say why the engine said `ours` about an RGB picture and `generate` did not: ("tie" | "batch" | "real", where).

    "tie": about this picture alone the two searches part at a tie and end in these very captions. "batch": beside other
    pictures, or with its caches, one of them took another turn, as matrix products round otherwise: alone they agree or
    part at a tie, two candidates of the search tie, and the engine scored `ours` as the reference does.
    """
    ((alone, *_),) = reference.generate(reference.pixels([picture]), options)
    spec, backend = captioner.bundle.image, UncachedBackend(reference)
    pixels = read_image(picture, spec.height, spec.width, spec.resample)
    divergence, mine, theirs = trace_both(captioner, backend, pixels, options)
    if not divergence.is_tie:
        return "real", divergence
    if theirs.ids == alone.ids != mine.ids and mine.ids == ours.ids:
        return "tie", divergence
    search = captioner.search(options)
    greedy = options.num_beams == 1
    step, gap = closest_words(backend, search, pixels, alone.ids) if greedy else closest_candidates(theirs)
    score = summed_log_prob(backend, search, pixels, ours.ids)
    scored_alike = abs(score - ours.sum_log_prob) <= SCORE_TOLERANCE * max(1.0, abs(score))
    is_tie = gap <= TIE_ABSOLUTE + TIE_RELATIVE * abs(score)
    if not is_tie and ours.ids != alone.ids:  # no candidates tie at one step, but the whole captions may
        is_tie = caption_gap(backend, search, pixels, ours.ids, alone.ids).is_tie
    return ("batch" if scored_alike and is_tie else "real"), Divergence(step, gap, is_tie)


def load_pictures(directory: Path | None, size: int, limit: int | None) -> dict[str, Image.Image]:
    """Return {name: RGB picture} of a directory, or the synthetic golden pictures without one."""
    if directory is None:
        return {f"synthetic {i}": Image.fromarray(picture) for i, picture in enumerate(golden_pictures(size))}
    pictures, failures = {}, []
    for image in find_images(directory).images[:limit]:
        try:
            pictures[image.path.name] = decode_image(image.path)
        except ImageError as error:
            failures.append(str(error))
    if failures:
        raise EngineError(f"{len(failures)} images cannot be read: {'; '.join(failures)}")
    return pictures


def _check_float32(bundle: Bundle) -> None:
    """Other precisions say something else now and then, and that is neither a tie nor a fault."""
    if bundle.precision != "fp32":
        raise UsageError(
            f"{bundle.path} is {bundle.precision}, and parity is id for id in float32 only: compare it with its "
            "float32 twin, python -m export.precision"
        )


def _check_same_shape(reference: Reference, bundle: Bundle) -> None:
    text, model = reference.model.config.text_config, bundle.model
    sizes = {"layers": (text.num_hidden_layers, model.num_layers), "vocabulary": (text.vocab_size, model.vocab_size)}
    sizes["image size"] = (reference.model.config.vision_config.image_size, bundle.image.height)
    for name, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise CheckpointError(f"{bundle.path} is of another model: {name} {ours}, the checkpoint's {theirs}")


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
    help="BLIP captioning checkpoint (safetensors): a folder, or a hub's id. Of several bundles each one's, in their "
    "order.",
)
@click.option(
    "--bundle", "bundles", type=PATH, required=True, multiple=True, help="Bundle; several ones caption together."
)
@click.option("--bundle-weight", "weights", type=float, multiple=True, help="As in `engine caption`.")
@click.option("--images", type=PATH, help="Directory of pictures; synthetic ones when absent.")
@click.option("--limit", type=click.IntRange(1), help="Use only the first N pictures.")
@click.option("--beams", callback=_numbers, default="1,3,4,5,10", show_default=True)
@click.option("--no-repeat-ngram", callback=_numbers, default="0,3", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(1), help="The bundle's own limit when absent.")
@click.option("--prompt", help="Text every caption starts with.")
@click.option("--image-size", type=click.IntRange(1), help="As given to `python -m export`.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Pictures a generate call.")
@click.option("--out", type=PATH, required=True, help="JSON report to write.")
def main(
    checkpoints,
    bundles,
    weights,
    images,
    limit,
    beams,
    no_repeat_ngram,
    max_new_tokens,
    prompt,
    image_size,
    batch_size,
    out,
) -> None:
    """Compare a bundle with Hugging Face generate, id for id."""
    check_outputs({"--out": out}, [])
    if len(checkpoints) != len(bundles):
        raise UsageError(f"{len(checkpoints)} checkpoints and {len(bundles)} bundles: give one --checkpoint for each")
    checkpoints = [find_checkpoint(checkpoint) for checkpoint in checkpoints]
    captioner = Captioner.open(place_of(bundles, weights), Runtime("cpu"))
    references = []
    for checkpoint, bundle in zip(checkpoints, captioner.bundle.members or (captioner.bundle,), strict=True):
        references.append(Reference.load(checkpoint, image_size))
        _check_float32(bundle)
        if bundle.checkpoint["sha256"] != checkpoint_sha256(checkpoint):
            click.echo(f"note: {bundle.path} was exported from other weights files than {checkpoint} holds", err=True)
        _check_same_shape(references[-1], bundle)
    reference = ensemble(references, captioner.bundle.weights) if len(references) > 1 else references[0]
    pictures = load_pictures(images, captioner.bundle.image.height, limit)
    base = captioner.bundle.options(prompt=prompt, max_new_tokens=max_new_tokens)
    reports = []
    for count in beams:
        for size in no_repeat_ngram:
            options = replace(base, num_beams=count, no_repeat_ngram_size=size)
            report = compare_setting(reference, captioner, pictures, options, batch_size)
            reports.append(report)
            click.echo(
                f"beams {count:2}, no-repeat {size}: {report.identical}/{report.images} identical, "
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
        "tie_gap": {"absolute": TIE_ABSOLUTE, "relative": TIE_RELATIVE},
        "settings": [asdict(report) for report in reports],
        "real_mismatches": sum(report.real for report in reports),
        "passed": passed,
    }
    write_atomically(out, json.dumps(document, indent=1) + "\n")
    click.echo(f"{'pass' if passed else 'FAIL'}: {document['real_mismatches']} real mismatches -> {out}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()

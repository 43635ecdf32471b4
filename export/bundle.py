"""Export a checkpoint to a bundle: graphs, manifest, golden recordings and the checks before it is released.

`export_bundle` is the entry point. It writes a draft next to the output folder, replays the golden recordings on it and
moves it into place only if all checks pass.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from engine.backends import Backend, open_backend
from engine.bundle.manifest import (
    FORMAT,
    MANIFEST,
    PER_ROW,
    Bundle,
    FileDigests,
    ImageSpec,
    ModelDims,
)
from engine.bundle.open import on_halves
from engine.bundle.replace import bundle_drafts, is_replaceable, move_bundle
from engine.captioner import Captioner
from engine.checkpoints.files import weight_files
from engine.checkpoints.read import sha256_of_all
from engine.checkpoints.settings import assumed_settings, configured_settings, ignored_settings, size_before_crop
from engine.errors import ExportError, counted
from engine.files.atomic import file_sha256
from engine.machine.verify import Check, Golden, first_difference, replay, same_on_halves, verify, verify_halves
from engine.options import GENERATION_SETTINGS
from engine.runtime import Runtime
from export.checkpoints.settings import check_supported, tokenizer_settings
from export.graphs.exporters import write_graphs
from export.precision import PrecisionReport, ScoredCaption, compare_captions, encoder_error, forced_log_prob, summary
from export.reference.golden import record_golden
from export.reference.huggingface import Reference, normalisation
from export.reference.torch_backend import TorchBackend
from export.reference.trace import judge


def generation_defaults(reference: Reference) -> dict:
    """Return the checkpoint's generation settings that differ from Hugging Face's own."""
    return {
        name: value
        for name, value in reference.family.generation_config(reference.model).to_diff_dict().items()
        if name in GENERATION_SETTINGS and value is not None
    }


def describe_checkpoint(reference: Reference, checkpoint: Path) -> dict:
    """Return the manifest of a checkpoint's fp32 bundle, without the sha256 of the bundle's files."""
    processor, sizes = reference.image_processor, reference.sizes
    _, mean, std = normalisation(processor)
    settings, sources = generation_defaults(reference), configured_settings(checkpoint)
    weights = {path.name: file_sha256(path) for path in weight_files(checkpoint)}
    tasks = {"tasks": reference.tasks} if reference.tasks else {}
    return tasks | {
        "format": FORMAT,
        "family": reference.family.rules.model_type,
        "precision": "fp32",
        "model": {entry.name: getattr(sizes, entry.name) for entry in fields(ModelDims)},
        "image": ImageSpec(
            height=sizes.image_size,
            width=sizes.image_size,
            resample=Image.Resampling(processor.resample).name.lower(),
            mean=tuple(mean),
            std=tuple(std),
            resize=size_before_crop(processor.to_dict()),
        ).as_json(),
        "tokens": asdict(sizes.tokens),
        "generation": settings,
        "generation_from": {name: sources[name].source for name in settings},
        "clean_up_tokenization_spaces": bool(reference.tokenizer.clean_up_tokenization_spaces),
        "checkpoint": {
            "name": checkpoint.resolve().name,
            "sha256": sha256_of_all(weights.values()),
            "files": weights,
        },
        "restore": {  # read only by `python -m export.restore`, not by the engine
            "config": reference.model.config.to_diff_dict(),
            "image_processor": processor.to_dict(),
            "tokenizer": tokenizer_settings(reference.tokenizer),
        },
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnx")},
    }


def checkpoint_sha256(checkpoint: Path) -> str:
    """Return one sha256 for a checkpoint: the hash of its weight files' sha256 digests, in name order."""
    return sha256_of_all(file_sha256(path) for path in weight_files(checkpoint))


def write_manifest(draft: Path, manifest: dict, sha256: Callable[[Path], str] = file_sha256) -> None:
    """Write manifest.json into a bundle's folder, with the sha256 of every other file there."""
    files = {path.name: sha256(path) for path in sorted(draft.iterdir()) if path.name != MANIFEST}
    text = json.dumps(manifest | {"files": files}, indent=1, sort_keys=True)
    (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")


ENCODER_BOUND = {"fp16": 0.05, "int8": 0.25}
"""Largest accepted encoder error, relative to the peak value (export.precision.encoder_error).

Both bounds come from the demo model (benchmarks/LOG.md). fp16: with every operator rounded, its error is 0.008.
Rounding errors add up like a random walk, so 24 layers instead of its 8 give 0.014, and the bound is three times that.
A model that overflows has a far larger or non-finite error. int8: the error is 0.03, and 0.064 without the rotation
(engine/checkpoints/int8.py), as other families have it; the bound is four times that. With one scale per weight
tensor the error is 0.25, and a fifth of the captions change."""


@dataclass(frozen=True)
class _Draft:
    """A draft of a bundle that is open on the CPU: the whole decoder, and the split decoder that ensembles use."""

    captioner: Captioner
    split: Captioner

    @classmethod
    def open(cls, folder: Path, digests: FileDigests, task: str | None = None) -> _Draft:
        bundle = Bundle.load(folder, digests).for_task(task)
        split = on_halves(bundle)
        assert split is not None, "write_graphs has written the split decoder"
        return cls(*(Captioner(one, open_backend(one, Runtime("cpu"))) for one in (bundle, split)))

    def checks(self, digests: FileDigests) -> list[Check]:
        """Read the draft's files again as far as they have changed, and replay its golden recordings."""
        bundle = Bundle.load(self.captioner.bundle.path, digests).for_task(self.captioner.bundle.task)
        return verify(bundle, self.captioner.backend) + verify_halves(bundle, Runtime("cpu"), self.split.backend)


def convert(
    reference: Reference,
    float32: Path,
    out: Path,
    precision: str,
    exporter: str,
    digests: FileDigests,
    log: Callable[[str], None],
) -> Path:
    """Write a bundle of `precision` ("fp16" or "int8") into the new folder `out` and return `out`.

    `float32` is the folder of the float32 bundle. The golden captions of both bundles are compared, and the differences
    are listed in the manifest. Raises ExportError if the encoder error exceeds ENCODER_BOUND, if a number overflows, or
    if `verify` fails.
    """
    out.mkdir()
    for name in ("tokenizer.json", "golden.npz"):
        shutil.copy(float32 / name, out / name)
    manifest = json.loads((float32 / MANIFEST).read_text(encoding="utf-8")) | {"precision": precision}
    if precision == "int8":
        manifest["activation_scales"] = PER_ROW
    log(f"exporting graphs in {precision}")
    model = copy.deepcopy(reference.model).half() if precision == "fp16" else reference.model
    write_graphs(model, out, normalisation(reference.image_processor), is_int8=precision == "int8", exporter=exporter)
    write_manifest(out, manifest, digests)
    log(f"comparing {precision} with float32 on the golden images")
    error, reports, failed = 0.0, [], []
    for task in reference.tasks or (None,):
        draft, bundle = _Draft.open(out, digests, task), Bundle.load(float32, digests).for_task(task)
        ours, theirs = draft.captioner, Captioner(bundle, open_backend(bundle, Runtime("cpu")))
        others: list[Backend] = [ours.backend]
        if precision == "fp16":
            others.append(TorchBackend(model, reference.image_processor, bundle.task_ids))
        error = max(error, _check_numbers(theirs, others, precision))
        reports += _skip_differences(theirs, ours, digests, log)
        manifest["conversion"] = {
            "encoder_error": error,
            "encoder_bound": ENCODER_BOUND[precision],
            "golden": [asdict(report) for report in reports],
        }
        write_manifest(out, manifest, digests)
        failed += [check for check in draft.checks(digests) if not check.passed]
    if failed:
        raise ExportError(
            f"the {precision} scores differ too much from float32: {'; '.join(map(str, failed))}: export with "
            "--precision fp32"
        )
    return out


def _check_numbers(float32: Captioner, others: list[Backend], precision: str) -> float:
    """Return the largest encoder error on the golden images.

    float16 is checked on two backends. ONNX Runtime's CPU provider computes much of a float16 graph in float32. Torch
    rounds after every operator, as a GPU does, so only torch shows the overflows that a GPU would have. Raises
    ExportError if the error exceeds the bound, or if a value is not finite.
    """
    golden = Golden.load(float32.bundle.path / "golden.npz")
    error = max(encoder_error(float32.backend, other, golden.pixel_values) for other in others)
    bound = ENCODER_BOUND[precision]
    if not error <= bound:
        if np.isfinite(error):
            reason = f"the encoder error is {error:.2g} of the peak value, above the bound of {bound}"
        else:
            reason = "the encoder output is not finite"
        raise ExportError(f"in {precision} {reason}: export with --precision fp32")
    vocab_size = float32.bundle.model.vocab_size
    first, *_ = golden.of_task(float32.bundle.task)
    for image, (hypothesis, *_) in zip(golden.pixel_values, replay(float32, golden, first), strict=True):
        for other in others:
            if not np.isfinite(forced_log_prob(other, vocab_size, image, hypothesis.ids, 1)):
                raise ExportError(
                    f"in {precision} the decoder's log-probabilities are not finite: export with --precision fp32"
                )
    return error


def _skip_differences(
    float32: Captioner, ours: Captioner, digests: FileDigests, log: Callable[[str], None]
) -> list[PrecisionReport]:
    """Compare the golden captions and drop the images whose caption changed from the recording of our bundle.

    The recording stays PyTorch's: `engine verify` then checks the captions that both precisions agree on. Raises
    ExportError if no caption is left.
    """
    path = ours.bundle.path / "golden.npz"
    golden, has_changed = Golden.load(path), False
    images = [(f"golden picture {i}", image) for i, image in enumerate(golden.pixel_values)]
    reports = []
    for setting in golden.of_task(ours.bundle.task):
        options, replayed = golden.settings[setting], replay(ours, golden, setting)
        float32_captions, our_captions = (
            [ScoredCaption(best.ids, best.score) for best, *_ in captions]
            for captions in (replay(float32, golden, setting), replayed)
        )
        report = compare_captions(float32, golden.options(setting), images, float32_captions, our_captions)
        log(f"{', '.join(f'{key} {value}' for key, value in options.items())}: {summary(report)}")
        for i, (expected, other) in enumerate(zip(float32_captions, our_captions, strict=True)):
            differs = expected.ids != other.ids
            rank = 0 if differs else first_difference(replayed[i], golden.n_best(setting)[i])
            if differs or rank:
                golden.skip(setting, i, rank or 0)
                has_changed = True
        reports.append(report)
    if not any(expected for setting in golden.of_task(ours.bundle.task) for expected in golden.expected(setting)):
        raise ExportError(
            f"in {ours.bundle.precision} every golden caption differs from float32: export with --precision fp32"
        )
    if has_changed:
        golden.save(path)
        digests.forget(path)
    return reports


def export_bundle(
    checkpoint: Path,
    out: Path,
    log: Callable[[str], None],
    *,
    precision: str = "fp32",
    image_size: int | None = None,
    exporter: str = "torch",
) -> Bundle:
    """Export a captioning checkpoint and return the bundle, after replaying its golden recordings.

    `log` receives progress lines. fp16 and int8 bundles are made from a float32 bundle that passed its checks, and are
    compared with it (see convert). Everything is written next to `out` and moved there at the end, so a failed export
    leaves no files. A bundle that is already at `out` is replaced; any other content there raises ExportError. Raises
    CheckpointError, ExportError or OutputError, and UsageError while another export writes to `out`.
    """
    if not is_replaceable(out):
        raise ExportError(f"{out} exists and is not a bundle, or holds other files as well: choose another --out")
    reference = Reference.load(checkpoint, image_size)
    check_supported(reference.model, checkpoint)
    for line in (*ignored_settings(checkpoint), *assumed_settings(checkpoint)):
        log(f"note: {line}")
    digests = FileDigests()
    with bundle_drafts(out, log) as folder:
        move_bundle(_write_draft(reference, checkpoint, folder, precision, exporter, digests, log), out)
    return Bundle.load(out, digests)


def _write_draft(
    reference: Reference,
    checkpoint: Path,
    folder: Path,
    precision: str,
    exporter: str,
    digests: FileDigests,
    log: Callable[[str], None],
) -> Path:
    """Write a bundle below `folder`, check it, and return its folder. No file of it is open any more."""
    out = folder / "bundle"
    out.mkdir()
    # read the config before the graphs are written: optimum sets use_cache to False in every config it sees
    manifest = describe_checkpoint(reference, checkpoint)
    _write_files(reference, out, exporter, log)
    write_manifest(out, manifest, digests)
    log("replaying the golden recordings")
    failed = []
    for task in reference.tasks or (None,):
        draft = _Draft.open(out, digests, task)
        if _skip_ties(replace(reference, task=task), draft, log):
            digests.forget(out / "golden.npz")
            write_manifest(out, manifest, digests)
        failed += [check for check in draft.checks(digests) if not check.passed]
    del draft  # the next precision needs the memory
    if failed:
        more = f", and {counted(len(failed) - 1, 'more setting fails', 'more settings fail')}" if failed[1:] else ""
        raise ExportError(
            f"{checkpoint}: the exported graphs do not give PyTorch's captions, and the difference is not a tie: "
            f"{failed[0]}{more}. No bundle was written: report this as a bug"
        )
    if precision == "fp32":
        return out
    return convert(reference, out, folder / precision, precision, exporter, digests, log)


def _skip_ties(reference: Reference, draft: _Draft, log: Callable[[str], None]) -> bool:
    """Drop a golden image from a setting's recording if the engine's caption differs because of a tie.

    Returns whether there was a tie, so that golden.npz has changed. Both the whole decoder and the split decoder are
    replayed, because each must reproduce what is recorded.
    """
    path, has_ties = draft.captioner.bundle.path / "golden.npz", False
    golden = Golden.load(path)
    replays = [(draft.captioner, setting) for setting in golden.of_task(reference.task)]
    replays += [(draft.split, setting) for setting in same_on_halves(golden, reference.task)]
    for captioner, setting in replays:
        captions, options = replay(captioner, golden, setting), golden.options(setting)
        for i, expected in enumerate(golden.n_best(setting)):
            rank = first_difference(captions[i], expected)
            if rank is None:
                continue
            pixels = golden.pixel_values[i]
            verdict, divergence = judge(reference, captioner, pixels, options, captions[i][rank], rank)
            if verdict != "real":
                log(f"golden image {i} is skipped in setting {setting}: its captions tie, {divergence.gap:.1e} apart")
                golden.skip(setting, i, rank)
                has_ties = True
    for setting in golden.of_task(reference.task):
        if not any(golden.expected(setting)):
            log(f"note: every golden image ties in setting {setting}: `engine verify` cannot check it")
    if has_ties:
        golden.save(path)
    return has_ties


def _write_files(reference: Reference, out: Path, exporter: str, log: Callable[[str], None]) -> None:
    """Write golden recordings, tokenizer and graphs: all files of a bundle but its manifest."""
    log("recording golden outputs")
    record_golden(reference).save(out / "golden.npz")
    tokenizer = reference.tokenizer.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # written by Python, whose errors name the file: tokenizer.save raises a plain Exception if the disk is full
    (out / "tokenizer.json").write_bytes(tokenizer.to_str(pretty=True).encode())
    log("exporting graphs")
    write_graphs(reference.model, out, normalisation(reference.image_processor), exporter=exporter)

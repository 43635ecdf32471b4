"""Convert a float32 bundle that has passed to another precision: convert, compare, and refuse what went wrong.

How the two caption the golden images goes into the manifest (`conversion`). The golden recordings stay PyTorch's
float32 captions. An image that the new bundle captions differently is listed there and removed from the recording, so
that `engine verify` still compares the others with PyTorch's ids and scores.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engine.backends import Backend, open_backend
from engine.bundle.manifest import MANIFEST, Bundle
from engine.captioner import Captioner
from engine.errors import ExportError
from engine.machine.verify import Golden, first_difference, replay, verify, verify_halves
from engine.options import options_from
from engine.runtime import Runtime
from export.graphs.onnx_graphs import write_graphs
from export.manifest import write_manifest
from export.precision import PrecisionReport, ScoredCaption, compare_captions, encoder_error, forced_log_prob, summary
from export.reference.huggingface import Reference, normalisation
from export.reference.torch_backend import TorchBackend

ENCODER_BOUND = {"fp16": 0.05, "int8": 0.25}
"""Largest accepted encoder error over its own peak (export.precision.encoder_error), from the demo (benchmarks/LOG.md).
fp16: it is off by 0.008 with every operator rounded; roundings add up like a random walk, so 24 layers for its 8 make
0.014, and the bound is three times that; what overflows is off by far more or not finite. int8: it is off by 0.085,
three times that; 0.25 with one scale for all of a weight, and then a fifth of the captions change."""


def convert(
    reference: Reference, float32: Bundle, out: Path, precision: str, exporter: str, say: Callable[[str], None]
) -> Path:
    """Write the bundle of `precision` ("fp16" or "int8") for a float32 one into the new directory `out`; return it.

    Raises ExportError where the encoder is off by more than ENCODER_BOUND, a number overflows, or `verify` fails.
    """
    out.mkdir()
    for name in ("tokenizer.json", "golden.npz"):
        shutil.copy(float32.path / name, out / name)
    manifest = json.loads((float32.path / MANIFEST).read_text(encoding="utf-8")) | {"precision": precision}
    say(f"exporting graphs in {precision}")
    model = copy.deepcopy(reference.model).half() if precision == "fp16" else reference.model
    write_graphs(model, out, normalisation(reference.image_processor), is_int8=precision == "int8", exporter=exporter)
    write_manifest(out, manifest)
    ours, theirs = Captioner.load(out, backend="cpu"), Captioner(float32, open_backend(float32, Runtime("cpu")))
    say(f"comparing {precision} with float32 on the golden pictures")
    others: list[Backend] = [ours.backend]
    if precision == "fp16":
        others.append(TorchBackend(model, reference.image_processor))
    error = _check_numbers(theirs, others, precision)
    reports = _settle_differences(theirs, ours, say)
    manifest["conversion"] = {
        "encoder_error": error,
        "encoder_bound": ENCODER_BOUND[precision],
        "golden": [asdict(report) for report in reports],
    }
    write_manifest(out, manifest)
    bundle = Bundle.load(out)
    checks = verify(bundle, ours.backend) + verify_halves(bundle, Runtime("cpu"))
    if failed := [check for check in checks if not check.passed]:
        raise ExportError(
            f"{precision} scores captions too differently from float32: {'; '.join(map(str, failed))}: export fp32"
        )
    return out


def _check_numbers(float32: Captioner, others: list[Backend], precision: str) -> float:
    """Return the worst encoder error on the golden pictures; raise ExportError beyond the bound or on an overflow.

    float16 is looked at twice: ONNX Runtime's CPU provider computes much of such a graph in float32, torch rounds after
    every operator as a GPU does, so only torch shows what overflows there.
    """
    golden = Golden.load(float32.bundle.path / "golden.npz")
    error = max(encoder_error(float32.backend, other, golden.pixel_values) for other in others)
    bound = ENCODER_BOUND[precision]
    if not error <= bound:
        what = f"off by {error:.2g} of its own peak" if np.isfinite(error) else "not finite"
        raise ExportError(f"in {precision} the encoder is {what}, {bound} is the bound: export fp32")
    vocab_size = float32.bundle.model.vocab_size
    for picture, (hypothesis,) in zip(golden.pixel_values, replay(float32, golden, 0), strict=True):
        for other in others:
            if not np.isfinite(forced_log_prob(other, vocab_size, picture, hypothesis.ids, 1)):
                raise ExportError(f"in {precision} the decoder's log-probabilities are not finite: export fp32")
    return error


def _settle_differences(float32: Captioner, ours: Captioner, say: Callable[[str], None]) -> list[PrecisionReport]:
    """Compare the golden captions, and remove images that get another caption from our bundle's recording."""
    path = ours.bundle.path / "golden.npz"
    golden = Golden.load(path)
    pictures = [(f"golden picture {i}", picture) for i, picture in enumerate(golden.pixel_values)]
    reports = []
    for setting, options in enumerate(golden.settings):
        replayed = replay(ours, golden, setting)
        theirs, found = (
            [ScoredCaption(best.ids, best.score) for best, *_ in captions]
            for captions in (replay(float32, golden, setting), replayed)
        )
        report = compare_captions(float32, options_from({}, options), pictures, theirs, found)
        say(f"{', '.join(f'{key} {value}' for key, value in options.items())}: {summary(report)}")
        for i, (expected, other) in enumerate(zip(theirs, found, strict=True)):
            if expected.ids != other.ids:
                golden.skip(setting, i, 0)
            elif rank := first_difference(replayed[i], golden.n_best(setting)[i]):
                golden.skip(setting, i, rank)
        reports.append(report)
    if not any(expected for setting in range(len(golden.settings)) for expected in golden.expected(setting)):
        raise ExportError(f"{ours.bundle.precision} captions no golden picture as float32 does: export fp32")
    golden.save(path)
    return reports

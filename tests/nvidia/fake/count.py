"""Count what a bundle's calls would launch on a GPU, with their memory. Stand-ins; no GPU has run this.

    export ENGINE_ORT_GPU=FOLDER    # an unzipped onnxruntime-gpu wheel
    eval "$(python -m tests.nvidia.fake.build build/fake)"
    FAKE_FAST=1 python -m tests.nvidia.fake.count --bundle BUNDLE --rows 1024 --images 512

Prints JSON: `load`, `run` (whole captions) and, in steady state, `encode`, `admit`, `step` and `regroup`. Calls, shapes
and memory are those of the real ONNX Runtime. Nothing is computed, so the candidates of `run` are drawn at random.
`cpu_ms` is processor time of a call without a driver, `ort_ms` the part of it inside ONNX Runtime.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from benchmarks.host_worker import pictures
from engine.backends import open_backend
from engine.backends.ort import OrtBackend, OrtCache
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.cli.shared import OneLine
from engine.decoding.backend import Backend, StepInputs
from engine.decoding.scheduler import SETTLE_EVERY
from engine.runtime import Runtime
from tests.nvidia.fake.events import capabilities, describe, peak_bytes, recorded

FOLDED = 40
"""Folded positions of the steps that are counted."""
WARM_UP, TIMED = 2, 5
"""Rounds of calls; of each call the last TIMED times are used. ONNX Runtime allocates memory in the first ones."""
ENDS = 0.05
"""Share of end tokens among random candidates."""
SEARCH: dict[str, Any] = {"no_repeat_ngram_size": 3, "max_new_tokens": 20}


def random_step(end_token: int, seed: int = 1) -> Callable[..., tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Return a replacement of OrtBackend.step: the decoder runs, but candidates are drawn, ENDS of them end tokens."""
    run, rng = OrtBackend.step, np.random.default_rng(seed)

    def step(self: OrtBackend, cache: OrtCache, inputs: StepInputs, at: int | None = None) -> Any:
        run(self, cache, inputs, at)
        slots, beams = inputs.input_ids.shape
        shape, vocabulary = (slots, inputs.num_candidates), self._model.vocab_size
        # at the first position only one beam has a score, so the candidates come from that one
        rows = np.where(inputs.positions[:, :1] == 0, 0, rng.integers(0, beams, shape))
        words = np.where(rng.random(shape) < ENDS, end_token, rng.integers(0, vocabulary, shape))
        falling = 0.05 * np.arange(1, shape[1] + 1, dtype=np.float32)
        return inputs.scores.max(1, keepdims=True) - falling, rows * vocabulary + words

    return step


def count_run(bundle: Bundle, backend: Backend, images: int, rows: int, beams: int) -> dict[str, Any]:
    """Caption random images; return the events of the run, its times and its memory."""
    made = pictures(images, bundle.image.height, bundle.image.width)
    start, cpu = time.perf_counter(), time.process_time()
    with recorded() as events, mock.patch.object(OrtBackend, "step", random_step(bundle.tokens.eos)):
        captions = list(Captioner(bundle, backend).caption(made, rows=rows, num_beams=beams, **SEARCH))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "images": len(captions),
        "tokens": statistics.mean(len(caption.ids) for caption in captions),
        "seconds": seconds,
        "cpu_s": cpu,
        "peak_mib": peak_bytes() / 2**20,
        "machine_code": capabilities(events),
        **describe(events),
    }


def count_calls(bundle: Bundle, backend: Backend, slots: int, beams: int) -> dict[str, dict[str, Any]]:
    """Return for each of a backend's calls, with B slots of K beams, its processor times (medians) and its events."""
    row, ids, cache = (slots, beams), np.ones((slots, beams), np.int64), backend.allocate(slots)
    pixels = np.zeros((backend.batch_sizes.encode_batch, bundle.image.height, bundle.image.width, 3), np.uint8)
    state: dict[str, Any] = {"positions": 0}

    def encode() -> None:
        state["encoded"] = backend.encode(pixels)

    def admit() -> None:
        backend.admit(cache, 0, state["encoded"], 0)

    def step() -> None:
        state["positions"] += beams
        scores, marks, penalties = np.zeros(row, np.float32), np.full((*row, 8), -1), np.ones(2, np.float32)
        ancestry = np.ones((*row, state["positions"]), bool)
        backend.step(cache, StepInputs(ids, ids, scores, marks, penalties, ancestry, 2 * beams))

    def regroup() -> None:
        state["positions"] = FOLDED
        backend.regroup(cache, np.arange(slots), np.zeros((slots, FOLDED), np.int64))

    calls = (encode, admit, *[step] * SETTLE_EVERY, regroup)
    times: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    run, ort_ms = InferenceSession.run_with_iobinding, 0.0

    def timed_run(*given: Any) -> None:
        nonlocal ort_ms
        start = time.thread_time()
        run(*given)
        ort_ms += 1000 * (time.thread_time() - start)

    with mock.patch.object(InferenceSession, "run_with_iobinding", timed_run):
        for call in (WARM_UP + TIMED) * calls:
            ort_ms, start = 0.0, time.thread_time()
            call()
            times[call.__name__].append((1000 * (time.thread_time() - start), ort_ms))
    counted = {}
    for call in calls:
        with recorded() as events:
            call()
        name = call.__name__
        cpu_ms, ort_ms = np.median(times[name][-TIMED:], axis=0).round(3).tolist()
        counted[name] = {"cpu_ms": cpu_ms, "ort_ms": ort_ms, **describe(events)}
    return counted


@click.command(cls=OneLine)
@click.option("--bundle", "path", type=click.Path(path_type=Path), help="Bundle; by default the demo.")
@click.option("--rows", default=64, show_default=True, help="Beams in flight.")
@click.option("--beams", default=4, show_default=True, help="Beams per image.")
@click.option("--images", default=32, show_default=True, help="Images of the run.")
def main(path: Path | None, rows: int, beams: int, images: int) -> None:
    """Count kernels, products, copies, allocations and memory. Stand-ins; no GPU has run this."""
    bundle = Bundle.load(path)
    with recorded() as events:
        backend = open_backend(bundle, Runtime("cuda"))
    report = {"label": "stand-ins; no GPU has run this", "load": describe(events)}
    report["run"] = count_run(bundle, backend, images, rows, beams)
    print(json.dumps(report | count_calls(bundle, backend, max(1, rows // beams), beams), indent=1))


if __name__ == "__main__":
    main()

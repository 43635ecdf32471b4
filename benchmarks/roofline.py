"""Roofline: the arithmetic that captions need, relative to how fast this machine multiplies matrices.

    python -m benchmarks.roofline --workload base
    python -m benchmarks.roofline --device a100      (theoretical, see work.py)

Only useful work counts: rows with a running beam of an image that Hugging Face's rule has not finished yet, and of the
cached positions those in the history of the row. Empty slots, masked positions and padding do not count.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import click
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.work import ModelWork, count_work
from engine.backends.providers import import_onnxruntime
from engine.captioner import Captioner
from engine.host import available_cores

SHAPES = ((96, 768, 768), (144, 768, 3072), (144, 3072, 768), (394, 768, 3072), (1024, 1024, 1024), (2048, 2048, 2048))
"""Matrix products (M, K, N) to find the peak: those of a decoder, of an encoder, and square ones."""


def measure_matmul(threads: int | None = None, seconds: float = 1.0) -> dict[str, float]:
    """Return the best FLOP/s of float32 matrix products over SHAPES, for ONNX Runtime and for torch."""
    threads = threads or available_cores()
    ort = import_onnxruntime("cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = {"onnxruntime": 0.0, "torch": 0.0}
    for rows, inner, columns in SHAPES:
        rng = np.random.default_rng(0)
        left = rng.standard_normal((rows, inner), dtype=np.float32)
        right = rng.standard_normal((inner, columns), dtype=np.float32)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inner])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])],
            [numpy_helper.from_array(right, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        value = {"x": ort.OrtValue.ortvalue_from_numpy(left)}
        pair = torch.from_numpy(left), torch.from_numpy(right)
        flops = 2.0 * rows * inner * columns
        share = seconds / len(SHAPES)
        ours = _fastest(lambda s=session, v=value: s.run_with_ort_values(["y"], v), share)
        best["onnxruntime"] = max(best["onnxruntime"], flops / ours)
        best["torch"] = max(best["torch"], flops / _fastest(lambda p=pair: p[0] @ p[1], share))
    torch.set_num_threads(before)
    return best


def _fastest(call: Any, seconds: float) -> float:
    """Return the shortest time of the calls that fit into `seconds`, at least three calls."""
    call()
    end, best, runs = time.perf_counter() + seconds, float("inf"), 0
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


@click.command()
@click.option(
    "--workload", "name", type=click.Choice(["base", "large", "demo"]), default="base", show_default=True, help="Model."
)
@click.option("--images", type=click.IntRange(1), default=32, show_default=True, help="Number of images.")
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True, help="Number of beams.")
@click.option(
    "--device", type=click.Choice(["a100", "h100"]), help="Print the theoretical minimum times of this GPU instead."
)
def main(name: str, images: int, beams: int, device: str | None) -> None:
    """Print the share of this machine's matrix-multiply speed that captioning reaches, as one JSON line."""
    if device is not None:
        from benchmarks.work import paper

        click.echo(json.dumps(paper(device), indent=1))
        return
    from benchmarks.workload import prepare, read_pixels

    workload = prepare(name, images)
    captioner = Captioner.load(workload.bundle, backend="cpu")
    pixels = read_pixels(workload, captioner.bundle)
    options = workload.options(beams)
    work = count_work(captioner, pixels, options)
    scheduler = captioner.scheduler(captioner.search(options))
    start = time.perf_counter()
    list(scheduler.decode(pixels))
    seconds = time.perf_counter() - start
    peak, model = measure_matmul(), ModelWork.of(workload.checkpoint)
    achieved = work.flops(model) / seconds
    report = {
        "work": asdict(work),
        "gflop_per_image": work.flops(model) / work.images / 1e9,
        "seconds_per_image": seconds / images,
        "gflops_achieved": achieved / 1e9,
        "gflops_matmul": {library: value / 1e9 for library, value in peak.items()},
        "share_of_roofline": achieved / max(peak.values()),
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()

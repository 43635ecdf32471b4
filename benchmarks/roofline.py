"""How much arithmetic the captions needed, and how fast this machine multiplies matrices: achieved over possible.

    python -m benchmarks.roofline --workload base
    python -m benchmarks.roofline --device a100      (on paper, see gpu_floor.py)

Only useful work counts: rows that carry a running beam of an image Hugging Face's rule has not closed yet, and of the
cached positions those a row descends from. Empty slots, masked positions and padding count for nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engine.backends.base import Backend, StepInputs
from engine.backends.ort import available_cores, import_onnxruntime
from engine.captioner import Captioner
from engine.options import DecodeOptions


@dataclass(frozen=True)
class ModelWork:
    """Floating-point operations (a multiplication and an addition are two) and float32 bytes of one model.

    Counted from the matrices of transformers' BlipForConditionalGeneration; normalisations, activations and softmax are
    left out (under 1 % of the work).
    """

    encoder_flops: float
    row_flops: float
    position_flops: float
    encoder_bytes: float
    decoder_bytes: float
    cross_bytes: float
    position_bytes: float

    @classmethod
    def of(cls, checkpoint: Path) -> ModelWork:
        """Count for a checkpoint."""
        return cls.of_config(json.loads((checkpoint / "config.json").read_text()))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ModelWork:
        """Count for the content of a config.json: per image, per row fed, and per cached position a row sees."""
        vision, text = config["vision_config"], config["text_config"]
        positions = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        width, inner = vision["hidden_size"], vision["intermediate_size"]
        layer = 4 * width**2 + 2 * width * inner
        patch = 3 * vision["patch_size"] ** 2 * width
        dim, layers = text["hidden_size"], text["num_hidden_layers"]
        cross = 2 * layers * width * dim
        block = 6 * dim**2 + 2 * dim * text["intermediate_size"]
        head = dim**2 + dim * text["vocab_size"]
        attention = vision["num_hidden_layers"] * 2 * positions**2 * width
        encoder_weights = patch + vision["num_hidden_layers"] * layer + cross
        return cls(
            encoder_flops=2.0 * (positions * encoder_weights + attention),
            row_flops=2.0 * (layers * (block + 2 * positions * dim) + head),
            position_flops=2.0 * layers * 2 * dim,
            encoder_bytes=4.0 * encoder_weights,
            decoder_bytes=4.0 * (layers * block + head),
            cross_bytes=4.0 * 2 * layers * positions * dim,
            position_bytes=4.0 * 2 * layers * dim,
        )


@dataclass
class Work:
    """What some captions needed: images, search steps, rows fed, and cached positions seen by these rows."""

    images: int = 0
    image_steps: int = 0
    rows: int = 0
    positions: int = 0

    def flops(self, model: ModelWork) -> float:
        """Return the floating-point operations of this work."""
        return self.images * model.encoder_flops + self.rows * model.row_flops + self.positions * model.position_flops

    def least_bytes(self, model: ModelWork, images_at_once: int) -> float:
        """Return the float32 bytes read when `images_at_once` images share each pass over the weights.

        Each row reads the positions it descends from; beams that share some could read them once.
        """
        return (
            (self.images * model.encoder_bytes + self.image_steps * model.decoder_bytes) / images_at_once
            + self.image_steps * model.cross_bytes
            + self.positions * model.position_bytes
        )


RULED_OUT = -1e8
"""The running score of a closed slot, a beam that is ruled out and a prompt's inner tokens is below this."""


@dataclass
class CountingBackend:
    """A Backend around another that adds up the useful work."""

    backend: Backend
    work: Work = field(default_factory=Work)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode(self, pixel_values: NDArray[np.uint8]) -> Any:
        self.work.images += len(pixel_values)
        return self.backend.encode(pixel_values)

    def step(self, cache: Any, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        useful = inputs.scores > RULED_OUT
        self.work.image_steps += int(useful.any(1).sum())
        self.work.rows += int(useful.sum())
        self.work.positions += int(inputs.ancestry[useful].sum())
        return self.backend.step(cache, inputs)


SHAPES = ((96, 768, 768), (144, 768, 3072), (144, 3072, 768), (394, 768, 3072), (1024, 1024, 1024), (2048, 2048, 2048))
"""Products (M, K, N) tried for the peak: a decoder's, an encoder's, and square ones."""


def measure_matmul(threads: int | None = None, seconds: float = 1.0) -> dict[str, float]:
    """Return the best FLOP/s of float32 matrix multiply over SHAPES, for ONNX Runtime and for torch."""
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
    """Return the shortest of the runs that fit into `seconds`, three at least."""
    call()
    end, best, runs = time.perf_counter() + seconds, float("inf"), 0
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def count_work(captioner: Captioner, pixels: NDArray[np.uint8], options: DecodeOptions) -> Work:
    """Decode images u8[N,height,width,3] once and return the useful work."""
    counting = CountingBackend(captioner.backend)
    scheduler = Captioner(captioner.bundle, counting).scheduler(captioner.search(options))
    list(scheduler.decode(pixels))
    return counting.work


@click.command()
@click.option("--workload", "name", type=click.Choice(["base", "large", "demo"]), default="base", show_default=True)
@click.option("--images", type=click.IntRange(1), default=32, show_default=True)
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
@click.option("--device", type=click.Choice(["a100", "h100"]), help="Print the paper floor of this GPU instead.")
def main(name: str, images: int, beams: int, device: str | None) -> None:
    """Print the share of this machine's matrix-multiply speed that captioning reaches, as one JSON line."""
    if device is not None:
        from benchmarks.gpu_floor import paper

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

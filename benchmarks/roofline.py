"""Count the arithmetic that captions need, as a share of the processor's peak or as minimum times of GPUs; no torch.

Only useful work counts: rows with a running beam of an image that Hugging Face's rule has not finished yet, and of the
cached positions those in the history of the row. Empty slots, masked positions and padding do not count.
"""

from __future__ import annotations

import json
import tempfile
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

from benchmarks.workload import CHALLENGE_SIZE, describe_machine
from engine.backends.providers import import_onnxruntime
from engine.bundle.manifest import MANIFEST, Bundle
from engine.captioner import Captioner
from engine.decoding.backend import Backend, BatchSizes, StepInputs
from engine.decoding.beam import Search
from engine.decoding.scheduler import Scheduler
from engine.host import available_cores
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions


@dataclass(frozen=True)
class ModelWork:
    """Floating-point operations (a multiplication and an addition are two) and float32 bytes of one model.

    Counted from the matrices of transformers' BlipForConditionalGeneration. Normalisations, activations and softmax are
    not included (under 1 % of the work).
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
        """Return the counts for a checkpoint."""
        return cls.of_config(json.loads((checkpoint / "config.json").read_text()))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ModelWork:
        """Return the counts for the content of a config.json: per image, per row, and per cached position of a row."""
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
    """The work of some captions: images, search steps, rows, and cached positions that these rows attend to."""

    images: int = 0
    image_steps: int = 0
    rows: int = 0
    positions: int = 0

    def flops(self, model: ModelWork) -> float:
        """Return the floating-point operations of this work."""
        return self.images * model.encoder_flops + self.rows * model.row_flops + self.positions * model.position_flops

    def least_bytes(self, model: ModelWork, images_at_once: int) -> float:
        """Return the float32 bytes read if `images_at_once` images share each pass over the weights.

        Each row reads the positions of its history. Beams with common history could read them once; that is ignored.
        """
        return (
            (self.images * model.encoder_bytes + self.image_steps * model.decoder_bytes) / images_at_once
            + self.image_steps * model.cross_bytes
            + self.positions * model.position_bytes
        )


RULED_OUT = -1e8
"""Running scores below this mark closed slots, ruled-out beams and the inner tokens of a prompt."""


@dataclass
class CountingBackend:
    """A Backend that wraps another and counts the useful work."""

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


def count_work(captioner: Captioner, pixels: NDArray[np.uint8], options: DecodeOptions) -> Work:
    """Decode images u8[N,height,width,3] once; return the useful work."""
    counting = CountingBackend(captioner.backend)
    scheduler = Captioner(captioner.bundle, counting).scheduler(captioner.search(options))
    list(scheduler.decode(pixels))
    return counting.work


@dataclass(frozen=True)
class Gpu:
    """Dense peak FLOP/s of the tensor cores by precision, and bytes/s of memory, from NVIDIA's data sheets."""

    flops: dict[str, float]
    bytes_per_s: float


DEVICES = {
    "a100": Gpu({"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12}, 1.555e12),
    "h100": Gpu({"fp32": 66.9e12, "tf32": 494.7e12, "fp16": 989.4e12}, 3.35e12),
}
"""A100 40 GB SXM and H100 80 GB SXM; TensorFloat-32 and float16 without sparsity."""
IMAGES_AT_ONCE = 256
"""Number of images that share a pass over the weights."""
SHARE_OF_PEAK = 0.6
"""Share of the peak that dense products of these sizes are assumed to reach."""
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30524,
}
VISION = {"image_size": 224, "patch_size": 16}
CONFIGS = {
    "base": {
        "text_config": TEXT,
        "vision_config": VISION | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    },
    "large": {
        "text_config": TEXT,
        "vision_config": VISION | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
    },
}
"""Salesforce/blip-image-captioning-base and -large at 224 px."""
TOKENS = 30
"""New tokens per caption, including [SEP]."""
BEAMS = (1, 4, 10)
PICTURE_SIZE = (600, 480)
"""Pixels of the image whose decoding is timed; the cost is proportional to the size."""


def model_work(bundle: Bundle) -> ModelWork:
    """Return the counts for a bundle, from the checkpoint's configuration in its manifest."""
    manifest = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))
    return ModelWork.of_config(manifest["restore"]["config"])


def forced_work(images: int, beams: int, tokens: int = TOKENS) -> Work:
    """Return the work of captions of `tokens` tokens each: every step has `beams` rows, each of which sees its past."""
    steps = images * tokens
    return Work(images, steps, steps * beams, images * beams * tokens * (tokens + 1) // 2)


def floor_s(
    work: Work, model: ModelWork, gpu: Gpu, images: int, precision: str, *, share_of_peak: float = 1.0
) -> float:
    """Return the theoretical minimum of seconds for `images` captions with the work per image of `work`.

    It is the larger of the arithmetic at `share_of_peak` and the bytes at full bandwidth (halved for fp16).
    """
    scale = images / work.images
    arithmetic = scale * work.flops(model) / (gpu.flops[precision] * share_of_peak)
    read = scale * work.least_bytes(model, IMAGES_AT_ONCE) / gpu.bytes_per_s
    return max(arithmetic, read / (2 if precision == "fp16" else 1))


def floors(device: str, images: int = CHALLENGE_SIZE) -> list[dict[str, Any]]:
    """Return the seconds of arithmetic and of memory traffic for `images` captions, for base and large at BEAMS."""
    gpu, rows = DEVICES[device], []
    for name, config in CONFIGS.items():
        model = ModelWork.of_config(config)
        for beams in BEAMS:
            work = forced_work(images, beams)
            read = work.least_bytes(model, IMAGES_AT_ONCE) / gpu.bytes_per_s
            row: dict[str, Any] = {"model": name, "beams": beams, "pflop": work.flops(model) / 1e15}
            for precision, peak in gpu.flops.items():
                row[precision] = {
                    "arithmetic_s": work.flops(model) / peak / SHARE_OF_PEAK,
                    "memory_s": read / (2 if precision == "fp16" else 1),
                }
            rows.append(row)
    return rows


class NullBackend:
    """A backend that answers every step at once with random tokens, so that only the host's work is timed."""

    name = "null"

    def __init__(self, rows: int, vocab_size: int, tokens: int, eos: int) -> None:
        self.batch_sizes = BatchSizes(rows=rows, encode_batch=16)
        self._vocab_size, self._tokens, self._eos = vocab_size, tokens, eos
        self._rng = np.random.default_rng(0)

    def encode(self, pixel_values: NDArray[np.uint8]) -> None: ...

    def allocate(self, num_slots: int) -> None: ...

    def admit(self, cache: None, slot: int, encoded: None, image: int) -> None: ...

    def regroup(self, cache: None, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None: ...

    def step(self, cache: None, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:  # noqa: ARG002
        slots, rows = inputs.input_ids.shape
        words = self._rng.integers(1000, self._vocab_size, (slots, inputs.num_candidates))
        words[inputs.positions[:, 0] >= self._tokens - 1, :rows] = self._eos  # every caption ends after `tokens` tokens
        from_row = np.arange(inputs.num_candidates) % rows
        best = inputs.scores.max(1, keepdims=True) - np.arange(1, inputs.num_candidates + 1, dtype=np.float32)
        return best.astype(np.float32), from_row * self._vocab_size + words


def host_s_per_image(beams: int, images: int = 512, rows: int = 1024) -> float:
    """Measure the decoding core alone on one thread of this machine, with `rows` beams in flight."""
    search = Search(
        prompt=(30522,),
        num_beams=beams,
        max_length=64,
        min_length=0,
        length_penalty=1.0,
        early_stopping=False,
        no_repeat_ngram_size=3,
        num_return_sequences=1,
        eos=102,
        vocab_size=30524,
    )
    backend = NullBackend(rows, search.vocab_size, TOKENS, search.eos)
    scheduler = Scheduler(backend, search, num_slots=max(1, rows // beams), encode_batch=16)
    pixels = np.zeros((8, 8, 3), np.uint8)
    start = time.perf_counter()
    count = sum(1 for _ in scheduler.run((i, pixels) for i in range(images)))
    assert count == images
    return (time.perf_counter() - start) / images


def decoding_s_per_image(folder: Path, count: int = 64) -> float:
    """Measure reading a JPEG of PICTURE_SIZE and resizing it to 224 px on one thread of this machine."""
    from PIL import Image

    from engine.inputs.images import find_images

    base = Image.open(find_images(Path("examples/images")).images[0].path).convert("RGB").resize(PICTURE_SIZE)
    path = folder / "picture.jpg"
    base.save(path, quality=90)
    read_image(path, 224, 224, "bicubic")
    start = time.perf_counter()
    for _ in range(count):
        read_image(path, 224, 224, "bicubic")
    return (time.perf_counter() - start) / count


def paper(device: str) -> dict[str, Any]:
    """Return the minimum times of `device`, and the seconds per image that this machine takes for the host's work."""
    with tempfile.TemporaryDirectory() as folder:
        decoding = decoding_s_per_image(Path(folder))
    return {
        "device": device,
        "images": CHALLENGE_SIZE,
        "new_tokens": TOKENS,
        "share_of_peak_assumed": SHARE_OF_PEAK,
        "floors": floors(device),
        "machine": describe_machine(),
        "host_s_per_image": {beams: host_s_per_image(beams) for beams in BEAMS},
        "decoding_s_per_image": decoding,
        "picture": PICTURE_SIZE,
    }


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

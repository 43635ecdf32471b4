"""The parts of benchmarks/gpu/check.py without a model: the machine, its memory, its host, its kernels.

    python -m benchmarks.gpu.parts PART

Each part runs in a separate process and prints one JSON object, so that a failure does not affect the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.host import measure, write_pictures
from engine.backends.device import CapturingDevice, CudaDevice
from engine.backends.providers import find_gpu
from engine.backends.shapes import ENCODE_BATCH
from engine.errors import OutOfMemoryError
from engine.inputs.pixels import read_image

EXAMPLES = Path("examples/images")
LIBRARIES = ("cudnn", "cublas", "nvinfer", "cudart")
SIZES = (1, 303_000, 77_000_000)
"""Bytes: one byte, the keys of an image in one layer, those of 256 images."""
TOO_MUCH = 1 << 40
REPEATS = 50


def probe() -> dict[str, Any]:
    """Return the GPU, its driver, the NVIDIA libraries that ldconfig lists, and the number of cores."""
    tool = shutil.which("ldconfig") or "/sbin/ldconfig"
    known = subprocess.run([tool, "-p"], capture_output=True, text=True, check=False).stdout
    libraries = [line.strip() for line in known.splitlines() if any(name in line for name in LIBRARIES)]
    return {"gpu": asdict(find_gpu()), "libraries": libraries, "cores": os.cpu_count()}


def memory(device: CapturingDevice | None = None) -> dict[str, Any]:
    """Copy bytes to the device, within it and back; capture copies and replay them; allocate too much."""
    device = device or CudaDevice()
    rng, report = np.random.default_rng(0), {}
    for size in SIZES:
        sent, back = rng.integers(0, 255, size, np.uint8), np.empty(size, np.uint8)
        first, second = device.allocate(size), device.allocate(size)
        device.download(back, first)
        is_zero = not back.any()
        device.upload(first, sent)
        device.copy(second, first, size)
        device.download(back, second)
        report[f"{size}_bytes"] = {"zero": is_zero, "equal": bool((back == sent).all())}
        device.free(first)
        device.free(second)
    report["blocks_equal"] = _blocks_are_equal(device)
    report["replays_equal"] = _replays_are_equal(device)
    try:
        device.free(device.allocate(TOO_MUCH))
        report["too_much"] = "was given"
    except (OutOfMemoryError, MemoryError) as error:
        report["too_much"] = f"refused: {error}"
    return report


def _blocks_are_equal(device: CapturingDevice) -> bool:
    """Copy columns of a matrix u8[100,64] into another matrix, as it is done with the new keys of a step."""
    matrix = np.random.default_rng(1).integers(1, 255, (100, 64), np.uint8)
    source, target, back = device.allocate(6400), device.allocate(9600), np.empty((100, 96), np.uint8)
    device.upload(source, matrix)
    device.copy_blocks((target + 8, 96), (source + 16, 64), 24, 100)
    device.download(back, target)
    expected = np.zeros_like(back)
    expected[:, 8:32] = matrix[:, 16:40]
    return bool((back == expected).all())


def _replays_are_equal(device: CapturingDevice) -> bool:
    """Capture two copies and replay them three times with different bytes."""
    size = 4096
    first, second, third = (device.allocate(size) for _ in range(3))
    device.wait()

    def work() -> None:
        device.copy(second, first, size)
        device.copy(third, second, size)

    captured, is_equal = device.capture(work), True
    for seed in range(3):
        sent, back = np.random.default_rng(seed).integers(0, 255, size, np.uint8), np.empty(size, np.uint8)
        device.upload(first, sent)
        device.replay(captured)
        device.download(back, third)
        is_equal &= bool((back == sent).all())
    return is_equal


def host(images: int = 4096, files: int = 256) -> dict[str, Any]:
    """Time the decoding core with a device that answers at once, reading JPEGs in threads, and digests."""
    here = {"here": Path(__file__).parents[2]}
    order = {"images": images, "sets": 2, "encode_batch": ENCODE_BATCH, "pictures": "", "rows": 1024}
    report: dict[str, Any] = {"core": [measure(order | {"beams": beams}, "instant", here, 1) for beams in (1, 4, 10)]}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), files)
        paths = sorted(Path(folder).iterdir())
        for threads in (1, 8, 16):
            start = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda path: read_image(path, 384, 384, "bicubic"), paths))
            report[f"jpegs_per_s_{threads}_threads"] = round(files / (time.perf_counter() - start), 1)
    pixels = np.zeros(224 * 224 * 3, np.uint8)
    report["digest_ms"] = 1000 * _seconds(lambda: hashlib.sha256(pixels.data).digest())
    return report


def kernels(device: str = "cuda", repeats: int = REPEATS) -> dict[str, float]:
    """Time products and selections of a step of BLIP-base in ms, also at sizes that may suit tensor cores better."""
    import torch

    kind = torch.float16 if device == "cuda" else torch.float32
    times = {}

    def clock(name: str, call: Callable[[], Any]) -> None:
        for _ in range(3):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        times[name] = 1000 * (time.perf_counter() - start) / repeats

    rows = 1024 if device == "cuda" else 16
    queries = torch.zeros(rows * 3, 4, 64, device=device, dtype=kind)
    for positions in (197, 200, 208):
        keys = torch.zeros(rows * 3, 64, positions, device=device, dtype=kind)
        clock(f"attention over {positions}", lambda keys=keys: torch.bmm(queries, keys))  # type: ignore[misc]
    states = torch.zeros(rows, 768, device=device, dtype=kind)
    for width in (768, 3072, 30_524, 30_528):
        layer = torch.nn.Linear(768, width, device=device, dtype=kind)
        clock(f"product with {width}", lambda layer=layer: layer(states))  # type: ignore[misc]
    logits = torch.randn(rows, 30_524, device=device)
    clock("topk of 30,524", lambda: torch.topk(logits, 8))
    clock("log_softmax", lambda: torch.log_softmax(logits, 1))
    block = torch.nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True, device=device, dtype=kind).eval()
    with torch.inference_mode():
        for batch in (16, 32, 64) if device == "cuda" else (1,):
            image = torch.zeros(batch, 197, 768, device=device, dtype=kind)
            clock(f"vision block, batch {batch}", lambda image=image: block(image))  # type: ignore[misc]
    return times


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    return (time.perf_counter() - start) / REPEATS


FIRST: dict[str, Callable[[], dict[str, Any]]] = {"probe": probe, "memory": memory, "host": host, "kernels": kernels}
"""The parts in the order in which they run: each checks what the next one needs."""


def main() -> None:
    """Print the report of a part."""
    print(json.dumps(FIRST[sys.argv[1]]()))


if __name__ == "__main__":
    main()

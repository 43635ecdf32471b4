"""The runs of benchmarks/gpu/check.py with a working backend: a profile, two concurrent processes, the challenge.

    python -m benchmarks.gpu.runs RUN BUNDLE BACKEND [IMAGES]

An empty BUNDLE is the demo. Each run is a separate process and prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.host_worker import pictures
from benchmarks.workload import CHALLENGE_SIZE, write_corpus
from engine.backends.plans import PORTABLE, build_plan, import_builder, make_logger, target_for
from engine.backends.shapes import Bounds
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.runtime import CPU_BACKENDS

EXAMPLES = Path("examples/images")


def profile(bundle: Path | None = None, backend: str = "cuda", images: int = 64) -> dict[str, Any]:
    """Profile a few steps: nodes by provider and copies to and from the device (ONNX Runtime), kernels (kernel_times).

    `host_ms` has the operators that take the host longest. On a GPU this is the time to launch them, not to run them.
    """
    import onnxruntime

    plain = onnxruntime.SessionOptions
    with tempfile.TemporaryDirectory() as folder:

        class Profiled(plain):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling = True
                self.profile_file_prefix = str(Path(folder) / "profile")

        onnxruntime.SessionOptions = Profiled
        try:
            captioner = Captioner.load(bundle, backend=backend)
            images_in_memory = list(pictures(images, captioner.bundle.image.height, captioner.bundle.image.width))
            list(captioner.caption(images_in_memory, num_beams=4))
            del captioner
            gc.collect()  # sessions write their profile when they are destroyed
        finally:
            onnxruntime.SessionOptions = plain
        events = [event for path in Path(folder).glob("profile*") for event in json.loads(path.read_text())]
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    spent: Counter[str] = Counter()
    for event in nodes:
        spent[f"{event['args']['op_name']} ({event['args'].get('provider', '?')})"] += event["dur"]
    return {
        "nodes_by_provider": dict(Counter(event["args"].get("provider", "?") for event in nodes)),
        "memcpy_nodes": sum(event["args"]["op_name"].startswith("Memcpy") for event in nodes),
        "host_ms": {name: duration / 1000 for name, duration in spent.most_common(10)},
        "kernels": _kernels(bundle, backend, images_in_memory),
    }


def _kernels(bundle: Path | None, backend: str, images: list[Any]) -> dict[str, Any]:
    """Return kernel_times of captioning images, or why they are not measured."""
    try:
        import torch
    except ImportError:
        return {"not_measured": "torch is not installed"}
    if backend in CPU_BACKENDS or not torch.cuda.is_available():
        return {"not_measured": "the backend runs on the CPU, or torch sees no GPU"}
    captioner = Captioner.load(bundle, backend=backend)
    list(captioner.caption(images, num_beams=4))  # warm up
    return kernel_times(lambda: list(captioner.caption(images, num_beams=4)))


def kernel_times(work: Callable[[], object]) -> dict[str, Any]:
    """Run `work` and return where the GPU's time goes: (name, ms, launches) of the 25 slowest kernels, and sums.

    torch's profiler sees all kernels and copies of the process, ONNX Runtime's too. Times in ONNX Runtime's own profile
    end when a kernel is launched. Never run on a GPU.
    """
    import torch

    start = time.perf_counter()
    known = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[known.CUDA if torch.cuda.is_available() else known.CPU]) as profiled:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    wall_s = time.perf_counter() - start
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiled.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name[:90]] += event.device_time_total
            calls[event.name[:90]] += 1
    return {
        "wall_s": wall_s,
        "gpu_s": sum(spent.values()) / 1e6,
        "launches": sum(calls.values()),
        "slowest": [(name, round(us / 1000, 1), calls[name]) for name, us in spent.most_common(25)],
    }


def side_by_side(bundle: Path | None = None, backend: str = "cuda", images: int = 1024) -> dict[str, Any]:
    """Compare two concurrent processes, each with half of the images, with one process that captions all of them."""
    report = {}
    for processes in (1, 2):
        command = [sys.executable, "-m", "benchmarks.gpu.runs", "alone", str(bundle or ""), backend]
        started = [
            subprocess.Popen([*command, str(images // processes)], stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        seconds = [json.loads(process.communicate()[0].splitlines()[-1])["seconds"] for process in started]
        report[f"{processes}_processes_images_per_s"] = images / max(seconds)
    return report


def alone(bundle: Path | None = None, backend: str = "cuda", images: int = 1024) -> dict[str, Any]:
    """Time the captioning of images from memory, after loading the model and a warm-up."""
    captioner = Captioner.load(bundle, backend=backend)
    height, width = captioner.bundle.image.height, captioner.bundle.image.width
    list(captioner.caption(list(pictures(min(images, 64), height, width)), num_beams=4))
    start = time.perf_counter()
    count = sum(1 for _ in captioner.caption(pictures(images, height, width), num_beams=4))
    return {"images": count, "seconds": time.perf_counter() - start}


def minute(bundle: Path | None = None, backend: str = "cuda", images: int = CHALLENGE_SIZE) -> dict[str, Any]:
    """Caption a folder of JPEGs, then again with a kill -9 halfway and a restart; compare both run.csv bytewise."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus", images, EXAMPLES)
        command = [sys.executable, "-m", "engine", "caption", "--input", str(corpus), "--backend", backend]
        command += ["--beams", "4", "--no-repeat-ngram", "3", *(["--bundle", str(bundle)] if bundle else [])]
        whole, interrupted = Path(folder) / "whole.csv", Path(folder) / "interrupted.csv"
        start = time.perf_counter()
        subprocess.run([*command, "--out", str(whole), "--timings-out", f"{folder}/timings.csv"], check=True)
        seconds = time.perf_counter() - start
        journal = interrupted.with_name("interrupted.csv.journal")
        killed = subprocess.Popen([*command, "--out", str(interrupted)])
        while killed.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > images // 2):
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        subprocess.run([*command, "--out", str(interrupted)], check=True)
        same = whole.read_bytes() == interrupted.read_bytes()
    return {"images": images, "seconds": seconds, "images_per_s": images / seconds, "same_after_kill_9": same}


def portable(bundle: Path | None = None, _: str = "") -> dict[str, Any]:
    """Build a plan with TensorRT-RTX for this machine's GPU and check its validity with the runtime."""
    loaded = Bundle.load(bundle)
    target = target_for(PORTABLE)
    trt = import_builder(PORTABLE)
    start = time.perf_counter()
    plan = build_plan(loaded, "decoder", Bounds.of(loaded, beams=4), target)
    built_s = time.perf_counter() - start
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    validity, diagnostics = runtime.get_engine_validity(plan)
    engine = runtime.deserialize_cuda_engine(plan)
    return {
        "target": asdict(target),
        "build_s": built_s,
        "validity": str(validity),
        "diagnostics": int(diagnostics),
        "loads": engine is not None or logger.last(),
    }


LAST: dict[str, Callable[..., dict[str, Any]]] = {
    "profile": profile,
    "side_by_side": side_by_side,
    "minute": minute,
    "portable": portable,
}


def main() -> None:
    """Print the report of a run."""
    name, bundle, backend, *images = sys.argv[1:]
    run = (LAST | {"alone": alone})[name]
    print(json.dumps(run(Path(bundle) if bundle else None, backend, *map(int, images))))


if __name__ == "__main__":
    main()

"""The programs that are compared, each in a process of its own so that threads and memory do not mix.

Every program starts from decoded, resized pictures in memory and ends with the token ids of the best caption.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.workload import BUILD, Workload, read_pictures, read_pixels
from engine.host import available_cores
from engine.machine.bench import peak_memory_gib
from engine.options import DecodeOptions

Ids = list[tuple[int, ...]]
Caption = Callable[[int, int], Ids]
"""Captions the first N pictures (first argument) in batches of the second, which the engine ignores."""


@dataclass(frozen=True)
class Comparison:
    """What all programs of one measurement share."""

    workload: Workload
    options: DecodeOptions
    rows: int | None
    threads: int | None


@dataclass(frozen=True)
class Timing:
    """One call of a program: seconds, the ids it gave, and the most memory its process held in that time."""

    seconds: float
    ids: Ids
    peak_gib: float | None


def engine(setting: Comparison) -> Caption:
    """Our engine on ONNX Runtime."""
    return _engine_on("cpu", setting)


def openvino(setting: Comparison) -> Caption:
    """Our engine on OpenVINO."""
    return _engine_on("openvino", setting)


def _engine_on(backend: str, setting: Comparison) -> Caption:
    from engine.captioner import Captioner

    captioner = Captioner.load(setting.workload.bundle, backend=backend, threads=setting.threads)
    pixels = read_pixels(setting.workload, captioner.bundle)
    scheduler = captioner.scheduler(captioner.search(setting.options), setting.rows)

    def caption(count: int, _: int) -> Ids:
        results = dict(scheduler.decode(pixels[:count]))
        return [results[i][0].ids for i in range(count)]

    return caption


def generate(setting: Comparison) -> Caption:
    """Hugging Face generate, asked for nothing but ids."""
    import torch

    from export.reference.huggingface import Reference

    torch.set_num_threads(setting.threads or available_cores())
    reference = Reference.load(setting.workload.checkpoint)
    pixel_values = reference.pixels(read_pictures(setting.workload))

    def caption(count: int, batch: int) -> Ids:
        captions = []
        for i in range(0, count, batch):
            captions += reference.generate(pixel_values[i : min(i + batch, count)], setting.options, with_scores=False)
        return [best.ids for best, *_ in captions]

    return caption


def conventional(setting: Comparison) -> Caption:
    """The usual ONNX loop; see benchmarks.conventional."""
    from benchmarks.conventional import Conventional, export_conventional
    from engine.captioner import Captioner
    from export.reference.huggingface import Reference

    workload = setting.workload
    reference = Reference.load(workload.checkpoint)
    directory = export_conventional(reference, BUILD / workload.name / "conventional")
    search = Captioner.load(workload.bundle, backend="cpu").search(setting.options)
    pixel_values = reference.pixels(read_pictures(workload)).numpy()
    del reference
    program = Conventional(directory, search, setting.threads)

    def caption(count: int, batch: int) -> Ids:
        found = []
        for i in range(0, count, batch):
            found += program.caption(pixel_values[i : min(i + batch, count)])
        return [hypothesis.ids for hypothesis in found]

    return caption


PROGRAMS: dict[str, Callable[[Comparison], Caption]] = {
    "engine": engine,
    "generate": generate,
    "conventional": conventional,
    "openvino": openvino,
}
BATCHED = ("generate", "conventional")
"""Programs whose speed depends on a batch size."""


class Worker:
    """A program in a process of its own; idle until asked."""

    def __init__(self, name: str, setting: Comparison) -> None:
        """Start the process and load the program. Raises RuntimeError with the child's reason when it cannot."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, setting, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.load_s: float = self._receive()

    def caption(self, count: int, batch: int = 1) -> Timing:
        """Caption the first `count` pictures, in batches of `batch` where the program has batches."""
        self._connection.send((count, batch))
        timing: Timing = self._receive()
        return timing

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer


def forget_peak_memory() -> None:
    """Let peak_memory_gib count from now on, where the system can do that (Linux; see proc_pid_clear_refs(5))."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _serve(name: str, setting: Comparison, connection: Connection) -> None:
    try:
        start = time.perf_counter()
        caption = PROGRAMS[name](setting)
        connection.send(time.perf_counter() - start)
        while True:
            count, batch = connection.recv()
            forget_peak_memory()
            start = time.perf_counter()
            ids = caption(count, batch)
            connection.send(Timing(time.perf_counter() - start, ids, peak_memory_gib()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # whoever asked is gone
    except Exception:
        connection.send(traceback.format_exc())

"""Time the captioner around a device that is no model; a process of its own, see benchmarks/host.py.

Knows of the engine only what its versions since 084ae4d have in common, so that one can be timed beside another:
PYTHONPATH chooses. Prints one JSON line.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOL = 8192
"""Continuations that are drawn beforehand."""
WORDS = (2000, 2600)
"""Token ids of words: few enough that n-grams repeat now and then."""
SHORTEST, ENDS = 14, 0.09
"""Tokens after which captions may end, and how often a continuation does: some 25 steps an image."""
STAGES = {
    "digest": ("engine.captioner", "_digest"),
    "text": ("engine.captioner:Captioner", "_alternative"),
    "inputs": ("engine.decoding.scheduler:_Slots", "_inputs"),
    "bans": ("engine.decoding.beam:Beams", "marked_ids"),
    "advance": ("engine.decoding.beam:Beams", "advance"),
    "ancestry": ("engine.decoding.ancestry:Ancestry", "choose"),
    "compact": ("engine.decoding.ancestry:Ancestry", "compact"),
    "results": ("engine.decoding.beam:Beams", "results"),
}
"""Functions that are timed where they are; `inputs` includes `bans`, the rest exclude each other."""


class Device:
    """A backend whose words follow from the picture and the step alone, whatever else is decoded beside it.

    encode_s seconds an image, step_s a step and row_s a row of it, and as much for regroup as a share of a step: all
    waited for without the interpreter lock. `asked_s` is their sum, `busy_s` how long was really waited, `own_s` what
    this stand-in itself takes.
    """

    name = "cpu"

    def __init__(self, batch_sizes: Any, vocab_size: int, eos: int, beams: int, times: dict[str, float]) -> None:
        self.batch_sizes = self.appetite = batch_sizes
        self._vocab_size, self._times = vocab_size, times
        self.busy_s = self.asked_s = self.own_s = 0.0
        self.shapes: Counter[tuple[int, ...]] = Counter()
        rng, count = np.random.default_rng(0), 2 * beams if beams > 1 else 1
        self._falls = -np.sort(rng.exponential(1.0, (POOL, count)).astype(np.float32), 1)
        self._rows = rng.integers(0, beams, (POOL, count))
        words = rng.integers(*WORDS, (POOL, count))
        self._words = words + self._rows * vocab_size
        self._ends = np.where(rng.random((POOL, count)) < ENDS, eos, words) + self._rows * vocab_size

    def encode(self, pixel_values: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return a number for each picture, from its first bytes."""
        start = time.perf_counter()
        numbers = pixel_values.reshape(len(pixel_values), -1)[:, :8].astype(np.int64) @ (np.int64(7919) ** np.arange(8))
        self._wait(start, self._times["encode_s"] * len(pixel_values))
        return numbers

    def allocate(self, num_slots: int, *_: int) -> dict[str, Any]:
        """Return a number for every slot."""
        return {"seeds": np.zeros(num_slots, np.int64)}

    def set_recent(self, cache: dict[str, Any], recent: int) -> None:
        """Of a backend that is padded."""

    def admit(self, cache: dict[str, Any], slot: int, encoded: NDArray[np.int64], image: int) -> None:
        """Note whose slot it is."""
        cache["seeds"][slot] = encoded[image]

    def step(self, cache: dict[str, Any], inputs: Any, **_: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Continue every slot by drawn candidates."""
        start = time.perf_counter()
        place = cache["seeds"] + inputs.positions[:, 0] * 40503 + inputs.input_ids.sum(1) * 97
        drawn = place % POOL
        ids = np.where((inputs.positions[:, :1] >= SHORTEST), self._ends[drawn], self._words[drawn])
        scores = inputs.scores[:, :1] + self._falls[drawn]
        marks = inputs.marked_ids if hasattr(inputs, "marked_ids") else inputs.banned_ids  # as it was at 084ae4d
        self.shapes[(*inputs.ancestry.shape, marks.shape[2])] += 1
        self._wait(start, self._times["step_s"] + self._times["row_s"] * inputs.input_ids.size)
        return scores, ids

    def regroup(self, cache: dict[str, Any], slots: NDArray[np.int64], columns: NDArray[np.int64], **_: Any) -> None:
        """Keep slots."""
        start = time.perf_counter()
        cache["seeds"] = cache["seeds"][slots]
        self._wait(start, self._times["regroup_row_s"] * columns.shape[0])

    def _wait(self, start: float, seconds: float) -> None:
        own = time.perf_counter() - start
        self.own_s += own
        if seconds > own:
            time.sleep(seconds - own)
        if seconds:  # a system may sleep longer than it is told: then the device is as much slower
            self.asked_s += seconds
            self.busy_s += time.perf_counter() - start


def timed(spent: dict[str, float]) -> None:
    """Put clocks around the functions of STAGES that this version of the engine has."""
    for stage, (place, name) in STAGES.items():
        module, _, owner = place.partition(":")
        try:
            holder = importlib.import_module(module)
            holder = getattr(holder, owner) if owner else holder
            function = getattr(holder, name)
        except (ImportError, AttributeError):
            continue

        def clocked(*given: Any, _stage: str = stage, _function: Callable[..., Any] = function, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return _function(*given, **named)
            finally:
                spent[_stage] = spent.get(_stage, 0.0) + time.perf_counter() - start

        setattr(holder, name, clocked)


def pictures(count: int, height: int, width: int) -> Iterator[NDArray[np.uint8]]:
    """Yield distinct pictures u8[height,width,3], each good until many others have come: they share memory."""
    base = np.random.default_rng(1).integers(0, 255, (height, width, 3), np.uint8)
    pool = [base.copy() for _ in range(min(count, 512))]
    for number in range(count):
        picture = pool[number % len(pool)]
        picture[0, 0], picture[0, 1, 0] = (number & 255, number >> 8 & 255, number >> 16), number % 251
        yield picture


def main() -> None:
    """Read the order, a JSON object, and print what was measured."""
    order = json.loads(sys.argv[1])
    from engine.captioner import Captioner

    try:
        from engine.bundle.open import open_bundle
        from engine.decoding.backend import BatchSizes
    except ImportError:  # as it was at 084ae4d
        base, bundles = importlib.import_module("engine.backends.base"), importlib.import_module("engine.bundle")
        BatchSizes, open_bundle = base.Appetite, bundles.Bundle.load  # noqa: N806
    bundle = open_bundle(None)
    options = bundle.options(num_beams=order["beams"])
    sizes = {"rows": order["rows"], "encode_batch": order["encode_batch"], "memory_bytes": 1 << 40}
    if "sets" in getattr(BatchSizes, "__dataclass_fields__", {}):
        sizes |= {"sets": order["sets"], "rows": order["rows"] * order["sets"]}
    tokens, image = bundle.tokens, bundle.image
    device = Device(BatchSizes(**sizes), bundle.model.vocab_size, tokens.eos, order["beams"], order["times"])
    captioner = Captioner(bundle, device)  # type: ignore[arg-type]
    spent: dict[str, float] = {}
    if order["stages"]:
        timed(spent)
    if order["pictures"]:
        found: Any = sorted(Path(order["pictures"]).glob("*.jpg"))[: order["images"]]
    else:
        found = pictures(order["images"], image.height, image.width)
    digest, count, steps = hashlib.sha256(), 0, 0
    cpu, serial, start = time.process_time(), time.thread_time(), time.perf_counter()
    for caption in captioner.caption(found, options):
        digest.update(json.dumps(caption.ids).encode())
        count, steps = count + 1, steps + len(caption.ids)
    wall, serial = time.perf_counter() - start, time.thread_time() - serial
    report = {
        "images": count,
        "seconds": wall,
        "cpu_s": time.process_time() - cpu,
        "serial_s": serial,
        "device_s": device.busy_s,
        "asked_s": device.asked_s,
        "own_s": device.own_s,
        "tokens": steps / count,
        "shapes": len(device.shapes),
        "steps": sum(device.shapes.values()),
        "ids": digest.hexdigest()[:16],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "stages_ms": {stage: round(1000 * seconds / count, 4) for stage, seconds in spent.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Time the captioner around a simulated device, in a separate process; see benchmarks/host.py.

It uses only what all versions of the engine since 084ae4d have in common, so that two checkouts can be compared.
PYTHONPATH selects the checkout. It prints one JSON line.
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
"""Number of continuations that are drawn in advance."""
WORDS = (2000, 2600)
"""Range of token ids: small enough that n-grams repeat now and then."""
SHORTEST, ENDS = 14, 0.09
"""Tokens after which captions may end, and the probability that a continuation ends one: about 25 steps per image."""
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
"""Stage -> (module and class, function) that is timed. `inputs` includes `bans`; the others do not overlap."""


class Device:
    """A simulated backend. Its tokens depend only on the image and the step, not on other images in flight.

    `times` has the seconds per encoded image (encode_s), per step (step_s), per row of a step (row_s) and per regrouped
    row (regroup_row_s). They are spent sleeping, without the interpreter lock. `asked_s` is their sum, `busy_s` the
    time really slept, `own_s` the time that this class itself takes.
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
        """Return a number for each image, computed from its first bytes."""
        start = time.perf_counter()
        numbers = pixel_values.reshape(len(pixel_values), -1)[:, :8].astype(np.int64) @ (np.int64(7919) ** np.arange(8))
        self._wait(start, self._times["encode_s"] * len(pixel_values))
        return numbers

    def allocate(self, num_slots: int, *_: int) -> dict[str, Any]:
        """Return a cache that holds one number per slot."""
        return {"seeds": np.zeros(num_slots, np.int64)}

    def set_recent(self, cache: dict[str, Any], recent: int) -> None:
        """Do nothing; padded backends set the length of the recent block here."""

    def admit(self, cache: dict[str, Any], slot: int, encoded: NDArray[np.int64], image: int) -> None:
        """Put an image's number into a slot."""
        cache["seeds"][slot] = encoded[image]

    def step(self, cache: dict[str, Any], inputs: Any, **_: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return candidates for every slot from the pool."""
        start = time.perf_counter()
        drawn = (cache["seeds"] + inputs.positions[:, 0] * 40503 + inputs.input_ids.sum(1) * 97) % POOL
        ids = np.where((inputs.positions[:, :1] >= SHORTEST), self._ends[drawn], self._words[drawn])
        scores = inputs.scores[:, :1] + self._falls[drawn]
        marks = inputs.marked_ids if hasattr(inputs, "marked_ids") else inputs.banned_ids  # its name at 084ae4d
        self.shapes[(*inputs.ancestry.shape, marks.shape[2])] += 1
        self._wait(start, self._times["step_s"] + self._times["row_s"] * inputs.input_ids.size)
        return scores, ids

    def regroup(self, cache: dict[str, Any], slots: NDArray[np.int64], columns: NDArray[np.int64], **_: Any) -> None:
        """Keep the given slots."""
        start = time.perf_counter()
        cache["seeds"] = cache["seeds"][slots]
        self._wait(start, self._times["regroup_row_s"] * columns.shape[0])

    def _wait(self, start: float, seconds: float) -> None:
        own = time.perf_counter() - start
        self.own_s += own
        if seconds > own:
            time.sleep(seconds - own)
        if seconds:  # the system may sleep longer than requested; the device is then that much slower
            self.asked_s += seconds
            self.busy_s += time.perf_counter() - start


def timed(spent: dict[str, float]) -> None:
    """Add timers to the functions of STAGES that this version of the engine has; `spent` collects the seconds."""
    for stage, (location, name) in STAGES.items():
        module, _, owner = location.partition(":")
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
    """Yield distinct images u8[height,width,3]. Their memory is reused: each stays valid for min(count, 512) images."""
    base = np.random.default_rng(1).integers(0, 255, (height, width, 3), np.uint8)
    pool = [base.copy() for _ in range(min(count, 512))]
    for number in range(count):
        picture = pool[number % len(pool)]
        picture[0, 0], picture[0, 1, 0] = (number & 255, number >> 8 & 255, number >> 16), number % 251
        yield picture


def main() -> None:
    """Read the settings, a JSON object in the first argument, and print the report."""
    order = json.loads(sys.argv[1])
    from engine.captioner import Captioner

    try:
        from engine.bundle.open import open_bundle
        from engine.decoding.backend import BatchSizes
    except ImportError:  # the names at 084ae4d
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
        images: Any = sorted(Path(order["pictures"]).glob("*.jpg"))[: order["images"]]
    else:
        images = pictures(order["images"], image.height, image.width)
    digest, count, steps = hashlib.sha256(), 0, 0
    cpu, serial, start = time.process_time(), time.thread_time(), time.perf_counter()
    for caption in captioner.caption(images, options):
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

"""Would evaluating fewer beams pay? The share of rows that Meister's bound proves idle.

    python -m benchmarks.bound --workload demo --beams 10

Log-probabilities are at most 0. A beam whose running score is below the K-th best continuation of the beams above it
(end token left out) adds neither a running beam nor a hypothesis in this step, and need not be fed: the per-step form
of best-first beam search (Meister, Vieira and Cotterell 2020, https://arxiv.org/abs/2007.03909). This counts, without
changing the search, how many beams each step had to feed, and what feeding the upper ones first would have come to.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.setting.workload import MAX_NEW_TOKENS, prepare, read_pixels
from benchmarks.speed.work import RULED_OUT
from engine.captioner import Captioner
from engine.decoding.backend import Backend, StepInputs


class BoundBackend:
    """A Backend around another that counts, for every image and step, the beams that had to be fed."""

    def __init__(self, backend: Backend, vocab_size: int, eos: int) -> None:
        self.backend = backend
        self.needed: Counter[int] = Counter()
        self._vocab_size, self._eos = vocab_size, eos

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def step(self, cache: Any, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores, ids = self.backend.step(cache, inputs)
        rows, tokens = np.divmod(ids, self._vocab_size)
        for slot in np.flatnonzero((inputs.scores > RULED_OUT).all(1)):
            self.needed[self._beams_needed(inputs.scores[slot], scores[slot], rows[slot], tokens[slot])] += 1
        return scores, ids

    def _beams_needed(self, running, scores, rows, tokens) -> int:
        """The 2K candidates suffice: where fewer than K come from the beams above, the bound cannot hold."""
        beams = len(running)
        for above in range(1, beams):
            continuations = scores[(rows < above) & (tokens != self._eos)]
            if len(continuations) >= beams and running[above] < continuations[beams - 1]:
                return above
        return beams


@click.command()
@click.option("--workload", "name", type=click.Choice(sorted(MAX_NEW_TOKENS)), default="demo", show_default=True)
@click.option("--images", type=click.IntRange(1), default=64, show_default=True)
@click.option("--beams", type=click.IntRange(2), default=10, show_default=True)
def main(name: str, images: int, beams: int) -> None:
    """Print the share of rows an oracle would need, and that of feeding the first h beams before the rest."""
    workload = prepare(name, images)
    captioner = Captioner.load(workload.bundle, backend="cpu")
    search = captioner.search(workload.options(beams))
    counting = BoundBackend(captioner.backend, search.vocab_size, search.eos)
    pixels = read_pixels(workload, captioner.bundle)
    list(Captioner(captioner.bundle, counting).scheduler(search).decode(pixels))
    needed, steps = counting.needed, counting.needed.total()
    two_passes = {
        first: {
            "rows": round(sum((first if k <= first else beams) * n for k, n in needed.items()) / steps / beams, 3),
            "steps_with_second_pass": round(sum(n for k, n in needed.items() if k > first) / steps, 3),
        }
        for first in range(1, beams)
    }
    report = {
        "workload": name,
        "beams": beams,
        "image_steps": steps,
        "rows_needed": round(sum(k * n for k, n in needed.items()) / steps / beams, 3),
        "first_beams_then_rest": two_passes,
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()

"""Why two programs captioned one image differently: both searches step by step, down to the scores that decided.

Both sides run the decoding core, one on the bundle, one on Hugging Face's own uncached forward pass. Reports and exit
codes belong to the callers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends import Backend, StepInputs
from engine.captioner import Captioner
from engine.captions import Alternative
from engine.decoding.beam import Hypothesis, Search
from engine.decoding.processors import penalised, process
from engine.decoding.scheduler import Scheduler
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions
from export.reference.huggingface import PrefixBackend, PrefixCache, Reference, UncachedBackend

TIE_ABSOLUTE, TIE_RELATIVE = 1e-5, 2e-6
"""Gap below which two candidates tie: float32 keeps 24 bits (6e-8 relative), and a caption's sum adds some 30 terms
whose rounding differs between programs; 1e-5 is also the largest score difference seen between correct ones. The
relative part is of the sum or of the spread of the log-probabilities over the vocabulary, whichever is larger: logits
that are far apart are rounded in larger steps."""

SCORE_TOLERANCE = 1e-4
"""Largest accepted difference of a score, relative where the score is beyond -1."""

Ids = tuple[int, ...]
Verdict = Literal["tie", "batch", "real"]


@dataclass(frozen=True)
class Step:
    """One step of one image: the beams that were fed, and the finite candidates that came back, best first."""

    fed: frozenset[Ids]
    candidates: list[tuple[Ids, float]]


@dataclass(frozen=True)
class Divergence:
    """Where two searches part, how far apart in score the parting choices are, and whether that is a tie."""

    step: int
    gap: float
    is_tie: bool


class Trace:
    """A Backend around another that notes every step of the one picture it decodes."""

    name = "trace"

    def __init__(self, backend: Backend, search: Search, picture: NDArray[np.uint8]) -> None:
        """Decode `picture` u8[height,width,3] into `steps`, the final `hypotheses`, and the `ids` of the best."""
        self.backend, self.batch_sizes = backend, backend.batch_sizes
        self.steps: list[Step] = []
        self._vocab_size = search.vocab_size
        ((_, self.hypotheses),) = Scheduler(self, search, num_slots=1).decode(picture[None])
        self.ids: Ids = self.hypotheses[0].ids

    def encode(self, pixel_values: NDArray[np.uint8]) -> object:
        return self.backend.encode(pixel_values)

    def allocate(self, num_slots: int) -> tuple[object, PrefixCache]:
        return self.backend.allocate(num_slots), PrefixCache.allocate(num_slots)

    def admit(self, cache: tuple[object, PrefixCache], slot: int, encoded: object, image: int) -> None:
        self.backend.admit(cache[0], slot, encoded, image)

    def step(
        self, cache: tuple[object, PrefixCache], inputs: StepInputs
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        past = cache[1].feed(inputs)[0]
        scores, ids = self.backend.step(cache[0], inputs)
        rows, tokens = np.divmod(ids[0], self._vocab_size)
        # -inf: a banned id, or a row that only feeds a part of the prompt; neither can be chosen
        candidates = [
            ((*past[row], int(token)), float(score))
            for row, token, score in zip(rows, tokens, scores[0], strict=True)
            if np.isfinite(score)
        ]
        fed = frozenset(prefix for prefix, score in zip(past, inputs.scores[0], strict=True) if np.isfinite(score))
        self.steps.append(Step(fed, candidates))
        return scores, ids

    def regroup(self, cache: tuple[object, PrefixCache], slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        self.backend.regroup(cache[0], slots, columns)
        cache[1].regroup(slots, columns)


def judge(
    reference: Reference,
    captioner: Captioner,
    picture: Image.Image,
    options: DecodeOptions,
    ours: Alternative | Hypothesis,
    rank: int = 0,
) -> tuple[Verdict, Divergence]:
    """Return why the engine captioned an RGB image with `ours` and `generate` did not, and where the searches diverge.

    "tie": for this image alone the two searches diverge at a tie and end in these very captions. "batch": in a batch
    with other images, or with its caches, one of the programs took another path, because matrix products of another
    shape are rounded differently. Alone they agree or diverge at a tie, two candidates of a search tie, and the
    reference gives `ours` the score that the engine gave it. "real": anything else. The first divergence decides, not
    the scores of the final captions: an early tie can lead to captions of quite different scores. `rank` is the place
    of `ours` among num_return_sequences captions.
    """
    alone = reference.generate(reference.pixels([picture]), options)[0][rank]
    spec, backend = captioner.bundle.image, UncachedBackend(reference)
    pixels = read_image(picture, spec.height, spec.width, spec.resample)
    divergence, mine, theirs = trace_both(captioner, backend, pixels, options)
    if not divergence.is_tie:
        return "real", divergence
    if theirs.hypotheses[rank].ids == alone.ids != mine.hypotheses[rank].ids == ours.ids:
        return "tie", divergence
    search = captioner.search(options)
    score = summed_log_prob(backend, search, pixels, ours.ids)
    if abs(score - ours.sum_log_prob) > SCORE_TOLERANCE * max(1.0, abs(score)):
        return "real", Divergence(divergence.step, abs(score - ours.sum_log_prob), False)
    if options.num_beams == 1:
        step, gap = closest_words(backend, search, pixels, alone.ids)
    else:
        step, gap = min((closest_candidates(trace) for trace in (mine, theirs)), key=lambda closest: closest[1])
    is_tie = gap <= TIE_ABSOLUTE + TIE_RELATIVE * abs(score)
    if not is_tie and ours.ids != alone.ids:  # no candidates tie at one step, but the final captions may
        is_tie = caption_gap(backend, search, pixels, ours.ids, alone.ids).is_tie
    return ("batch" if is_tie else "real"), Divergence(step, gap, is_tie)


def caption_gap(
    reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], ours: Ids, theirs: Ids
) -> Divergence:
    """Return how far apart the reference scores two captions of one picture, and whether that is a tie.

    Of beams their scores count (Hypothesis.score), of greedy captions the two words where they part.
    """
    prompt = len(search.prompt)
    step = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if search.num_beams == 1:
        (row,) = next_log_probs(reference, search, pixels, [ours[:step]])
        words = [float(row[ids[step]]) if step < len(ids) else -np.inf for ids in (ours, theirs)]
        gap, scale = abs(words[0] - words[1]), float(np.ptp(row))
        return Divergence(step - prompt, gap, gap <= TIE_ABSOLUTE + TIE_RELATIVE * scale)
    sums = [summed_log_prob(reference, search, pixels, ids) for ids in (ours, theirs)]
    scores = [
        total / (len(ids) - prompt) ** search.length_penalty for total, ids in zip(sums, (ours, theirs), strict=True)
    ]
    gap = abs(scores[0] - scores[1])
    return Divergence(step - prompt, gap, gap <= TIE_ABSOLUTE * max(1.0, abs(scores[0])))


def trace_both(
    captioner: Captioner, reference: PrefixBackend, pixels: NDArray[np.uint8], options: DecodeOptions
) -> tuple[Divergence, Trace, Trace]:
    """Trace the engine's and the reference's search over one picture alone; return where they part, and both."""
    search = captioner.search(options)

    def score(ids: Ids) -> float:
        return summed_log_prob(reference, search, pixels, ids)

    mine, theirs = Trace(captioner.backend, search, pixels), Trace(reference, search, pixels)
    spread = float(np.ptp(reference.log_probs(pixels, [search.prompt])[0]))
    return find_divergence(mine, theirs, score, spread), mine, theirs


def next_log_probs(
    reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], prefixes: list[Ids]
) -> NDArray[np.float32]:
    """Return the reference's log-probabilities f32[len(prefixes),V] with the search's repetition penalty, bans left
    aside.
    """
    rows = reference.log_probs(pixels, prefixes)
    if not search.processors.has_penalty:
        return rows
    said = [penalised(np.unique(prefix)) for prefix in prefixes]
    logits = reference.logits(pixels, prefixes)
    return np.concatenate(
        [
            process(row[None], raw[None], marks[None], search.penalties)
            for row, raw, marks in zip(rows, logits, said, strict=True)
        ]
    )


def summed_log_prob(reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], ids: Ids) -> float:
    """Return the reference's summed log-probability of a caption's ids behind the prompt."""
    prompt = len(search.prompt)
    rows = next_log_probs(reference, search, pixels, [ids[:i] for i in range(prompt, len(ids))])
    return float(sum(row[i] for row, i in zip(rows, ids[prompt:], strict=True)))


def closest_words(reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], ids: Ids) -> tuple[int, float]:
    """Return (step, gap) where the two likeliest next ids of a greedy caption score most alike (bans left aside)."""
    rows = next_log_probs(reference, search, pixels, [ids[:i] for i in range(len(search.prompt), len(ids))])
    best = -np.partition(-rows, 1, axis=1)[:, :2]
    gaps = best[:, 0] - best[:, 1]
    step = int(gaps.argmin())
    return step, float(gaps[step])


def closest_candidates(trace: Trace) -> tuple[int, float]:
    """Return (step, gap) where two neighbouring candidates of a beam search score most alike."""
    gaps = [
        (step, abs(first - second))
        for step, taken in enumerate(trace.steps)
        for (_, first), (_, second) in itertools.pairwise(taken.candidates)
    ]
    return min(gaps, key=lambda found: found[1], default=(0, float("inf")))


def find_divergence(ours: Trace, theirs: Trace, score: Callable[[Ids], float], spread: float = 0.0) -> Divergence:
    """Compare two traces step by step; `score` gives the reference's summed log-probability of any ids.

    As long as both feed the same beams, every candidate must score the same on both sides and the ranked scores must
    agree; a difference beyond a tie is real wherever it stands. The first step after which other beams run on (or, if
    there is none, the first whose candidates are ranked otherwise) is where the captions parted.
    """
    swapped: Divergence | None = None
    for number, (mine, reference) in enumerate(zip(ours.steps, theirs.steps, strict=False)):
        if mine.fed != reference.fed:
            previous = number - 1
            return swapped or Divergence(previous, _choice_gap(ours.steps[number], theirs.steps[number], score), True)
        gap, scale = _largest_disagreement(mine, reference, score)
        if gap > TIE_ABSOLUTE + TIE_RELATIVE * max(scale, spread):
            return Divergence(number, gap, False)
        order = [ids for ids, _ in mine.candidates], [ids for ids, _ in reference.candidates]
        if swapped is None and order[0] != order[1]:
            swapped = Divergence(number, _order_gap(*order, score), True)
    if swapped is not None:
        return swapped
    gap = abs(score(ours.ids) - score(theirs.ids))
    return Divergence(min(len(ours.steps), len(theirs.steps)), gap, gap <= TIE_ABSOLUTE)


def _largest_disagreement(mine: Step, reference: Step, score: Callable[[Ids], float]) -> tuple[float, float]:
    """Return the largest score difference of a candidate or a rank, and the size of the scores there."""
    known = dict(reference.candidates)
    pairs = [(s, known[ids] if ids in known else score(ids)) for ids, s in mine.candidates]
    if len(mine.candidates) != len(reference.candidates):  # one side banned an id that the other allowed
        return np.inf, 0.0
    pairs += [(s, r) for (_, s), (_, r) in zip(mine.candidates, reference.candidates, strict=True)]
    return max(((abs(s - r), abs(r)) for s, r in pairs), default=(0.0, 0.0))


def _order_gap(mine: list[Ids], reference: list[Ids], score: Callable[[Ids], float]) -> float:
    """Return the reference's score difference between the first two candidates that changed places."""
    first = next((m, r) for m, r in zip(mine, reference, strict=True) if m != r)
    return abs(score(first[0]) - score(first[1]))


def _choice_gap(mine: Step, reference: Step, score: Callable[[Ids], float]) -> float:
    """Return by how much the beams only one side feeds differ, in the reference's scores."""
    ours = [score(ids) for ids in mine.fed - reference.fed]
    theirs = [score(ids) for ids in reference.fed - mine.fed]
    return max(theirs, default=0.0) - min(ours, default=0.0)

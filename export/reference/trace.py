"""Explain why the engine and Hugging Face captioned an image differently.

Both searches are run again step by step, and the scores at the point where they diverge decide whether the difference
is a tie. Both run the decoding core: one on the bundle, the other on Hugging Face's uncached forward pass. Callers
write the reports and set the exit code.
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
"""Score gap up to which two candidates tie.

float32 has 24 bits (6e-8 relative), and a caption's score sums some 30 terms that different programs round differently.
1e-5 is also the largest score difference that was seen between correct programs. The relative part applies to the sum
or to the spread of the log-probabilities over the vocabulary, whichever is larger, because logits that are far apart
are rounded in larger steps."""

TIE_ERRORS = 2
"""Where a difference exceeds that gap, the gap is widened by this multiple of the reference's rounding error.

How far float32 rounds depends on weights and image: large activations and sums over many positions round further. So
the reference's log-probabilities are compared with those of its model in float64. The error of a score is the sum of
the absolute errors of its tokens, since signed errors may happen to cancel; 2, because both programs round. A
difference above SCORE_TOLERANCE is never a tie."""

SCORE_TOLERANCE = 1e-4
"""Largest accepted difference of two scores, relative to the score if that is below -1."""

Ids = tuple[int, ...]
Verdict = Literal["tie", "batch", "real"]


@dataclass(frozen=True)
class Step:
    """One step of one image: the beams that were fed, and the finite candidates that were returned, best first."""

    fed: frozenset[Ids]
    candidates: list[tuple[Ids, float]]


def is_rounding(gap: float, score: float, *, spread: float = 0.0, error: Callable[[], float] = lambda: 0.0) -> bool:
    """Return whether two scores that are `gap` apart are equal up to rounding; `score` is one of them.

    `spread` is that of the log-probabilities over the vocabulary. `error` measures the reference's rounding error and
    is only called for gaps that it could explain.
    """
    bound = TIE_ABSOLUTE + TIE_RELATIVE * max(abs(score), spread)
    return gap <= bound or (gap <= SCORE_TOLERANCE * max(1.0, abs(score)) and gap <= bound + TIE_ERRORS * error())


@dataclass(frozen=True)
class Divergence:
    """The step at which two searches diverge, the score gap of the two choices there, and whether that is a tie."""

    step: int
    gap: float
    is_tie: bool


class Trace:
    """A Backend that wraps another, decodes one image with it and records every step."""

    name = "trace"

    def __init__(self, backend: Backend, search: Search, image: NDArray[np.uint8]) -> None:
        """Decode `image` u8[height,width,3]: set `steps`, the final `hypotheses` and the `ids` of the best one."""
        self.backend, self.batch_sizes = backend, backend.batch_sizes
        self.steps: list[Step] = []
        self._vocab_size = search.vocab_size
        ((_, self.hypotheses),) = Scheduler(self, search, num_slots=1).decode(image[None])
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
        # a score of -inf is a banned id, or a row that only feeds a part of the prompt: neither can be chosen
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
    image: Image.Image | NDArray[np.uint8],
    options: DecodeOptions,
    ours: Alternative | Hypothesis,
    rank: int = 0,
) -> tuple[Verdict, Divergence]:
    """Return why the engine captioned an image with `ours` but `generate` did not, and where the searches diverge.

    Verdicts:
      tie    When each program decodes this image alone, the two searches diverge at a tie and end in these captions.
      batch  One of the programs took another path in a batch with other images, or with its caches, because matrix
             products of another shape are rounded differently. When they decode the image alone they agree or diverge
             at a tie, two candidates of a search tie, and the reference gives `ours` the same score as the engine.
      real   Anything else.

    The first divergence decides, not the scores of the final captions: an early tie can lead to captions with very
    different scores. `image` is an RGB image, or u8[height,width,3] that needs no resizing. `rank` is the index of
    `ours` among the num_return_sequences captions.
    """
    spec, backend = captioner.bundle.image, UncachedBackend(reference)
    if isinstance(image, np.ndarray):
        pixels, pixel_values = image, reference.normalised(image[None])
    else:
        pixels = read_image(image, spec.height, spec.width, spec.resample, resize=spec.resize)
        pixel_values = reference.pixels([image])
    alone = reference.generate(pixel_values, options)[0][rank]
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
        step, gap = closest_tokens(backend, search, pixels, alone.ids)
        is_tie = is_rounding(gap, score)
    else:
        step, gap = min((closest_candidates(trace) for trace in (mine, theirs)), key=lambda closest: closest[1])
        is_tie = is_rounding(gap, score, error=lambda: score_error(backend, search, pixels, ours.ids))
    if not is_tie and ours.ids != alone.ids:  # no two candidates of a step tie, but the final captions may
        is_tie = caption_gap(backend, search, pixels, ours.ids, alone.ids).is_tie
    return ("batch" if is_tie else "real"), Divergence(step, gap, is_tie)


def caption_gap(
    reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], ours: Ids, theirs: Ids
) -> Divergence:
    """Return the gap between the reference's scores of two captions of an image, and whether that is a tie.

    With beams, the final scores are compared (Hypothesis.score). For greedy captions, the log-probabilities of the
    first two tokens that differ are compared.
    """
    prompt = len(search.prompt)
    step = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if search.num_beams == 1:
        (row,) = next_log_probs(reference, search, pixels, [ours[:step]])
        log_probs = [float(row[ids[step]]) if step < len(ids) else -np.inf for ids in (ours, theirs)]
        gap = abs(log_probs[0] - log_probs[1])
        return Divergence(step - prompt, gap, is_rounding(gap, 0.0, spread=float(np.ptp(row))))
    lengths = [(len(ids) - prompt) ** search.length_penalty for ids in (ours, theirs)]

    def of_both(value: Callable[..., float]) -> list[float]:
        return [
            value(reference, search, pixels, ids) / length for ids, length in zip((ours, theirs), lengths, strict=True)
        ]

    scores = of_both(summed_log_prob)
    gap = abs(scores[0] - scores[1])
    return Divergence(step - prompt, gap, is_rounding(gap, scores[0], error=lambda: max(of_both(score_error))))


def trace_both(
    captioner: Captioner, reference: PrefixBackend, pixels: NDArray[np.uint8], options: DecodeOptions
) -> tuple[Divergence, Trace, Trace]:
    """Trace the engine's and the reference's search on one image alone; return their divergence and both traces."""
    search = captioner.search(options)

    def score(ids: Ids) -> float:
        return summed_log_prob(reference, search, pixels, ids)

    def error(ids: Ids) -> float:
        return score_error(reference, search, pixels, ids)

    mine, theirs = Trace(captioner.backend, search, pixels), Trace(reference, search, pixels)
    spread = float(np.ptp(reference.log_probs(pixels, [search.prompt])[0]))
    return find_divergence(mine, theirs, score, error, spread), mine, theirs


def next_log_probs(
    reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], prefixes: list[Ids]
) -> NDArray[np.floating]:
    """Return the reference's log-probabilities f32[len(prefixes),V] with the search's repetition penalty.

    Bans are not applied.
    """
    rows = reference.log_probs(pixels, prefixes)
    if not search.processors.has_penalty:
        return rows
    marked_ids = [penalised(np.unique(prefix)) for prefix in prefixes]
    logits = reference.logits(pixels, prefixes)
    return np.concatenate(
        [
            process(row[None], raw[None], marks[None], search.penalties)
            for row, raw, marks in zip(rows, logits, marked_ids, strict=True)
        ]
    )


def token_log_probs(
    reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], ids: Ids
) -> NDArray[np.floating]:
    """Return the reference's log-probability of each of a caption's ids after the prompt: f32[len(ids)-prompt]."""
    prompt = len(search.prompt)
    rows = next_log_probs(reference, search, pixels, [ids[:i] for i in range(prompt, len(ids))])
    return rows[np.arange(len(rows)), ids[prompt:]]


def summed_log_prob(reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], ids: Ids) -> float:
    """Return the reference's summed log-probability of a caption's ids after the prompt."""
    return float(token_log_probs(reference, search, pixels, ids).cumsum()[-1])  # in the order of a search


def score_error(reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], ids: Ids) -> float:
    """Return how far the reference's summed log-probability of a caption may be off by rounding. See TIE_ERRORS."""
    rounded = token_log_probs(reference, search, pixels, ids)
    exact = token_log_probs(reference.in_float64, search, pixels, ids)
    return float(np.abs(rounded - exact).sum())


def closest_tokens(reference: PrefixBackend, search: Search, pixels: NDArray[np.uint8], ids: Ids) -> tuple[int, float]:
    """Return the step of a greedy caption at which the two most likely ids have the smallest gap, and that gap.

    Bans are not applied.
    """
    rows = next_log_probs(reference, search, pixels, [ids[:i] for i in range(len(search.prompt), len(ids))])
    best = -np.partition(-rows, 1, axis=1)[:, :2]
    gaps = best[:, 0] - best[:, 1]
    step = int(gaps.argmin())
    return step, float(gaps[step])


def closest_candidates(trace: Trace) -> tuple[int, float]:
    """Return the step of a beam search at which two neighbouring candidates have the smallest gap, and that gap."""
    gaps = [
        (number, abs(first - second))
        for number, step in enumerate(trace.steps)
        for (_, first), (_, second) in itertools.pairwise(step.candidates)
    ]
    return min(gaps, key=lambda gap: gap[1], default=(0, float("inf")))


def find_divergence(
    ours: Trace, theirs: Trace, score: Callable[[Ids], float], error: Callable[[Ids], float], spread: float = 0.0
) -> Divergence:
    """Compare two traces step by step.

    `score` gives the reference's summed log-probability of any ids, and `error` the rounding error of that. At a step,
    the largest error of the reference's candidates counts.

    As long as both searches feed the same beams, each candidate must have the same score on both sides, and the scores
    at each rank must agree. A larger difference than rounding is real, at any candidate. The searches diverge at the
    first step after which their beams differ or, if there is no such step, at the first step whose candidates are
    ranked differently.
    """
    swapped: Divergence | None = None
    for number, (mine, reference) in enumerate(zip(ours.steps, theirs.steps, strict=False)):
        if mine.fed != reference.fed:
            previous = number - 1
            return swapped or Divergence(previous, _choice_gap(ours.steps[number], theirs.steps[number], score), True)
        gap, total = _largest_disagreement(mine, reference, score)
        errors = map(error, [ids for ids, _ in reference.candidates])
        if not is_rounding(gap, total, spread=spread, error=lambda: max(errors)):  # noqa: B023 - called at once
            return Divergence(number, gap, False)
        order = [ids for ids, _ in mine.candidates], [ids for ids, _ in reference.candidates]
        if swapped is None and order[0] != order[1]:
            swapped = Divergence(number, _order_gap(*order, score), True)
    if swapped is not None:
        return swapped
    gap = abs(score(ours.ids) - score(theirs.ids))
    is_tie = is_rounding(gap, score(theirs.ids), error=lambda: max(map(error, (ours.ids, theirs.ids))))
    return Divergence(min(len(ours.steps), len(theirs.steps)), gap, is_tie)


def _largest_disagreement(mine: Step, reference: Step, score: Callable[[Ids], float]) -> tuple[float, float]:
    """Return the largest score difference of a candidate or a rank, and the absolute score there."""
    known = dict(reference.candidates)
    pairs = [(s, known[ids] if ids in known else score(ids)) for ids, s in mine.candidates]
    if len(mine.candidates) != len(reference.candidates):  # one side banned an id that the other allowed
        return np.inf, 0.0
    pairs += [(s, r) for (_, s), (_, r) in zip(mine.candidates, reference.candidates, strict=True)]
    return max(((abs(s - r), abs(r)) for s, r in pairs), default=(0.0, 0.0))


def _order_gap(mine: list[Ids], reference: list[Ids], score: Callable[[Ids], float]) -> float:
    """Return the reference's score difference between the first two candidates that are ranked differently."""
    first = next((m, r) for m, r in zip(mine, reference, strict=True) if m != r)
    return abs(score(first[0]) - score(first[1]))


def _choice_gap(mine: Step, reference: Step, score: Callable[[Ids], float]) -> float:
    """Return how much the beams that only one side feeds differ in the reference's scores."""
    ours = [score(ids) for ids in mine.fed - reference.fed]
    theirs = [score(ids) for ids in reference.fed - mine.fed]
    return max(theirs, default=0.0) - min(ours, default=0.0)

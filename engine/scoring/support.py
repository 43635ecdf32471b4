"""Which captions of a training set are near to the candidates of an image.

Captions of the nearest training pictures find a consensus in Devlin et al. 2015, "Exploring Nearest Neighbor Approaches
for Image Captioning"; here nearness is measured between captions, so that no picture is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from engine.errors import DataError
from engine.inputs.tables import Table
from engine.scoring.base import Metric
from engine.scoring.overlap import Rouge1
from engine.scoring.preprocess import preprocess
from engine.scoring.rerank import Candidate, Support, weights_of

POOL = 4
"""Captions that another utility than ROUGE-1 is computed with, for each that may vote: all of a training set would be
billions of pairs a run."""
WORD = re.compile(r"[a-z0-9]+")
"""A word, as ROUGE-1 has it."""


class SupportCaptions:
    """S distinct captions in the order of their file, to be searched by their words.

    A caption without a word, an empty one for example, is near to nothing and left out. Raises DataError where none is
    left.
    """

    def __init__(self, table: Table) -> None:
        ids_of: dict[str, set[str]] = {}
        for name, several in table.captions.items():
            for text in several:
                ids_of.setdefault(text, set()).add(name)
        words_of = {text: words for text in ids_of if (words := _words(text))}
        if not words_of:
            raise DataError(f"{table.path} holds no caption with a word of a to z or 0 to 9: nothing can be near")
        places: dict[tuple[str, int], list[int]] = {}
        self._own: dict[str, list[int]] = {}
        for place, (text, words) in enumerate(words_of.items()):
            for word in words:
                places.setdefault(word, []).append(place)
            if len(ids_of[text]) == 1:
                self._own.setdefault(next(iter(ids_of[text])), []).append(place)
        self._ids = table.ids
        self._texts = list(words_of)
        self._lengths = np.array([len(words) for words in words_of.values()], np.float64)
        self._places = {word: np.array(several, np.intp) for word, several in places.items()}

    def __len__(self) -> int:
        return len(self._texts)

    def near(
        self,
        candidates: Mapping[str, Sequence[Candidate]],
        utility: Metric,
        *,
        nearest: int,
        share: float,
        uniform: bool = False,
    ) -> Support:
        """Return what may vote for each image that has several candidates.

        That is the `nearest` captions of the largest expected ROUGE-1 with the candidates, the earliest of equal ones;
        for another utility POOL times as many, among which it finds the `nearest`. Left out are captions that share no
        word with a candidate, and those that no picture but the image itself has, by its id. Raises UsageError for
        numbers that Support refuses.
        """
        support = Support({}, nearest, share)
        most = nearest if isinstance(utility, Rouge1) else POOL * nearest
        near = {
            name: self._find(name, several, weights_of(several, uniform=uniform), most)
            for name, several in candidates.items()
            if len(several) > 1 and share
        }
        return replace(support, near=near)

    def _find(self, name: str, candidates: Sequence[Candidate], weights: Sequence[float], most: int) -> list[str]:
        """Return the `most` captions of the largest expected ROUGE-1, in the order of the file."""
        expected = np.zeros(len(self._texts))
        for one, weight in zip(candidates, weights, strict=True):
            words = _words(one.text)
            found = [self._places[word] for word in words if word in self._places]
            if found:
                overlap = np.bincount(np.concatenate(found), minlength=len(expected))
                expected += weight * (2 * overlap / (len(words) + self._lengths))
        expected[self._own.get(self._ids.find(name) or "", [])] = 0.0
        places = np.flatnonzero(expected)
        if len(places) > most:
            least = np.partition(expected, -most)[-most]
            above, equal = np.flatnonzero(expected > least), np.flatnonzero(expected == least)
            places = np.sort(np.concatenate([above, equal[: most - len(above)]]))
        return [self._texts[place] for place in places]


def _words(text: str) -> list[tuple[str, int]]:
    """Return the words of a caption, each with how often it came before.

    As many of these as two captions share is their clipped overlap, which ROUGE-1 counts.
    """
    before: Counter[str] = Counter()
    words = []
    for word in WORD.findall(preprocess(text).lower()):
        words.append((word, before[word]))
        before[word] += 1
    return words

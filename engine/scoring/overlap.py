"""ROUGE, BLEU and CIDEr, computed by the libraries that the field uses. METEOR is in meteor.py."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import counted, install_command
from engine.inputs.tables import Table
from engine.scoring.base import SIGNATURE, Items, Measured, UnavailableError, library, mean, preprocess, settle_empty

EXTRA = install_command("score")


class Rouge1:
    """ROUGE-1 F: clipped overlap of unigrams `[a-z0-9]+` without stemming, mean over images.

    With several references, an image gets its best score.
    """

    name = "rouge1"

    def signature(self) -> str:
        return f"rouge1:F|stemmer:no|text:{SIGNATURE}|{library('rouge-score')}"

    def measure(self, items: Items) -> Measured:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise UnavailableError(f"needs rouge-score ({error}): {EXTRA}") from error
        scorer = RougeScorer(["rouge1"], use_stemmer=False)
        text = items.preprocessed()
        scores = [
            scorer.score_multi(references, candidate)["rouge1"].fmeasure
            for candidate, references in zip(text.candidates, text.references, strict=True)
        ]
        filled = [reference for references in text.references for reference in references if reference]
        unread = sum(not re.search(r"[a-z0-9]", reference.lower()) for reference in filled)
        note = (
            f"{unread} of {counted(len(filled), 'reference')} without a token that rouge-score reads ([a-z0-9]+), "
            "which score 0"
        )
        return mean(settle_empty(items, np.array(scores)), note if unread else "")


class RougeL:
    """ROUGE-L F of pycocoevalcap (beta 1.2): longest common subsequence, mean over images (Lin and Hovey 2004).

    Texts are split at single spaces, so that two spaces in a row make an empty token, as in pycocoevalcap. With several
    references, the best precision and the best recall are combined.
    """

    name = "rouge_l"

    def signature(self) -> str:
        return f"rouge_l:F|beta:1.2|tokens:space|text:{SIGNATURE}|{library('pycocoevalcap')}"

    def measure(self, items: Items) -> Measured:
        rouge = _pycocoevalcap("rouge.rouge").Rouge()
        text = items.preprocessed()
        return mean(
            [
                rouge.calc_score([candidate], list(references))
                for candidate, references in zip(text.candidates, text.references, strict=True)
            ]
        )


class Bleu:
    """Corpus BLEU with n-grams up to `n`, as pycocoevalcap computes it (Papineni et al. 2002).

    The geometric mean of the run's clipped n-gram precisions, times the brevity penalty. Tokens are separated by white
    space. With several references, the one nearest in length sets the reference length.
    """

    def __init__(self, n: int) -> None:
        self.name, self._n = f"bleu{n}", n

    def signature(self) -> str:
        return f"{self.name}:corpus|tokens:space|text:{SIGNATURE}|{library('pycocoevalcap')}"

    def measure(self, items: Items) -> Measured:
        bleu = _pycocoevalcap("bleu.bleu_scorer")
        text = items.preprocessed()
        scorer = bleu.BleuScorer(n=self._n)
        for candidate, references in zip(text.candidates, text.references, strict=True):
            scorer += (candidate, list(references))
        values, per_image = scorer.compute_score(option="closest", verbose=0)
        counts = [
            (
                *entry["correct"][: self._n],
                *entry["guess"][: self._n],
                entry["testlen"],
                _closest(entry["reflen"], entry["testlen"]),
            )
            for entry in scorer.ctest
        ]
        return Measured(
            np.array(per_image[-1]),
            float(values[-1]),
            f"of the whole run; the mean over images is {np.mean(per_image[-1]):.6f}",
            np.array(counts, np.float64).reshape(len(items), 2 * self._n + 2),
            bleu_of_counts,
        )


def _closest(lengths: Any, length: int) -> float:
    return float(min((abs(reference - length), reference) for reference in np.atleast_1d(lengths))[1])


def bleu_of_counts(counts: NDArray[np.float64]) -> float:
    """Return BLEU-n from summed counts f64[2n+2]: n numbers of matches, n of guessed n-grams, and both lengths.

    The small constants are pycocoevalcap's. Because of them, a run without a single n-gram match does not score
    exactly 0.
    """
    n = len(counts) // 2 - 1
    matches, guessed, (length, reference_length) = counts[:n], counts[n : 2 * n], counts[2 * n :]
    precision = np.prod((matches + 1e-15) / (guessed + 1e-9)) ** (1.0 / n)
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return float(precision * (np.exp(1.0 - 1.0 / ratio) if ratio < 1 else 1.0))


class Cider:
    """CIDEr-D: n-grams up to 4, sigma 6, times 10 (Vedantam et al. 2015).

    Document frequencies come from the references of the run, so that scores on different images are not comparable.
    """

    name = "cider"

    def signature(self) -> str:
        return f"cider:D|n:4|sigma:6|df:references|tokens:space|text:{SIGNATURE}|{library('pycocoevalcap')}"

    def measure(self, items: Items) -> Measured:
        cider = _pycocoevalcap("cider.cider_scorer")
        text = items.preprocessed()
        scorer = cider.CiderScorer(n=4, sigma=6.0)
        for candidate, references in zip(text.candidates, text.references, strict=True):
            scorer += (candidate, list(references))
        if not any(ngrams for references in scorer.crefs for ngrams in references):
            raise UnavailableError("needs a reference with a word: all are empty after preprocessing")
        value, per_image = scorer.compute_score()
        note = "weights words by their rarity in these references: scores on other images are not comparable"
        worthless = sum(_is_everywhere(references, scorer, len(items)) for references in scorer.crefs)
        if worthless:
            note += (
                f"; {worthless} of {counted(len(items), 'image')} {'has' if worthless == 1 else 'have'} only words "
                "that all images share and score 0 with any caption: score more, and more varied, images"
            )
        return Measured(np.asarray(per_image, np.float64), float(value), note)


def _is_everywhere(references: Any, scorer: Any, images: int) -> bool:
    """Return whether all images' references have every n-gram of these, so that the weights are log(1) = 0."""
    ngrams = {ngram for counts in references for ngram in counts}
    return bool(ngrams) and all(scorer.document_frequency[ngram] >= images for ngram in ngrams)


def _pycocoevalcap(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise UnavailableError(f"needs pycocoevalcap ({error}): {EXTRA}") from error


class Novelty:
    """The part of a caption's words outside its longest n-gram that a training caption has, too; mean over images.

    0 is a caption that is, or is within, a training caption; 1 one without any word of the training captions. An empty
    caption has 0. References are not used.
    """

    name = "novelty"

    def __init__(self, training_captions: Table | None) -> None:
        texts = training_captions.captions.values() if training_captions is not None else ()
        self._training = sorted({preprocess(caption) for captions in texts for caption in captions})

    def signature(self) -> str:
        digest = hashlib.sha256("\n".join(self._training).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        return f"novelty:1-longest/words|text:{SIGNATURE}|train:{digest}"

    def measure(self, items: Items) -> Measured:
        if not self._training:
            raise UnavailableError("needs the training captions: --training-captions FILE")
        words = [text.split() for text in items.preprocessed().candidates]
        longest = longest_shared(words, [text.split() for text in self._training])
        copied = sum(shared == len(own) > 0 for shared, own in zip(longest, words, strict=True))
        note = (
            f"longest n-gram shared with a training caption: median {np.median(longest):g} words; {copied} of "
            f"{counted(len(words), 'caption')} found whole in one"
        )
        return mean([1 - shared / len(own) if own else 0.0 for shared, own in zip(longest, words, strict=True)], note)


def longest_shared(texts: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> list[int]:
    """Return for each text the length of its longest n-gram, in words, that is in one of `others`.

    n grows by 1. Only positions whose n-gram both sides have stay, so that the work shrinks quickly. An n-gram is named
    by a number: that of length n + 1 by the numbers of the two of length n that it consists of.
    """
    longest = [0] * len(texts)
    sides: list[dict[tuple[int, int], Hashable]] = [
        {(i, k): word for i, words in enumerate(side) for k, word in enumerate(words)} for side in (texts, others)
    ]
    length = 0
    while all(sides):
        length += 1
        shared = set(sides[0].values()) & set(sides[1].values())
        sides = [{place: name for place, name in side.items() if name in shared} for side in sides]
        for i, _ in sides[0]:
            longest[i] = length
        numbers: dict[Hashable, int] = {}
        sides = [
            {
                (i, k): numbers.setdefault((name, side[i, k + 1]), len(numbers))
                for (i, k), name in side.items()
                if (i, k + 1) in side
            }
            for side in sides
        ]
    return longest

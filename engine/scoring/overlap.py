"""Metrics of shared words: ROUGE, BLEU and CIDEr, by the libraries the field uses; METEOR is in meteor.py."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import install_command
from engine.scoring.base import SIGNATURE, Items, Measured, UnavailableError, library, mean, settle_empty

EXTRA = install_command("score")


class Rouge1:
    """ROUGE-1 F: clipped overlap of unigrams `[a-z0-9]+`, without stemmer, mean over images; the best of several
    references.
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
        texts = [one for several in text.references for one in several if one]
        unread = sum(not re.search(r"[a-z0-9]", one.lower()) for one in texts)
        note = f"{unread} of {len(texts)} references hold no token that rouge-score knows, [a-z0-9]+: they say nothing"
        return mean(settle_empty(items, np.array(scores)), note if unread else "")


class RougeL:
    """ROUGE-L F of pycocoevalcap (beta 1.2): longest common subsequence, mean over images (Lin and Hovey 2004).

    Its tokens are separated by single spaces, so that two spaces in a row make an empty token, as pycocoevalcap counts
    them. Of several references the best precision and the best recall count.
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

    Clipped n-gram precisions of the whole run, their geometric mean, times the brevity penalty. Tokens are what white
    space separates; the reference nearest in length counts.
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
    return float(min((abs(one - length), one) for one in np.atleast_1d(lengths))[1])


def bleu_of_counts(counts: NDArray[np.float64]) -> float:
    """Return BLEU-n of summed counts f64[2n+2]: n times matches, n times guessed n-grams, both lengths.

    The small numbers are pycocoevalcap's. They keep BLEU of a run without a single match of n words from being 0.
    """
    n = len(counts) // 2 - 1
    matches, guessed, (length, reference_length) = counts[:n], counts[n : 2 * n], counts[2 * n :]
    precision = np.prod((matches + 1e-15) / (guessed + 1e-9)) ** (1.0 / n)
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return float(precision * (np.exp(1.0 - 1.0 / ratio) if ratio < 1 else 1.0))


class Cider:
    """CIDEr-D: n-grams up to 4, sigma 6, times 10, document frequencies over the references given (Vedantam et al.
    2015).
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
        if not any(several for references in scorer.crefs for several in references):
            raise UnavailableError("needs a reference with a word: all are empty once preprocessed")
        value, per_image = scorer.compute_score()
        note = "weighs words by how rare they are in these references: other images, another scale"
        worthless = sum(_is_everywhere(references, scorer, len(items)) for references in scorer.crefs)
        if worthless:
            note += (
                f"; {worthless} of {len(items)} images have no word that another image lacks, so that they score 0 "
                "whatever is said: it takes more, and different, images"
            )
        return Measured(np.asarray(per_image, np.float64), float(value), note)


def _is_everywhere(references: Any, scorer: Any, images: int) -> bool:
    """Return whether every n-gram of an image's references is in those of all images, whose weight is log(1) = 0."""
    ngrams = {ngram for counts in references for ngram in counts}
    return all(scorer.document_frequency[ngram] >= images for ngram in ngrams)


def _pycocoevalcap(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise UnavailableError(f"needs pycocoevalcap ({error}): {EXTRA}") from error

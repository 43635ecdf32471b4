"""Metrics of shared words: ROUGE-1, BLEU-1 and CIDEr, by the libraries the field uses; METEOR is in meteor.py."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from engine.errors import install_command
from engine.scoring.base import Items, Measured, UnavailableError, library, mean, settle_empty
from engine.scoring.preprocess import SIGNATURE

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


class Bleu1:
    """Corpus BLEU-1: clipped unigram precision of the whole run times the brevity penalty (Papineni et al. 2002).

    Tokens are what white space separates; the reference nearest in length counts.
    """

    name = "bleu1"

    def signature(self) -> str:
        return f"bleu1:corpus|tokens:space|text:{SIGNATURE}|{library('pycocoevalcap')}"

    def measure(self, items: Items) -> Measured:
        bleu = _pycocoevalcap("bleu.bleu_scorer")
        text = items.preprocessed()
        scorer = bleu.BleuScorer(n=1)
        for candidate, references in zip(text.candidates, text.references, strict=True):
            scorer += (candidate, list(references))
        value, per_image = scorer.compute_score(option="closest", verbose=0)
        counts = [
            (entry["correct"][0], entry["guess"][0], entry["testlen"], _closest(entry["reflen"], entry["testlen"]))
            for entry in scorer.ctest
        ]
        return Measured(
            np.array(per_image[0]),
            float(value[0]),
            f"of the whole run; the mean over images is {np.mean(per_image[0]):.6f}",
            np.array(counts, np.float64).reshape(len(items), 4),
            _bleu1_of_counts,
        )


def _closest(lengths: Any, length: int) -> float:
    return float(min((abs(one - length), one) for one in np.atleast_1d(lengths))[1])


def _bleu1_of_counts(counts: Any) -> float:
    """BLEU-1 of summed (matches, guessed tokens, candidate length, reference length)."""
    matches, guessed, length, reference_length = counts
    if not matches or not length:
        return 0.0
    brevity = 1.0 if length >= reference_length else np.exp(1.0 - reference_length / length)
    return float(matches / guessed * brevity)


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


COMBINE = {"bleu1": _bleu1_of_counts}
"""Corpus metric -> its value from the summed counts of its images."""

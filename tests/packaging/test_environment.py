"""What `make caption` and `make test` say where something is missing: one line, at once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/environment.sh"
VENV = """\
  "-m venv") mkdir -p "$3/bin"; printf '#!/bin/sh\\n%s\\n' "{pip}" > "$3/bin/python"; chmod +x "$3/bin/python";;"""


def make(python: Path | str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", SCRIPT, python, folder, "seconds", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def stand_in(folder: Path, *cases: str) -> Path:
    """A program that answers as a Python would: `cases` of sh, by its first two arguments."""
    program = folder / "python"
    program.write_text("\n".join(["#!/bin/sh", 'case "$1 $2" in', *cases, "esac"]) + "\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("cases", "said"),
    [
        (['  "-c import sys"*) exit 1;;', '  "-V "*) echo Python 3.9.2;;'], "Python 3.9.2 is too old: install Python"),
        (['  "-c import ensurepip"*) exit 1;;'], "has no venv module: install it (Debian and Ubuntu: apt install"),
        (
            [VENV.format(pip="echo NewConnectionError: Temporary failure in name resolution; exit 1")],
            "no package index can be reached: connect to a network",
        ),
        (
            [VENV.format(pip="echo WARNING: a wall; echo ERROR: no space left; exit 1")],
            "cannot be made: ERROR: no space left: the whole log is",
        ),
    ],
)
def test_what_is_missing_is_one_line(cases, said, tmp_path):
    done = make(stand_in(tmp_path, *cases), tmp_path / "build/venv", "numpy")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_no_python_at_all_is_one_line(tmp_path):
    for python in ("", tmp_path / "nowhere"):
        done = make(python, tmp_path / "venv")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert "there is no python3" in done.stderr


def test_pips_talk_goes_to_the_log_and_another_torch_is_told(tmp_path):
    answer = "echo WARNING: a wall; case $* in *+cpu*) echo ERROR: No matching distribution found; exit 1;; esac"
    python = stand_in(tmp_path, VENV.format(pip=answer.replace("$*", r"\$*")))
    done = make(python, tmp_path / "venv", "--torch", "torch==9+cpu", "torch==9", "numpy")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "no torch==9+cpu in your package index: installing its default build torch==9 instead" in done.stdout
    assert "WARNING" not in done.stdout
    assert "WARNING: a wall" in (tmp_path / "venv.log").read_text()

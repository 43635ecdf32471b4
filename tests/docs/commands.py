"""Parse, check and run the commands that the documentation shows."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
from click.testing import CliRunner

from benchmarks.figures import ROOT
from tests.docs.pages import Block, words_of

SHELL = re.compile(r"[|&;<>$`(]|^\. |^\w+=")
"""Syntax that needs a shell."""
SMALL = {"train sweep": "--examples 2 --max-new-tokens 5", "export.parity": "--beams 1,3"}
"""Options that are appended to a command, because with the options of the page it would take too long in a test."""


def command_of(words: list[str]) -> tuple[click.Command, list[str], str] | None:
    """Return the command that a line calls, its arguments and its name, or None if the project has no such command."""
    if words[0] == "engine":
        module, rest = "engine.cli.app", words[1:]
    elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("export", "train", "benchmarks"):
        package = importlib.util.find_spec(words[2])
        assert package is not None, f"there is no module {words[2]}"
        module, rest = words[2] + (".__main__" if package.submodule_search_locations else ""), words[3:]
    else:
        return None
    command, name = importlib.import_module(module).main, module.removesuffix(".__main__").replace("engine.cli.app", "")
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}".strip(), rest[1:]
    return command, rest, name


def check_options(line: str) -> None:
    """Assert that the command or make target of a line exists and accepts its options."""
    words = words_of(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets, f"there is no {line}"
    elif found := command_of(words):
        command, rest, name = found
        command.make_context(name, list(rest))  # raises UsageError


def run_block(block: Block, folder: Path) -> None:
    """Run a shell block in a folder, line by line: commands of this project in this process, all others with bash."""
    for line in block.lines:
        words = words_of(line)
        if words[0] == "make":
            check_options(line)
        elif SHELL.search(line) or (found := command_of(words)) is None:
            _run_by_shell(line, folder)
        else:
            command, rest, name = found
            done = CliRunner().invoke(command, [*rest, *shlex.split(SMALL.get(name, ""))], catch_exceptions=False)
            assert done.exit_code == 0, f"{block}: {line}\n{done.output}"


def _run_by_shell(line: str, folder: Path) -> None:
    programs = folder / ".programs"
    if not programs.exists():
        programs.mkdir()
        start = f"#!{sys.executable}\nfrom engine.cli.app import main\nmain(prog_name='engine')\n"
        for name, text in (("engine", start), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"

"""Run many programs like `python -m`, each in a fork of one process, and list the files that each one writes.

    python tests/helpers/entry_points.py < JOBS      # JSON: [[module, argument, ...], ...]

The working directory, HOME and TMPDIR are compared before and after every program. An audit hook records the files that
Python opens for writing elsewhere. Prints a JSON list of {code, errors, files, opened}. torch is imported once, before
the forks, because it takes most of the time. onnxruntime is not, because the tests also check what its import writes.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

WATCHED = ("HOME", "TMPDIR")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ERROR_BYTES = 2000
PRELOADED = ("torch", "transformers.models.blip.modeling_blip", "transformers.models.blip.processing_blip")


def listing() -> dict[str, tuple[int, int]]:
    """Return {path: (size, modification time)} of all files in the watched folders and the working directory."""
    states = {}
    for folder in (*map(os.environ.__getitem__, WATCHED), "."):
        for path in Path(folder).resolve().rglob("*"):
            status = path.lstat()
            states[str(path)] = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return states


def report_writes(descriptor: int) -> None:
    """Write a line to `descriptor` for every file that Python opens for writing and every folder that it creates."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event == "os.mkdir" or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        if is_write and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 (links are not resolved)
            os.write(descriptor, path.encode("utf-8", "backslashreplace") + b"\n")

    sys.addaudithook(hook)


def become(job: list[str]) -> NoReturn:
    """Run a program and exit like it would, without the second that unloading torch takes."""
    sys.argv, code = list(job), 0
    try:
        runpy.run_module(job[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def run(job: list[str]) -> dict[str, Any]:
    """Run one program in a fork and return its result. In the fork this function does not return."""
    before = listing()
    with tempfile.TemporaryFile(dir="/dev/shm") as errors, tempfile.TemporaryFile(dir="/dev/shm") as opened:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            nothing = os.open(os.devnull, os.O_RDWR)
            for source, target in ((nothing, 0), (nothing, 1), (errors.fileno(), 2)):
                os.dup2(source, target)
            report_writes(os.dup(opened.fileno()))
            become(job)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        opened.seek(0)
        files = [path for path, state in listing().items() if before.get(path) != state]
        stderr = errors.read()[-ERROR_BYTES:].decode(errors="replace")
        return {"code": code, "errors": stderr, "files": files, "opened": opened.read().decode().splitlines()}


if __name__ == "__main__":
    for module in PRELOADED:
        importlib.import_module(module)
    jobs, results = json.load(sys.stdin), []
    for each in jobs:
        results.append(run(each))  # noqa: PERF401 (the fork exits inside run)
    print(json.dumps(results))

"""Ctrl-C and SIGTERM end a command within a second, whatever native code is running."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from engine.backends.providers import import_onnxruntime
from engine.cli.shared import OneLine
from engine.cli.signals import INTERRUPTED, TERMINATED, Terminated
from tests.helpers.processes import is_running

PROGRAM = """
import ctypes, os, signal, subprocess, sys, threading, time
import click
from engine.cli.shared import OneLine

class Stuck:
    lock = threading.Lock()
    def __del__(self):
        self.lock.acquire()

def swallow():
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass

def native():
    poll = ctypes.CDLL(None).poll
    while True:
        poll(None, 0, 60_000)

def thread():
    threading.Thread(target=time.sleep, args=(60,)).start()
    time.sleep(60)

def destructor():
    Stuck.lock.acquire()
    global stuck
    stuck = Stuck()
    time.sleep(60)

class Slow:
    def __del__(self):
        time.sleep(60)

def finalizer():
    Slow()
    time.sleep(60)

def forked():
    pid = os.fork()
    if not pid:
        time.sleep(60)
    for sent in (signal.SIGINT, signal.SIGTERM):
        time.sleep(0.2)
        os.kill(pid, sent)
    print(os.waitpid(pid, 0)[1], flush=True)
    time.sleep(1)

def child():
    subprocess.run(["sh", "-c", "trap '' INT TERM; sleep 60 & echo $!; wait"])

@click.command(cls=OneLine)
@click.argument("what")
def main(what):
    print("ready", flush=True)
    globals()[what]()

main()
"""


def start(arguments: list[str], **more) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )


def stop(process: subprocess.Popen[str], sent: signal.Signals) -> tuple[float, str]:
    """Send a signal; return the seconds until the process ended, and its output. A busy machine gets a second more."""
    began = time.monotonic()
    process.send_signal(sent)
    try:
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    return time.monotonic() - began, errors


@pytest.mark.parametrize("what", ["swallow", "native", "thread", "destructor", "finalizer", "child"])
def test_command_ends_whatever_it_waits_for(what):
    sent, expected = (signal.SIGTERM, TERMINATED) if what in ("native", "child") else (signal.SIGINT, INTERRUPTED)
    process = start([sys.executable, "-c", PROGRAM, what])
    assert process.stdout.readline() == "ready\n"
    below = int(process.stdout.readline()) if what == "child" else None
    time.sleep(0.2)
    seconds, errors = stop(process, sent)
    assert process.returncode == expected, errors
    assert "error: stopped" in errors
    assert "Traceback" not in errors
    assert seconds < 2
    if below is not None:
        for _ in range(50):
            if not is_running(below):
                break
            time.sleep(0.05)
        assert not is_running(below)


@pytest.mark.parametrize(("signal_error", "exit_code"), [(KeyboardInterrupt, INTERRUPTED), (Terminated, TERMINATED)])
@pytest.mark.parametrize("is_caught", [True, False])
def test_signal_during_an_import(signal_error, exit_code, is_caught, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text(
        "from engine.cli.signals import Terminated\n"
        f"raise ImportError('initialization failed') from {signal_error.__name__}()\n"  # as pybind11 does
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)

    @click.command(cls=OneLine)
    def command() -> None:
        import_onnxruntime("cpu") if is_caught else importlib.import_module("onnxruntime")

    done = CliRunner().invoke(command)
    assert (done.exit_code, done.stderr) == (exit_code, "error: stopped\n")


def test_signal_to_a_forked_child_stops_only_the_child():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "forked"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ready\n{int(signal.SIGTERM)}\n", "")


@pytest.mark.parametrize("wait_s", [0.6, 2.0, 4.0])
def test_interrupted_score_leaves_no_process(wait_s, tmp_path):
    (tmp_path / "run.csv").write_text('ID,Caption\na,"chest x-ray with a mass"\nb,"axial ct"\n')
    command = ["-m", "engine", "score", "--run", "run.csv", "--references", "run.csv", "--metrics", "meteor"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = start(
        [sys.executable, *command, "--out", "s.json"], cwd=tmp_path, env=environment, start_new_session=True
    )
    time.sleep(wait_s)
    seconds, errors = stop(process, signal.SIGINT)
    assert process.returncode in (INTERRUPTED, -signal.SIGINT), errors  # the second: Python itself had not begun
    assert seconds < 2
    time.sleep(0.2)
    left = [path for path in Path("/proc").glob("[0-9]*/stat") if session_of(path) == process.pid]
    assert not left


def session_of(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError):
        return -1

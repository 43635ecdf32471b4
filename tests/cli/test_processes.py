"""Runs with worker processes on this machine give the run.csv of a single process, whatever dies, and leave nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from engine import captioner
from engine.cli.app import main
from engine.errors import UsageError
from engine.run import pipeline
from engine.run.record import RunRecord
from engine.workers import processes
from tests.cli.test_resume import command, wait_for_records
from tests.helpers.cores import two_cores
from tests.helpers.processes import children, is_running
from tests.helpers.tiny import save_pictures

pytestmark = two_cores
IMAGES = 120
TWO = ("--threads", "2", "--processes", "2")
SLOW = ("--rows", "3")
"""One image at a time: long enough to be disturbed."""


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_pictures(tmp_path_factory.mktemp("processes") / "images", IMAGES, name="image_{:03}.png")
    (directory / "twin.png").write_bytes((directory / "image_007.png").read_bytes())
    return directory


@pytest.fixture(scope="module")
def undisturbed(image_dir, tiny_bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    result = caption(image_dir, tiny_bundle, folder / "run.csv", *n_best(folder))
    assert result.exit_code == 0, result.output
    return folder


def n_best(folder: Path) -> list[str]:
    return ["--n-best", "2", "--n-best-out", str(folder / "run.jsonl")]


def caption(image_dir: Path, bundle: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(main, command(image_dir, bundle, out, *more)[3:], catch_exceptions=False)


def without_scores(path: Path) -> list[tuple]:
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["id"], *((one["ids"], one["text"]) for one in line["hypotheses"])) for line in lines]


def scores(path: Path) -> list[float]:
    return [one["score"] for line in path.read_text().splitlines() for one in json.loads(line)["hypotheses"]]


@pytest.fixture
def started(monkeypatch) -> list[processes.Child]:
    """The worker processes, as they are started."""
    found: list[processes.Child] = []

    class Noted(processes.Child):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            found.append(self)

    monkeypatch.setattr(processes, "Child", Noted)
    return found


def worker_that(preparation: str) -> str:
    """Return a program for worker processes that does something first."""
    return processes.PROGRAM.replace("from engine", f"{preparation}; from engine")


def test_two_processes_give_the_same_run(image_dir, tiny_bundle, tmp_path, undisturbed, started):
    result = caption(image_dir, tiny_bundle, tmp_path / "run.csv", *TWO, *n_best(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert "2 worker processes with 2 threads in all" in result.stderr
    assert (tmp_path / "run.csv").read_bytes() == (undisturbed / "run.csv").read_bytes()
    assert without_scores(tmp_path / "run.jsonl") == without_scores(undisturbed / "run.jsonl")
    np.testing.assert_allclose(scores(tmp_path / "run.jsonl"), scores(undisturbed / "run.jsonl"), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.csv", "run.jsonl"]
    assert len(started) == 2
    assert not any(is_running(one.pid) for one in started)


def test_unreadable_and_clipped_images_are_reported(image_dir, tiny_bundle, tmp_path, undisturbed):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in image_dir.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "zz_broken.png").write_bytes(b"no picture")
    refused = caption(folder, tiny_bundle, tmp_path / "run.csv", *TWO)
    assert refused.exit_code == 1
    assert f"unreadable: {folder}/zz_broken.png: not an image, or damaged" in refused.stderr
    assert "1 of 122 images cannot be read and no run was written" in refused.stderr
    alone = caption(folder, tiny_bundle, tmp_path / "run.csv", "--allow-missing")
    assert "121 captions of an earlier run are taken from" in alone.stderr
    assert (tmp_path / "run.csv").read_bytes() == (undisturbed / "run.csv").read_bytes() + b'zz_broken,""\n'
    (folder / "zz_broken.png").unlink()
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(folder / "deep.png")
    Image.new("RGBA", (40, 40)).save(folder / "clear.png")
    clipped = caption(folder, tiny_bundle, tmp_path / "run.csv", *TWO)
    assert "1 image has more than 8 bits per channel" in clipped.stderr
    assert f"1 image has transparency, which is dropped, as in transformers 4.57: {folder}/clear.png" in clipped.stderr


def test_images_of_killed_workers_are_retried(image_dir, tiny_bundle, tmp_path, undisturbed, started, monkeypatch):
    add = RunRecord.add
    bound: list[set[int]] = []
    killed: set[int] = set()

    def add_and_kill(record: RunRecord, made) -> None:
        add(record, made)
        if len(record.captions) in (10, 30, 60):
            bound.extend(os.sched_getaffinity(one.pid) for one in started[:2] if len(bound) < 2)
            # one that asked for images: a worker that is still loading holds none that could be done again
            victim = next(one.pid for one in reversed(started) if one.wants and one.pid not in killed)
            killed.add(victim)
            os.kill(victim, signal.SIGKILL)

    monkeypatch.setattr(RunRecord, "add", add_and_kill)
    result = caption(image_dir, tiny_bundle, tmp_path / "run.csv", *TWO, *SLOW)
    assert result.exit_code == 0, result.stderr
    assert len(started) == 5
    assert result.stderr.count("died (SIGKILL)") == 3
    assert "images are retried" in result.stderr
    assert not bound[0] & bound[1], "the workers have cores of their own"
    assert (tmp_path / "run.csv").read_bytes() == (undisturbed / "run.csv").read_bytes()
    assert not any(is_running(one.pid) for one in started)


@pytest.mark.parametrize("workers", [(), TWO])
def test_options_are_resolved_once_per_prompt(image_dir, tiny_bundle, tmp_path, monkeypatch, workers):
    """Resolving takes a quarter of a millisecond, and a run may have a prompt for each of its 17,000 images."""
    asked: list[str] = []
    search_for = captioner.search_for

    def counted(bundle, tokenizer, options):
        asked.append(options.prompt)
        return search_for(bundle, tokenizer, options)

    monkeypatch.setattr(captioner, "search_for", counted)
    prompts = tmp_path / "prompts.csv"
    rows = [f"{path.stem},{('a', 'ct of')[i % 2]}" for i, path in enumerate(sorted(image_dir.iterdir()))]
    prompts.write_text("\n".join(["ID,prompt", *rows]) + "\n")
    result = caption(image_dir, tiny_bundle, tmp_path / "run.csv", "--prompts", str(prompts), *workers)
    assert result.exit_code == 0, result.stderr
    assert sorted(asked) == ["a", "ct of"]


POISON = (
    "import os, engine.captioner as c; read = c.read_image; "
    "c.read_image = lambda what, *more, **named: os.kill(os.getpid(), 9) if 'poison' in str(what) "
    "else read(what, *more, **named)"
)


def test_image_that_kills_its_workers_is_unreadable(
    image_dir, tiny_bundle, tmp_path, undisturbed, started, monkeypatch
):
    monkeypatch.setattr(processes, "PROGRAM", worker_that(POISON))
    folder = tmp_path / "images"
    folder.mkdir()
    for path in image_dir.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "zz_poison.png").symlink_to(image_dir / "image_000.png")
    result = caption(folder, tiny_bundle, tmp_path / "run.csv", *TWO, "--allow-missing")
    assert result.exit_code == 0, result.stderr
    assert f"unreadable: {folder}/zz_poison.png: its worker process died each time" in result.stderr
    assert 3 <= len(started) <= 4, "it kills two workers, and the second is not missed where it was the last image"
    assert (tmp_path / "run.csv").read_bytes() == (undisturbed / "run.csv").read_bytes() + b'zz_poison,""\n'


@pytest.mark.parametrize(
    ("preparation", "exit_code", "said", "starts"),
    [
        (
            "import os; os._exit(3)",
            1,
            "no worker process is left, the last one died 5 times in a row (exit code 3)",
            10,
        ),
        (
            "import engine.captioner as s; s.open_backends = lambda *_, **__: s.missing",
            1,
            "error: a worker process failed: AttributeError: module 'engine.captioner' has no attribute 'missing'",
            2,
        ),
        (
            "import engine.errors as e, engine.captioner as s; "
            "s.open_backends = lambda *_, **__: (_ for _ in ()).throw(e.UsageError('of no use'))",
            2,
            "error: of no use",
            2,
        ),
    ],
)
def test_errors_in_workers_end_the_run_in_one_line(
    image_dir, tiny_bundle, tmp_path, started, monkeypatch, preparation, exit_code, said, starts
):
    monkeypatch.setattr(processes, "PROGRAM", worker_that(preparation))
    result = caption(image_dir, tiny_bundle, tmp_path / "run.csv", *TWO)
    assert result.exit_code == exit_code
    assert said in result.stderr.splitlines()[-1]
    assert len(started) == starts
    assert list(tmp_path.iterdir()) == []
    assert not any(is_running(one.pid) for one in started)


@pytest.mark.parametrize(
    ("sent", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_stopped_run_leaves_no_process_and_resumes_alone(
    image_dir, tiny_bundle, tmp_path, undisturbed, sent, exit_code
):
    out, journal = tmp_path / "run.csv", tmp_path / "run.csv.journal"
    process = subprocess.Popen(
        command(image_dir, tiny_bundle, out, *TWO, *SLOW),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_records(journal, 5, process)
    below = children(process.pid)
    workers = [pid for pid in below if pid != process.pid]
    assert len(workers) == 2
    began = time.monotonic()
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does it: all that were started along get it, too
    else:
        process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == exit_code, errors
    assert "Traceback" not in errors
    while any(map(is_running, below)):
        assert time.monotonic() - began < 3, "a worker process lives on"
        time.sleep(0.02)
    again = caption(image_dir, tiny_bundle, out)
    assert "captions of an earlier run are taken from" in again.stderr
    assert out.read_bytes() == (undisturbed / "run.csv").read_bytes()


def test_each_worker_sees_only_its_gpu(image_dir, tiny_bundle, tmp_path, undisturbed, monkeypatch):
    """Without a GPU the workers run on the CPU; only their environment is tested."""
    monkeypatch.setattr(pipeline, "resolve_runtime", lambda runtime: runtime)
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["5", "GPU-3f"])
    host_backend = (
        f"import os, pathlib; pathlib.Path({str(tmp_path)!r}, 'saw ' + os.environ['CUDA_VISIBLE_DEVICES']).touch(); "
        "import engine.captioner as s; from engine.backends.ort import OrtBackend; "
        "s.open_backends = lambda bundle, runtime, **_: [OrtBackend(bundle, threads=runtime.threads)]"
    )
    monkeypatch.setattr(processes, "PROGRAM", worker_that(host_backend))
    result = caption(image_dir, tiny_bundle, tmp_path / "run.csv", "--devices", "cuda:1,cuda:0")
    assert result.exit_code == 0, result.stderr
    assert "backend: cuda\n2 worker processes on cuda:1, cuda:0\n" in result.stderr
    assert "|backend:cuda|" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.csv", "saw 5", "saw GPU-3f"]
    assert (tmp_path / "run.csv").read_bytes() == (undisturbed / "run.csv").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--processes", "2", "--threads", "1"], "2 processes need at least as many threads, not 1: lower --processes"),
        (["--processes", "2", "--threads", "2", "--streams", "2"], "2 streams need at least as many threads, not 1"),
        (["--processes", "2", "--ray"], "--ray starts its workers on the cluster"),
        (["--devices", "gpu"], "--devices expects GPUs such as cuda:0,cuda:1, not 'gpu'"),
        (["--devices", "cuda:0,cuda:0"], "lists a GPU twice"),
        (["--devices", "cuda:0", "--backend", "cpu"], "which the backend cpu does not use"),
        ([*TWO, "--beams", "2", "--n-best", "3", "--n-best-out", "build/n.jsonl"], "need at least as many beams"),
    ],
)
def test_impossible_options_give_one_error_line(image_dir, tiny_bundle, tmp_path, started, options, said):
    arguments = ["caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "run.csv", *options]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == UsageError.exit_code
    assert said in result.stderr.splitlines()[-1]
    assert not started


def test_workers_import_from_this_process_path(image_dir, tiny_bundle, tmp_path, undisturbed):
    """Packages are imported from this process's path, which may differ from that of a new Python process."""
    root = Path(__file__).parents[2]
    program = f"import sys; sys.path.insert(0, {str(root)!r}); from engine.cli.app import main; main()"
    arguments = [sys.executable, "-c", program, *command(image_dir, tiny_bundle, tmp_path / "run.csv", *TWO)[3:]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run.csv").read_bytes() == (undisturbed / "run.csv").read_bytes()

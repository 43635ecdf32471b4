"""Runs on a local cluster of two workers give the run.csv of a single process, whatever dies."""

from __future__ import annotations

import builtins
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from engine import captioner
from engine.cli.app import main
from engine.errors import EngineError
from engine.run.journal import read_journal
from engine.workers import cluster as ray_cluster
from engine.workers.cluster import LOCAL, _connect, cluster
from engine.workers.worker import CaptionWorker
from tests.cli.test_resume import command, wait_for_records
from tests.helpers.cores import two_cores
from tests.helpers.processes import children, is_running
from tests.helpers.tiny import save_pictures

pytestmark = two_cores

ray = pytest.importorskip("ray", reason="ray is not installed: it comes with the extra [ray]")

IMAGES = 160
SLOW = ("--rows", "3")
"""One image at a time: long enough to be disturbed."""


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_pictures(tmp_path_factory.mktemp("ray") / "images", IMAGES, name="image_{:03}.png")
    (directory / "twin.png").write_bytes((directory / "image_007.png").read_bytes())
    return directory


@pytest.fixture(scope="module")
def undisturbed(image_dir, tiny_bundle, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "run.csv"
    subprocess.run(command(image_dir, tiny_bundle, out), check=True, capture_output=True)
    return out.read_bytes()


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    """A local cluster that the runs of these tests share: starting one takes seconds.

    Its proxies do not respond, as in a hospital's network: nothing may connect to them.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://192.0.2.1:3128")
        with cluster(LOCAL):
            yield


def caption(image_dir: Path | str, bundle: Path | str, out: Path, *more: str) -> Result:
    arguments = command(image_dir, bundle, out, "--ray", "--ray-actors", "2", *more)[3:]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def found_by_content(ids: list[str]) -> int:
    """Return how many images have one of these captions: two have the same bytes."""
    twins = {"image_007", "twin"}
    return len(set(ids) | twins) if twins & set(ids) else len(ids)


def actors(kind: bytes = b"CaptionWorker") -> list[int]:
    return [pid for pid, line in children(os.getpid()).items() if line.startswith(b"ray::") and kind in line]


@pytest.mark.usefixtures("two_cores")
def test_two_workers_give_the_same_run(image_dir, tiny_bundle, tmp_path, undisturbed):
    timings = tmp_path / "timings.csv"
    result = caption(image_dir, tiny_bundle, tmp_path / "run.csv", "--timings-out", str(timings))
    assert result.exit_code == 0, result.stderr
    assert "backend: cpu, 2 workers with 1 CPU" in result.stderr
    assert (tmp_path / "run.csv").read_bytes() == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.csv", "timings.csv"]
    latencies = [float(line.split(",")[1]) for line in timings.read_text().splitlines()[1:]]
    assert len(latencies) == IMAGES + 1
    assert all(0 <= latency < 60 for latency in latencies)
    assert max(latencies) > 0


@pytest.mark.usefixtures("two_cores")
def test_uris_of_images_and_bundle_and_an_unreadable_image(image_dir, tiny_bundle, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for path in image_dir.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "zz_broken.png").write_bytes(b"no picture")
    out = tmp_path / "run.csv"
    refused = caption(folder.as_uri(), tiny_bundle.as_uri(), out)
    assert refused.exit_code == 1
    assert f"unreadable: {folder.as_uri()}/zz_broken.png: not an image, or damaged" in refused.stderr
    assert "1 of 162 images cannot be read and no run was written" in refused.stderr
    assert not out.exists()
    alone = command(folder.as_uri(), tiny_bundle.as_uri(), out, "--allow-missing")[3:]
    allowed = CliRunner().invoke(main, alone)
    assert allowed.exit_code == 0, allowed.stderr
    assert "161 captions of an earlier run are taken from" in allowed.stderr
    assert out.read_bytes() == undisturbed + b'zz_broken,""\n'
    digests = [path.name for path in (tmp_path / "cache/blip-caption-engine/bundles").iterdir() if path.is_dir()]
    assert len(digests) == 1


def records(journal: Path) -> int:
    try:
        return journal.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@pytest.mark.usefixtures("two_cores")
def test_killed_workers_run_is_byte_identical(image_dir, tiny_bundle, tmp_path, undisturbed):
    out, journal = tmp_path / "run.csv", tmp_path / "run.csv.journal"
    killed: list[int] = []
    ended = threading.Event()
    chance = random.Random(0)

    def kill() -> None:
        target = 0
        while len(killed) < 4 and not ended.is_set():
            time.sleep(0.01)
            alive = [pid for pid in actors() if pid not in killed]
            if alive and records(journal) > target:
                killed.append(chance.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)
                target = records(journal) + chance.randint(0, 20)

    killer = threading.Thread(target=kill)
    killer.start()
    result = caption(image_dir, tiny_bundle, out, *SLOW)
    ended.set()
    killer.join()
    assert result.exit_code == 0, result.stderr
    assert len(killed) == 4
    assert len(re.findall(r"^warning: Ray worker [01] died \(ActorDiedError\)", result.stderr, re.M)) == 4
    assert "retried" in result.stderr
    assert out.read_bytes() == undisturbed
    assert not actors()


@pytest.mark.usefixtures("two_cores")
def test_image_that_kills_its_workers_is_unreadable(image_dir, tiny_bundle, tmp_path, undisturbed, monkeypatch):
    class CaptionWorkerThatDies(CaptionWorker):  # pickled by value, because it is local
        def answers(self) -> Iterator[str]:
            read = captioner.read_image

            def read_or_die(what, *more, **named):
                if "poison" in str(what):
                    os.kill(os.getpid(), signal.SIGKILL)
                return read(what, *more, **named)

            captioner.read_image = read_or_die
            yield from super().answers()

    monkeypatch.setattr(ray_cluster, "CaptionWorker", CaptionWorkerThatDies)
    folder = tmp_path / "images"
    folder.mkdir()
    for path in image_dir.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "zz_poison.png").symlink_to(image_dir / "image_000.png")
    result = caption(folder, tiny_bundle, tmp_path / "run.csv", "--allow-missing")
    assert result.exit_code == 0, result.stderr
    assert f"unreadable: {folder}/zz_poison.png: its Ray worker died each time (ActorDiedError)" in result.stderr
    assert (tmp_path / "run.csv").read_bytes() == undisturbed + b'zz_poison,""\n'


@pytest.mark.usefixtures("two_cores")
def test_run_resumes_on_a_running_cluster(image_dir, tiny_bundle, tmp_path, undisturbed):
    out, journal = tmp_path / "run.csv", tmp_path / "run.csv.journal"
    process = subprocess.Popen(command(image_dir, tiny_bundle, out, *SLOW), stderr=subprocess.PIPE)
    wait_for_records(journal, 20, process)
    process.kill()
    process.communicate()
    kept = found_by_content([record["id"] for record in read_journal(journal)[1]])
    assert kept >= 20
    address = ray.get_runtime_context().gcs_address
    joining = command(image_dir, tiny_bundle, out, *SLOW, "--ray", address, "--ray-actors", "2")
    result = subprocess.run(joining, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"{kept} captions of an earlier run are taken from" in result.stderr
    assert not re.findall(r".*(?:\.py|\.cc):\d+.*", result.stderr), "Ray's own talk is heard"
    assert out.read_bytes() == undisturbed


@pytest.mark.usefixtures("two_cores")
def test_workers_update_the_run_of_one_process(image_dir, tiny_bundle, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    paths = sorted(image_dir.iterdir())[:24]
    for path in paths[:16]:
        shutil.copy(path, folders[0])
    out, more = tmp_path / "run.csv", ("--input", str(folders[1] / "*.png"), "--update")
    shutil.copy(paths[16], folders[1])
    alone = command(folders[0], tiny_bundle, out, *more)[3:]
    assert CliRunner().invoke(main, alone).exit_code == 0
    for path in paths[17:]:
        shutil.copy(path, folders[1])
    result = caption(folders[0], tiny_bundle, out, *more)
    assert result.exit_code == 0, result.stderr
    assert "17 captions of an earlier run are taken from" in result.stderr
    assert "7 of 24 images to caption" in result.stderr
    scratch = command(folders[0], tiny_bundle, tmp_path / "scratch.csv", *more[:2])[3:]
    assert CliRunner().invoke(main, scratch).exit_code == 0
    assert out.read_bytes() == (tmp_path / "scratch.csv").read_bytes()


def test_run_stopped_by_ctrl_c_resumes_without_ray(image_dir, tiny_bundle, tmp_path, undisturbed):
    out, journal = tmp_path / "run.csv", tmp_path / "run.csv.journal"
    process = subprocess.Popen(
        command(image_dir, tiny_bundle, out, *SLOW, "--ray", "--ray-actors", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_records(journal, 10, process)
    below = children(process.pid)
    folders = {line.partition(b"--temp_dir=")[2].partition(b"\0")[0] for line in below.values()} - {b""}
    assert len(folders) == 1
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: all that were started along get it, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "the same command resumes from there" in errors
    assert not out.exists()
    patience = time.monotonic() + 30  # workers end by themselves once the cluster's head is gone
    while living := [line for pid, line in below.items() if is_running(pid)]:
        assert time.monotonic() < patience, f"a part of the cluster lives on: {living}"
        time.sleep(0.2)
    assert not Path(os.fsdecode(folders.pop())).exists()
    ids = [record["id"] for record in read_journal(journal)[1]]
    assert 10 <= len(ids) == len(set(ids))
    again = subprocess.run(command(image_dir, tiny_bundle, out, *SLOW), check=True, capture_output=True, text=True)
    assert f"{found_by_content(ids)} captions of an earlier run are taken from" in again.stderr
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), EngineError("the cluster failed")])
def test_connection_is_not_shut_down_after_an_error(monkeypatch, error, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    closed: list[bool] = []
    fake = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **_: None,
        shutdown=lambda: closed.append(True),
        exceptions=ray.exceptions,
    )
    monkeypatch.setattr(ray_cluster, "require_ray", lambda: fake)
    with contextlib.suppress(type(error) if error else ()), cluster(LOCAL):
        if error:
            raise error
    assert closed == ([] if error else [True])


def test_local_cluster_leaves_no_process_and_no_file(monkeypatch, tmp_path):
    """Processes of Ray are stopped even if its shutdown misses one, others are not; files and token are private."""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("earlier")
    token.chmod(0o644)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for name, value in (("PATIENCE_S", 0.2), ("_folders", []), ("_processes", {})):
        monkeypatch.setattr(ray_cluster, name, value)
    started: list[subprocess.Popen] = []
    folders: list[Path] = []

    def init(_temp_dir: str, **_: object) -> None:
        folders.append(Path(_temp_dir))
        (folders[0] / "log").write_text("")
        started.append(subprocess.Popen(["bash", "-c", "exec -a ray::IDLE sleep 60"]))
        wait_until(lambda: b"ray::IDLE" in Path(f"/proc/{started[0].pid}/cmdline").read_bytes())

    fake = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None, exceptions=ray.exceptions)
    monkeypatch.setattr(ray_cluster, "require_ray", lambda: fake)
    with subprocess.Popen(["sleep", "60"]) as other:
        with cluster(LOCAL):
            assert (folders[0] / "log").stat().st_mode & 0o777 == 0o600
            assert token.stat().st_mode & 0o777 == 0o600
            assert is_running(started[0].pid)
        assert started[0].wait(10) == -signal.SIGKILL
        assert is_running(other.pid)
        other.kill()
    assert not folders[0].exists()


def wait_until(holds: Callable[[], bool]) -> None:
    patience = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < patience
        time.sleep(0.01)


def test_missing_ray_names_the_extra(image_dir, tiny_bundle, tmp_path, monkeypatch):
    imported = builtins.__import__

    def without_ray(name, *arguments, **named):
        if name.partition(".")[0] == "ray":
            raise ImportError(f"No module named {name!r}", name=name)
        return imported(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    result = caption(image_dir, tiny_bundle, tmp_path / "run.csv")
    assert result.exit_code == 1
    assert result.stderr == "error: --ray needs the package ray (No module named 'ray'): pip install 'ray>=2.60'\n"


def test_cluster_that_requires_a_token_is_reported():
    class AuthenticationError(Exception):
        pass

    def refuse(**_):
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from AuthenticationError("missing")

    fake = SimpleNamespace(init=refuse, exceptions=SimpleNamespace(RayError=RuntimeError))
    with pytest.raises(EngineError, match=r"10.0.0.1:6379 requires a token: set RAY_AUTH_MODE=token, .*ray/auth_token"):
        _connect(fake, "10.0.0.1:6379")


@pytest.mark.parametrize(
    ("options", "exit_code", "said"),
    [
        (["--ray", "127.0.0.1:1"], 1, "no Ray cluster responds at 127.0.0.1:1: Connection refused"),
        (["--ray", "nowhere"], 2, "--ray expects HOST:PORT"),
        (["--ray-actors", "2"], 2, "add --ray, or remove --ray-actors"),
        (["--ray", "--backend", "gpu"], 2, "unknown backend 'gpu'"),
        (["--ray", "--backend", "cpu", "--cuda-graphs"], 2, "are for the backend trt, not for cpu"),
        (
            ["--ray", "--beams", "2", "--n-best", "3", "--n-best-out", "build/n.jsonl"],
            2,
            "need at least as many beams",
        ),
    ],
)
def test_impossible_options_give_one_error_line(image_dir, tmp_path, options, exit_code, said):
    arguments = [sys.executable, "-m", "engine", "caption", "--input", image_dir, "--out", tmp_path / "run.csv"]
    run = subprocess.run([*arguments, *options], capture_output=True, text=True, check=False)
    assert run.returncode == exit_code
    assert run.stderr.count("\n") == 1
    assert said in run.stderr

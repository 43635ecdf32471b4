"""Runs that are killed, stopped or refused, as a user meets them: real processes, real signals."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engine.backends.ort import OrtBackend
from engine.captions import Caption
from engine.cli.app import main
from engine.errors import OutOfMemoryError
from engine.run.journal import read_journal
from engine.run.record import RunRecord
from tests.helpers.tiny import random_pictures

IMAGES = 120


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume") / "images"
    directory.mkdir()
    for i, picture in enumerate(random_pictures(IMAGES)):
        picture.save(directory / f"image_{i:03d}.png")
    return directory


def command(image_dir: Path, bundle: Path, out: Path, *more: str) -> list[str]:
    arguments = ["caption", "--input", image_dir, "--bundle", bundle, "--beams", 3, "--rows", 12, "--threads", 1]
    return [sys.executable, "-m", "engine", *map(str, [*arguments, "--out", out]), *more]


def start(*arguments) -> subprocess.Popen[str]:
    """Start a run that can be interrupted: a shell lets its background jobs, perhaps these tests, ignore Ctrl-C."""
    return subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_records(journal: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has journaled `count` captions, or has ended."""
    while process.poll() is None:
        try:
            if journal.read_bytes().count(b"\n") > count:
                return
        except FileNotFoundError:  # not begun yet, or just ended
            pass
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(image_dir, tiny_bundle, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "run.csv"
    subprocess.run(command(image_dir, tiny_bundle, out), check=True, capture_output=True)
    return out.read_bytes()


def test_repeatedly_killed_run_is_byte_identical(image_dir, tiny_bundle, tmp_path, undisturbed):
    out, journal = tmp_path / "run.csv", tmp_path / "run.csv.journal"
    chance = random.Random(0)
    kept, kills = 0, 0
    for _ in range(40):
        process = start(image_dir, tiny_bundle, out)
        wait_for_records(journal, kept + chance.randint(0, 20), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
        kills += 1
        records = read_journal(journal)[1] if journal.exists() else []
        ids = [record["id"] for record in records]
        assert len(ids) == len(set(ids)), "a caption is there twice"
        assert len(ids) >= kept, "a caption was lost"
        kept = len(ids)
    else:
        subprocess.run(command(image_dir, tiny_bundle, out), check=True, capture_output=True)
    assert kills >= 3
    assert out.read_bytes() == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "run.csv.lock") == ["run.csv"]


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_reports_how_to_resume(image_dir, tiny_bundle, tmp_path, undisturbed, sent, exit_code):
    out = tmp_path / "run.csv"
    for _ in range(20):  # a run takes a tenth of a second: on a busy machine it may end before it is stopped
        out.unlink(missing_ok=True)
        process = start(image_dir, tiny_bundle, out)
        wait_for_records(tmp_path / "run.csv.journal", 3, process)
        process.send_signal(sent)
        _, errors = process.communicate()
        if process.returncode != 0:
            break
    assert process.returncode == exit_code, errors
    assert "the same command resumes from there" in errors
    assert "Traceback" not in errors
    assert not out.exists()
    assert not (tmp_path / "run.csv.lock").exists()
    again = subprocess.run(command(image_dir, tiny_bundle, out), check=True, capture_output=True, text=True)
    assert "captions of an earlier run are taken from" in again.stderr
    assert out.read_bytes() == undisturbed


def test_resume_without_a_broken_image_in_a_moved_folder(image_dir, tiny_bundle, tmp_path):
    """As on a cluster: one image is broken, and each job copies the images to another disk."""
    out, first, second = tmp_path / "run.csv", tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for path in sorted(image_dir.iterdir())[:12]:
        shutil.copy(path, first)
    (first / "image_003.png").write_bytes(b"broken")

    def run(folder: Path, *more: str) -> Result:
        return CliRunner().invoke(main, command(folder, tiny_bundle, out, "--json", *more)[3:])

    failed = run(first)
    assert failed.exit_code == 1
    assert "fix, replace or delete them and run the same command again, which keeps the other captions" in failed.stderr
    (first / "image_003.png").unlink()
    shutil.copytree(first, second)
    shutil.rmtree(first)
    done = run(second)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["resumed"] == 11
    written = out.read_bytes()
    assert run(second, "--no-resume").exit_code == 0
    assert out.read_bytes() == written


@pytest.mark.parametrize("workers", [(), ("--processes", "1")])
def test_a_bundle_overwritten_in_place_ends_the_run(image_dir, tiny_bundle, tmp_path, monkeypatch, workers):
    bundle, out = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")), tmp_path / "run.csv"
    add = RunRecord.add
    kept: list[str] = []

    def overwrite_then_add(record: RunRecord, caption: Caption) -> None:
        if len(kept) == 5:
            (bundle / "golden.npz").write_bytes((bundle / "golden.npz").read_bytes() + b"new")
        add(record, caption)
        kept.append(caption.id)

    monkeypatch.setattr(RunRecord, "add", overwrite_then_add)
    result = CliRunner().invoke(main, command(image_dir, bundle, out, *workers)[3:])
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert f"{bundle / 'golden.npz'} was overwritten during the run" in last
    assert not out.exists()
    assert [record["id"] for record in read_journal(tmp_path / "run.csv.journal")[1]] == kept[:5]


def test_two_concurrent_runs_on_one_output(image_dir, tiny_bundle, tmp_path, undisturbed):
    out = tmp_path / "run.csv"
    first = start(image_dir, tiny_bundle, out)
    wait_for_records(tmp_path / "run.csv.journal", 1, first)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.run(command(image_dir, tiny_bundle, out), capture_output=True, text=True, check=False)
    first.send_signal(signal.SIGCONT)
    first.communicate()
    assert second.returncode == 2
    assert f"is being written by process {first.pid}" in second.stderr
    assert first.returncode == 0
    assert out.read_bytes() == undisturbed


def test_other_options_restart_and_keep_the_old_journal(image_dir, tiny_bundle, tmp_path, undisturbed):
    out = tmp_path / "run.csv"
    process = start(image_dir, tiny_bundle, out, "--max-new-tokens", "9")
    wait_for_records(tmp_path / "run.csv.journal", 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = subprocess.run(command(image_dir, tiny_bundle, out), check=True, capture_output=True, text=True)
    assert "was moved to" in again.stderr
    assert (tmp_path / "run.csv.journal.old").exists()
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize("error", [OutOfMemoryError("bad_alloc"), MemoryError()])
def test_out_of_memory_continues_with_fewer_images(image_dir, tiny_bundle, tmp_path, undisturbed, monkeypatch, error):
    step = OrtBackend.step

    def tight(backend, cache, inputs):
        if len(inputs.scores) > 2:
            raise error
        return step(backend, cache, inputs)

    monkeypatch.setattr(OrtBackend, "step", tight)
    (tmp_path / "images").symlink_to(image_dir)
    arguments = command(tmp_path / "images", tiny_bundle, tmp_path / "run.csv", "--rows", "24")[3:]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "memory is short with 8 images in parallel: continuing with 4" in result.stderr
    assert "memory is short with 4 images in parallel: continuing with 2" in result.stderr
    assert (tmp_path / "run.csv").read_bytes() == undisturbed


@pytest.mark.parametrize(("error", "reason"), [(OutOfMemoryError("bad_alloc"), " (bad_alloc)"), (MemoryError(), "")])
def test_out_of_memory_for_a_single_image(image_dir, tiny_bundle, tmp_path, monkeypatch, error, reason):
    monkeypatch.setattr(OrtBackend, "step", lambda *_: (_ for _ in ()).throw(error))
    result = CliRunner().invoke(main, command(image_dir, tiny_bundle, tmp_path / "run.csv")[3:])
    assert result.exit_code == 1
    said = f"error: there is not enough memory for one image at a time{reason}: close other programs"
    assert result.stderr.splitlines()[-1].startswith(said)
    assert list(tmp_path.iterdir()) == []

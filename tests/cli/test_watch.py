"""`--watch`: a folder that grows is captioned image by image, and what is left at the end is a whole run.csv."""

from __future__ import annotations

import csv
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.cli.app import main
from engine.host import descendants
from engine.inputs.images import find_images
from engine.run.journal import read_journal
from engine.run.watch import SETTLE_S, SettledImages
from tests.helpers.cores import two_cores
from tests.helpers.tiny import random_pictures

PICTURES = random_pictures(8)
FIRST = 3


def bmp(number: int) -> bytes:
    stream = io.BytesIO()
    PICTURES[number].save(stream, "BMP")
    return stream.getvalue()


class Clock:
    """A clock that only `sleep` moves; `events` {seconds: function} happen on the way."""

    def __init__(self, events=None):
        self.now, self.events = 0.0, events or {}

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for due in [at for at in self.events if at <= self.now]:
            self.events.pop(due)()


def test_file_that_grows_settles_once(tmp_path):
    path, whole = tmp_path / "a.bmp", bmp(0)

    def grow(share):
        return lambda: path.write_bytes(whole[: int(share * len(whole))])

    (tmp_path / "b.bmp").write_bytes(bmp(1))
    # a pause that is shorter than SETTLE_S does not count as the end
    clock = Clock({1.0: grow(0.2), 2.5: grow(0.5), 4.0: grow(0.8), 5.0: grow(1), 30.0: path.unlink})
    folder = SettledImages(lambda: find_images(tmp_path).images, clock, clock.sleep)
    found = [([image.id for image in folder.wait()], clock.now) for _ in range(3)]
    assert [names for names, _ in found] == [["b"], ["a", "b"], ["b"]]
    assert 5.0 + SETTLE_S <= found[1][1] < 5.0 + SETTLE_S + 1.1


def test_slow_look_is_followed_by_a_longer_pause(tmp_path):
    (tmp_path / "a.bmp").write_bytes(bmp(0))
    clock, looks = Clock(), []

    def find():
        looks.append(clock.now)
        clock.now += 1.0  # as a folder of a hundred thousand images takes
        return find_images(tmp_path).images

    SettledImages(find, clock, clock.sleep).wait()
    assert len(looks) == 2
    assert looks[1] >= 20


class Watch:
    """A running `engine caption --watch`."""

    def __init__(self, folder: Path, bundle: Path, out: Path, *more: str) -> None:
        words = ["--watch", "--input", folder, "--bundle", bundle, "--beams", 2, "--threads", 2, "--out", out, *more]
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine", "caption", *map(str, words)],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for(self, ids: set[str]) -> dict[str, str]:
        """Wait until run.csv has exactly these ids; return its captions."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.out.exists() and set(found := read(self.out)) == ids:
                return found
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"{self.out.exists() and read(self.out)}: {self.process.communicate()[1]}")

    def stop(self, sent: signal.Signals = signal.SIGINT) -> str:
        self.process.send_signal(sent)
        _, errors = self.process.communicate(timeout=20)
        assert self.process.returncode == 128 + sent, errors
        assert "Traceback" not in errors
        assert "error:" not in errors
        return errors


def read(path: Path) -> dict[str, str]:
    header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
    assert header == ["ID", "Caption"]
    return dict(rows)


def test_growing_folder(tmp_path, tiny_bundle):
    folder, out = tmp_path / "images", tmp_path / "run.csv"
    folder.mkdir()
    watch = Watch(folder, tiny_bundle, out, "--sidecar")
    (folder / "notes.md").touch()
    for number in range(FIRST):
        (folder / f"{number}.bmp").write_bytes(bmp(number))
    watch.wait_for({"0", "1", "2"})
    half = len(bmp(3)) // 2
    with (folder / "3.bmp").open("wb") as slow:
        slow.write(bmp(3)[:half])
        slow.flush()
        (folder / "broken.bmp").write_bytes(bmp(4)[:half])
        time.sleep(SETTLE_S / 2)
        slow.write(bmp(3)[half:])
    (folder / "0.bmp").unlink()
    watch.wait_for({"1", "2", "3"})
    (folder / "broken.bmp").write_bytes(bmp(4))
    watch.wait_for({"1", "2", "3", "broken"})
    captions = read(out)
    errors = watch.stop()
    assert errors.count("unreadable: ") == 1, "it is read again only when it has changed"
    assert errors.count("skipped in ") == errors.count(": 1 .md") == 1
    assert {path.stem: path.read_text().strip() for path in folder.glob("[1-9b]*.txt")} == captions
    assert "3.bmp" not in errors
    records = read_journal(out.with_name("run.csv.update.journal"))[1]
    assert sorted(record["id"] for record in records) == ["0", "1", "2", "3", "broken"], "each was captioned once"

    (folder / "4.bmp").write_bytes(bmp(5))
    again = Watch(folder, tiny_bundle, out)
    again.wait_for({"1", "2", "3", "broken", "4"})
    assert "4 captions of an earlier run are taken from" in again.stop(signal.SIGTERM)
    assert out.read_bytes() == from_scratch(folder, tiny_bundle, tmp_path / "scratch.csv")


def from_scratch(folder: Path, bundle: Path, out: Path) -> bytes:
    words = ["caption", "--input", folder, "--bundle", bundle, "--beams", 2, "--threads", 2, "--out", out]
    assert CliRunner().invoke(main, [str(word) for word in words]).exit_code == 0
    return out.read_bytes()


@two_cores
def test_processes_wait_for_more_images(tmp_path, tiny_bundle):
    folder, out = tmp_path / "images", tmp_path / "run.csv"
    folder.mkdir()
    (folder / "0.bmp").write_bytes(bmp(0))
    watch = Watch(folder, tiny_bundle, out, "--processes", "2")
    watch.wait_for({"0"})
    workers = descendants(watch.process.pid)
    assert len(workers) == 2
    for number in range(1, 5):
        (folder / f"{number}.bmp").write_bytes(bmp(number))
    watch.wait_for({"0", "1", "2", "3", "4"})
    assert descendants(watch.process.pid) == workers, "they are not started again"
    watch.stop()
    assert out.read_bytes() == from_scratch(folder, tiny_bundle, tmp_path / "scratch.csv")


def test_interrupt_in_the_middle_leaves_the_finished_captions(tmp_path, tiny_bundle):
    folder, out = tmp_path / "images", tmp_path / "run.csv"
    for number, picture in enumerate(random_pictures(300)):
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{number:03}.bmp")
    journal = out.with_name("run.csv.update.journal")
    watch = Watch(folder, tiny_bundle, out, "--rows", "4")
    while watch.process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
        time.sleep(0.005)
    assert not out.exists(), "the first round is not over"
    watch.stop()
    records = read_journal(journal)[1]
    assert 20 <= len(records) < 300
    assert list(read(out)) == sorted(record["id"] for record in records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run.csv", "run.csv.update.journal"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--manifest", "ids.csv"], "--manifest"),
        (["--prompts", "prompts.csv"], "--prompts"),
        (["--shard", "1/2"], "--shard"),
        (["--ray"], "--ray"),
        (["--json"], "--json"),
        (["--input", "."], "one --input"),
    ],
)
def test_option_that_does_not_work_with_watch(tmp_path, tiny_bundle, more, named):
    words = ["caption", "--watch", "--input", tmp_path, "--bundle", tiny_bundle, "--out", tmp_path / "x.csv", *more]
    refused = CliRunner().invoke(main, [str(word) for word in words])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: --watch")
    assert named in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(("place", "out"), [("a.txt", "run.csv"), ("nowhere", "run.csv"), (".", "-")])
def test_watch_needs_a_folder_and_a_file(tmp_path, tiny_bundle, place, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("b.png\n")
    refused = CliRunner().invoke(
        main, ["caption", "--watch", "--input", place, "--bundle", str(tiny_bundle), "--out", out]
    )
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: --watch")

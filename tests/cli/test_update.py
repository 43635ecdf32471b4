"""`--update`: a folder that has grown, shrunk or changed is captioned again only where it did, and run.csv is that of a
run from scratch, whatever was killed in between.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engine.cli.app import main
from engine.run.journal import Journal, read_journal
from tests.cli.test_resume import command, start, wait_for_records
from tests.helpers.tiny import random_pictures

PICTURES = random_pictures(140)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        PICTURES[i].save(folder / f"{i:02d}.bmp")
    return folder


@dataclass
class Runs:
    """Runs with `--update` into one file, and what one from scratch writes."""

    folder: Path
    bundle: Path
    work: Path
    out: Path

    def update(self, *more: str) -> tuple[Result, int]:
        """Return the result and how many pictures were captioned."""
        result = self.call(self.out, "--update", *more)
        assert result.exit_code == 0, result.output
        summary = json.loads(result.stdout.splitlines()[-1])
        return result, summary["captions"] - summary["resumed"]

    def call(self, out: Path, *more: str) -> Result:
        return CliRunner().invoke(main, command(self.folder, self.bundle, out, "--json", *more)[3:])

    def assert_as_from_scratch(self, *more: str) -> None:
        scratch = self.work / "scratch.csv"
        assert self.call(scratch, *more).exit_code == 0
        assert self.out.read_bytes() == scratch.read_bytes()


@pytest.fixture
def runs(images: Path, tiny_bundle: Path, tmp_path: Path) -> Runs:
    return Runs(images, tiny_bundle, tmp_path, tmp_path / "run.csv")


def test_only_new_and_changed_images_are_captioned(runs, images):
    assert runs.update()[1] == 12
    assert runs.update()[1] == 0
    PICTURES[20].save(images / "20.bmp")
    (images / "03.bmp").unlink()
    PICTURES[21].save(images / "05.bmp")
    result, new = runs.update()
    assert new == 2
    assert "10 captions of an earlier run are taken from" in result.stderr
    assert "2 of 12 images to caption" in result.stderr
    runs.assert_as_from_scratch()
    for path in images.iterdir():
        os.utime(path)
    (images / "07.bmp").rename(images / "renamed.bmp")
    shutil.copy(images / "08.bmp", images / "copied.bmp")
    assert runs.update()[1] == 0, "the bytes are known"
    runs.assert_as_from_scratch()


def test_other_bytes_of_the_same_size_and_time_are_noticed(runs, images):
    runs.update()
    path = images / "04.bmp"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[60:2000] = bytes(1940)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert runs.update()[1] == 1
    runs.assert_as_from_scratch()


def test_moved_folder_keeps_its_captions(runs, images, tiny_bundle):
    runs.update()
    shutil.copytree(images, runs.work / "elsewhere")
    moved = Runs(runs.work / "elsewhere", tiny_bundle, runs.work, runs.out)
    assert moved.update()[1] == 0
    moved.assert_as_from_scratch()


@pytest.mark.parametrize("setting", [("--no-repeat-ngram", "2"), ("--dicom-frame", "1"), ("--no-resume",)])
def test_changed_setting_restarts_with_a_note(runs, setting):
    runs.update()
    result, new = runs.update(*setting)
    assert new == 12
    (line,) = [line for line in result.stderr.splitlines() if "starting over" in line]
    assert f"was moved to {runs.out}.update.journal.old" in line
    runs.assert_as_from_scratch(*setting)


def test_update_with_n_best_and_manifest(runs, images, tmp_path):
    more = ("--n-best", "3", "--recursive", "--ids", "path", "--manifest", str(tmp_path / "ids.txt"))
    (tmp_path / "ids.txt").write_text("07\n02\n04\n")
    assert runs.update(*more, "--n-best-out", str(tmp_path / "a.jsonl"))[1] == 3
    (tmp_path / "ids.txt").write_text("04\n07\n09\ndeep/22\n")
    (images / "deep").mkdir()
    PICTURES[22].save(images / "deep/22.bmp")
    assert runs.update(*more, "--n-best-out", str(tmp_path / "a.jsonl"))[1] == 2
    runs.assert_as_from_scratch(*more, "--n-best-out", str(tmp_path / "b.jsonl"))
    updated, scratch = (read_hypotheses(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    assert [words for words, _ in updated] == [words for words, _ in scratch]
    # matrix products round by the shape of the batch, so a score's last digits depend on the other images in it
    assert [score for _, score in updated] == pytest.approx([score for _, score in scratch], abs=1e-5)


def read_hypotheses(path: Path) -> list[tuple[tuple, float]]:
    return [
        ((record["id"], one["text"], one["raw_text"], one["ids"]), one["score"])
        for record in map(json.loads, path.read_text().splitlines())
        for one in record["hypotheses"]
    ]


def test_run_without_update_leaves_its_journal_alone(runs):
    runs.update()
    assert json.loads(runs.call(runs.out).stdout.splitlines()[-1])["resumed"] == 0
    assert runs.update()[1] == 0


def test_unreadable_image_is_tried_again(runs, images):
    (images / "bad.bmp").write_bytes(b"no picture")
    assert runs.call(runs.out, "--update").exit_code == 1
    assert not runs.out.exists()
    assert runs.update("--allow-missing")[1] == 0
    PICTURES[30].save(images / "bad.bmp")
    assert runs.update()[1] == 1
    runs.assert_as_from_scratch()


@pytest.mark.parametrize("moment", ["before run.csv", "before the journal"])
def test_stopped_while_writing_keeps_all_captions(runs, images, monkeypatch, moment):
    def stop(*_):
        raise KeyboardInterrupt

    runs.update()
    PICTURES[20].save(images / "20.bmp")
    if moment == "before run.csv":
        monkeypatch.setattr("engine.run.record.write_run", stop)
    else:
        monkeypatch.setattr(Journal, "replace", stop)
    assert runs.call(runs.out, "--update").exit_code == 130
    monkeypatch.undo()
    assert runs.update()[1] == 0
    runs.assert_as_from_scratch()


def test_repeatedly_killed_while_the_folder_changes(runs, images, tiny_bundle):
    for i in range(100):
        PICTURES[i].save(images / f"{i:02d}.bmp")
    journal = runs.out.with_name("run.csv.update.journal")
    chance, kills, kept = random.Random(0), 0, 0
    for turn in range(8):
        process = start(images, tiny_bundle, runs.out, "--update")
        wait_for_records(journal, kept + chance.randint(1, 15), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode != 0
        found = read_journal(journal)[1]
        assert len(found) >= kept, "a caption was lost"
        kept = len(found)
        PICTURES[100 + turn].save(images / f"{3 * turn:02d}.bmp")
        PICTURES[110 + turn].save(images / f"new {turn}.bmp")
        (images / f"{90 + turn}.bmp").unlink()
    assert kills >= 3
    still_right = {json.dumps(record["file"]) for record in found if Path(record["place"]).exists()}
    right = {
        json.dumps([s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]) for s in (p.stat() for p in images.iterdir())
    }
    assert runs.update()[1] == 100 - len(still_right & right)
    runs.assert_as_from_scratch()
    records = read_journal(journal)[1]
    assert [record["id"] for record in records] == sorted(path.stem for path in images.iterdir())

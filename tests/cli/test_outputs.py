"""Sidecars next to images and captions on standard output: streams, pipes, and kills at any moment."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engine import captioner
from engine.cli.app import main
from engine.files import atomic
from engine.inputs.tables import read_table
from engine.run import record
from tests.cli.test_resume import command as plain_command
from tests.cli.test_resume import wait_for_records
from tests.helpers.tiny import random_pictures

IMAGES = 80


def command(folder: Path, bundle: Path, out: object, *more: str) -> list[str]:
    """Return a command line whose captions all have words."""
    return plain_command(folder, bundle, out, "--min-new-tokens", "4", *more)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "pictures"
    folder.mkdir()
    for i, picture in enumerate(random_pictures(IMAGES)):
        picture.save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def captions(pictures, tiny_bundle, tmp_path_factory) -> dict[str, str]:
    """The captions of a plain run."""
    out = tmp_path_factory.mktemp("plain") / "run.csv"
    assert CliRunner().invoke(main, command(pictures, tiny_bundle, out)[3:]).exit_code == 0
    return read_table(out).single()


@pytest.fixture
def images(pictures, tmp_path) -> Path:
    """A separate folder with the first images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(pictures.iterdir())[:8]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def run(images, tiny_bundle, tmp_path):
    def call(*more: object, out: object = tmp_path / "run.csv") -> Result:
        return CliRunner().invoke(main, command(images, tiny_bundle, out, *map(str, more))[3:])

    return call


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def some(captions: dict[str, str], count: int = 8) -> dict[str, str]:
    return dict(list(captions.items())[:count])


def test_rows_are_flushed_as_they_are_written(images, tiny_bundle, monkeypatch):
    written = []

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            written.append(bytes(data))
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Raw(), 1 << 20)))
    main(command(images, tiny_bundle, "-", "--rows", "3")[3:], standalone_mode=False)
    assert len(written) > 2
    assert b"".join(written).count(b"\n") == 9


def test_stdout_has_the_content_of_the_file(run, tmp_path):
    assert run().exit_code == 0
    streamed = run(out="-")
    assert streamed.exit_code == 0
    assert streamed.stdout_bytes == (tmp_path / "run.csv").read_bytes()
    assert "8 captions in" in streamed.stderr
    assert "-> standard output" in streamed.stderr
    assert run("--jsonl", out=tmp_path / "run.jsonl").exit_code == 0
    assert run("--jsonl", out="-").stdout_bytes == (tmp_path / "run.jsonl").read_bytes()
    assert read_table(tmp_path / "run.jsonl").single() == read_table(tmp_path / "run.csv").single()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run.csv", "run.jsonl"]


def test_json_lines_have_file_and_error(run, images, captions):
    (images / "000a.png").write_bytes(b"no picture")
    (images / "zz\udcff.png").write_bytes((images / "001.png").read_bytes())
    for allowed in (False, True):
        result = run("--jsonl", *["--allow-missing"] * allowed, out="-")
        assert result.exit_code == (0 if allowed else 1)
        first, bad, *_, last = map(json.loads, result.stdout_bytes.splitlines())
        assert first == {"id": "000", "file": str(images / "000.png"), "caption": captions["000"]}
        assert bad.pop("error") == "not an image, or damaged"
        assert bad == {"id": "000a", "file": str(images / "000a.png")} | ({"caption": ""} if allowed else {})
        assert last == {"id": "zz\udcff", "file": str(images / "zz\udcff.png"), "caption": captions["001"]}
    assert "error: 1 of 10 images cannot be read: fix or delete them" in run(out="-").stderr
    assert '000a,""\n' not in run(out="-").stdout
    assert '000a,""\n' in run("--allow-missing", out="-").stdout


def test_only_captions_go_to_standard_output(run, images, tmp_path):
    refused = [
        run("--json", out="-"),
        run("--update", out="-"),
        run("--beams", "60", out="-"),
        run("--sidecar-dir", tmp_path / "x"),
        run("--prefix", "a\nb"),
        run("--sidecar", "replace"),
    ]
    assert [(result.exit_code, result.stdout) for result in refused] == [(2, "")] * 6
    assert all(result.stderr.splitlines()[-1].startswith("error: ") for result in refused)
    for path in images.iterdir():
        path.write_bytes(b"")
    failed = run("--allow-missing", out="-")
    assert (failed.exit_code, failed.stderr.splitlines()[-1]) == (1, "error: not one image could be read")


def test_stream_is_in_order_whichever_finishes_first(run, images, monkeypatch):
    """Each line is written before the next caption is requested; an early one waits for those before it."""
    made = captioner.caption_within_memory
    said: list[tuple[str, int]] = []

    def out_of_order(*arguments, **named):
        for caption in sorted(made(*arguments, **named), key=lambda one: (one.id != "002", one.id)):
            yield caption
            said.append((caption.id, sys.stdout.buffer.getvalue().count(b"\n")))

    monkeypatch.setattr("engine.run.pipeline.caption_within_memory", out_of_order)
    (images / "001.png").write_bytes(b"")
    result = run("--allow-missing", out="-")
    assert result.exit_code == 0, result.stderr
    assert said[:4] == [("002", 0), ("000", 4), ("003", 5), ("004", 6)]
    assert [line[:3] for line in result.stdout.splitlines()[1:]] == [f"{i:03d}" for i in range(8)]


def test_closed_pipe_ends_the_run_silently(pictures, tiny_bundle):
    reader, writer = os.pipe()
    with subprocess.Popen(command(pictures, tiny_bundle, "-"), stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        os.close(reader)
        errors = process.stderr.read().decode()
    assert process.returncode == 141
    assert not [line for line in errors.splitlines() if "error" in line.lower() or "Traceback" in line], errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_the_stream_is_one_line(pictures, tiny_bundle):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(pictures, tiny_bundle, "-"), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: No space left on device: standard output"


def test_prefix_and_suffix_are_only_in_the_output(run, images, captions, tmp_path):
    (images / "bad.png").write_bytes(b"")
    more = ("--allow-missing", "--n-best", "1", "--n-best-out", tmp_path / "n.jsonl")
    around = ("--prefix", "photo of ", "--suffix", ', "x"')
    assert run(*more[1:], *around).exit_code == 1, "the captions are in the journal now"
    result = run(*more, "--sidecar", "--prefix", "art: ")
    assert "8 captions of an earlier run are taken from" in result.stderr, "a prefix changes no caption"
    assert read_table(tmp_path / "run.csv").single() == {
        **{name: f"art: {text}" for name, text in some(captions).items()},
        "bad": "",
    }
    best = [json.loads(line)["hypotheses"][0]["text"] for line in (tmp_path / "n.jsonl").read_text().splitlines()]
    assert best == list(some(captions).values())
    assert texts(images) == {name: f"art: {text}\n" for name, text in some(captions).items()}
    result = run("--allow-missing", *around, "--jsonl", out="-")
    lines = map(json.loads, result.stdout.splitlines())
    assert {line["caption"] for line in lines if line["id"] == "000"} == {f'photo of {captions["000"]}, "x"'}


def test_an_empty_caption_stays_empty(images, tiny_bundle, tmp_path):
    out = tmp_path / "run.csv"
    arguments = plain_command(images, tiny_bundle, out, "--prefix", "art: ", "--sidecar", "append")[3:]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    said = read_table(out).single()
    assert "" in said.values(), "the tiny model has lost its empty caption: find another picture"
    assert all(text.startswith("art: ") for text in said.values() if text)
    assert texts(images) == {name: text and f"{text}\n" for name, text in said.items()}


def test_sidecars_of_all_modes(run, images, captions):
    (images / "000.txt").write_text("kept\n")
    first = run("--sidecar")
    assert first.exit_code == 0, first.output
    assert "sidecars: 7 written, 1 unchanged" in first.stderr
    assert texts(images) == {name: f"{text}\n" for name, text in some(captions).items()} | {"000": "kept\n"}
    assert run("--sidecar", "overwrite").exit_code == 0
    assert texts(images) == {name: f"{text}\n" for name, text in some(captions).items()}
    for path in images.glob("*.txt"):
        path.write_text("t1, t2")
    for _ in range(2):
        assert run("--sidecar", "append", "--prefix", ", ").exit_code == 0
    assert texts(images) == {name: f"t1, t2, {text}\n" for name, text in some(captions).items()}
    for _ in range(2):
        assert run("--sidecar", "prepend", "--suffix", " | ").exit_code == 0
    assert texts(images) == {name: f"{text} | t1, t2, {text}\n" for name, text in some(captions).items()}


def test_failed_images_and_runs_write_no_sidecar(run, images, tmp_path):
    (images / "bad.png").write_bytes(b"")
    assert run("--sidecar").exit_code == 1
    assert texts(images) == {}
    assert run("--sidecar", "--allow-missing", "--sidecar-dir", tmp_path / "texts").exit_code == 0
    assert sorted(texts(tmp_path / "texts")) == [f"{i:03d}" for i in range(8)]
    assert texts(images) == {}


def test_sidecars_of_an_update_follow_the_pictures(run, images, pictures, captions):
    assert run("--sidecar", "overwrite", "--update").exit_code == 0
    shutil.copy(pictures / "020.png", images / "003.png")
    result = run("--sidecar", "overwrite", "--update")
    assert "sidecars: 1 written, 7 unchanged" in result.stderr
    assert texts(images)["003"] == f"{captions['020']}\n"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--out", "{images}/003.txt"), "sidecar {images}/003.txt would overwrite --out"),
        (("--n-best-out", "{images}/003.txt"), "would overwrite --n-best-out"),
        (("--input", "{images}/003.txt"), "named twice|would overwrite the input"),
        (("--sidecar-dir", "{images}/no/where"), "no does not exist, create it first"),
        (("--sidecar-dir", "{images}/003.png"), "003.png is not a writable folder"),
    ],
)
def test_sidecars_that_would_overwrite_files_are_refused(run, images, tmp_path, more, sentence):
    if more[0] == "--input":
        (images / "003.txt").write_text(str(tmp_path / "other.png"))
        random_pictures(1)[0].save(tmp_path / "other.png")
    result = run("--sidecar", "overwrite", *(part.format(images=images) for part in more))
    assert result.exit_code == 2, result.output
    assert any(one in result.stderr for one in sentence.format(images=images).split("|"))
    assert not (tmp_path / "run.csv").exists()


def test_stopped_between_sidecars_resumes_with_the_others(run, images, captions, monkeypatch):
    for i in range(8):
        (images / f"{i:03d}.txt").write_text("tag")
    replaced = atomic.replace_file
    left = iter(range(3))

    def stop_later(path, content, **more):
        if path.suffix == ".txt" and next(left, None) is None:
            raise KeyboardInterrupt
        replaced(path, content, **more)

    monkeypatch.setattr("engine.run.outputs.replace_file", stop_later)
    result = run("--sidecar", "append")
    assert result.exit_code == 130
    assert "8 captions are kept in" in result.stderr
    assert set(texts(images).values()) > {"tag"}
    monkeypatch.undo()
    assert run("--sidecar", "append").exit_code == 0
    assert texts(images) == {name: f"tag {text}\n" for name, text in some(captions).items()}


def test_repeatedly_killed_sidecars_have_captions_once(pictures, tiny_bundle, tmp_path, captions):
    folder = Path(shutil.copytree(pictures, tmp_path / "images"))
    for i in range(0, IMAGES, 2):
        (folder / f"{i:03d}.txt").write_text("tag\n")
    expected = {name: f"tag {text}\n" if int(name) % 2 == 0 else f"{text}\n" for name, text in captions.items()}
    out, chance, kills = tmp_path / "run.csv", random.Random(1), 0
    whole = {name: {"tag\n", text} if int(name) % 2 == 0 else {text} for name, text in expected.items()}
    for turn in range(30):
        process = subprocess.Popen(
            command(folder, tiny_bundle, out, "--sidecar", "append"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if turn < 2:
            wait_for_records(tmp_path / "run.csv.journal", 30 * turn + chance.randint(1, 20), process)
        else:
            wait_for_sidecars(folder, chance.randint(1, 25), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert all(text in whole[name] for name, text in texts(folder).items()), "a sidecar is neither old nor new"
        kills += process.returncode != 0
        if out.exists():  # it is written last: the run had ended, or was about to
            break
    else:
        subprocess.run(command(folder, tiny_bundle, out, "--sidecar", "append"), check=True, capture_output=True)
    assert kills >= 3
    assert texts(folder) == expected
    assert read_table(out).single() == captions
    assert not [path for path in folder.iterdir() if path.suffix not in (".png", ".txt")]


def wait_for_sidecars(folder: Path, more: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has written so many further sidecars, or has ended."""

    def written() -> int:
        return sum(path.stat().st_size > 4 for path in folder.glob("*.txt"))

    before = written()
    while process.poll() is None and written() < before + more:
        time.sleep(0.001)


def test_exit_code_of_a_broken_pipe(run, monkeypatch):
    def gone(_):
        raise record.ReaderGoneError

    monkeypatch.setattr(record.RowStream, "advance", gone)
    result = run(out="-")
    assert (result.exit_code, result.stdout) == (141, "")

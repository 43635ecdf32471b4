"""The command line as users type it, in a separate process if that matters."""

from __future__ import annotations

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from engine.bundle.manifest import Bundle
from engine.captions import Caption
from engine.cli.app import main
from engine.cli.shared import LinesType, LocationType, NameType, PathType, log
from engine.run.record import RunRecord
from export.__main__ import main as export
from export.parity import main as parity
from export.precision import main as precision
from export.restore import main as restore
from tests.helpers.datasets import extreme_png, imageless
from tests.helpers.tiny import random_pictures, save_pictures
from train.__main__ import main as train


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "images", 5, name="IMG {}.png")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def read_run(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_caption_writes_one_row_per_image_in_name_order(image_dir, tiny_bundle, tmp_path):
    out = tmp_path / "run.csv"
    result = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--beams", 3, "--out", out)
    assert result.exit_code == 0, result.output
    rows = read_run(out)
    assert rows[0] == ["ID", "Caption"]
    assert [row[0] for row in rows[1:]] == [f"IMG {i}" for i in range(5)]
    assert all(row[1] for row in rows[1:])


def test_json_summary_is_the_last_line(image_dir, tiny_bundle, tmp_path):
    result = run(
        "caption", "--input", image_dir, "--bundle", tiny_bundle, "--beams", 2, "--out", tmp_path / "r.csv", "--json"
    )
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["images"] == summary["captions"] == 5
    assert summary["left_aside"] == []
    for part in ("engine:", "bundle:", "precision:fp32", "backend:cpu", "num_beams:2", "pillow:"):
        assert part in summary["signature"]


def test_progress_lines_in_a_log(image_dir, tiny_bundle, tmp_path, monkeypatch):
    """Standard error of a batch job is a file: hours without a line look like a hang."""
    add = RunRecord.add

    def slowly(record: RunRecord, caption: Caption) -> None:
        time.sleep(0.2)
        add(record, caption)

    monkeypatch.setattr(RunRecord, "add", slowly)
    monkeypatch.setattr("engine.cli.caption.LOG_EVERY_S", 0.05)
    result = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "run.csv")
    assert result.exit_code == 0, result.stderr
    count = len(list(image_dir.iterdir()))
    lines = [line for line in result.stderr.splitlines() if line.startswith("captioning")]
    assert lines[0] == f"captioning {count} images"
    assert lines[1].startswith(f"captioning: 0 of {count} images")
    assert any(line.startswith(f"captioning: 1 of {count} images") for line in lines)


def test_skipped_files_are_counted_by_suffix_and_listed(image_dir, tiny_bundle, tmp_path):
    folder = Path(shutil.copytree(image_dir, tmp_path / "in"))
    (folder / "notes.txt").touch()
    (folder / "x.heic").touch()
    result = run("caption", "--input", folder, "--bundle", tiny_bundle, "--out", tmp_path / "r.csv", "--json")
    assert f"skipped in {folder}: 1 .heic, 1 .txt" in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["left_aside"] == ["notes.txt", "x.heic"]


def test_images_of_more_than_8_bits_are_reported(image_dir, tiny_bundle, tmp_path):
    folder = Path(shutil.copytree(image_dir, tmp_path / "in"))
    grey = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)
    Image.fromarray(grey).save(folder / "f.tif")
    Image.fromarray((grey * 4095).astype(np.uint16)).save(folder / "x.png")
    result = run("caption", "--input", folder, "--bundle", tiny_bundle, "--out", tmp_path / "r.csv")
    assert result.exit_code == 0
    assert "2 images have more than 8 bits per channel" in result.stderr
    assert "f.tif" in result.stderr
    again = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "r2.csv")
    assert "more than 8 bits" not in again.stderr
    scaled = run(
        *("caption", "--input", folder, "--bundle", tiny_bundle, "--out", tmp_path / "r3.csv"),
        *("--high-bit-depth", "scale", "--json"),
    )
    assert "more than 8 bits" not in scaled.stderr
    assert "|high_bit_depth:scale|" in json.loads(scaled.stdout.splitlines()[-1])["signature"]
    assert "high_bit_depth" not in result.stdout
    refused = run("caption", "--input", folder, "--out", tmp_path / "r4.csv", "--high-bit-depth", "9,1")
    assert refused.exit_code == 2


def test_n_best_lists_alternatives_best_first(image_dir, tiny_bundle, tmp_path):
    n_best = tmp_path / "run.jsonl"
    result = run(
        *("caption", "--input", image_dir, "--bundle", tiny_bundle, "--beams", 4, "--out", tmp_path / "run.csv"),
        *("--n-best", 3, "--n-best-out", n_best),
    )
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in n_best.read_text().splitlines()]
    captions = dict(read_run(tmp_path / "run.csv")[1:])
    for record in records:
        scores = [hypothesis["score"] for hypothesis in record["hypotheses"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
        assert captions[record["id"]] == record["hypotheses"][0]["text"]
        assert {hypothesis["ids"][0] for hypothesis in record["hypotheses"]} == {Bundle.load(tiny_bundle).tokens.bos}


def test_timings_give_the_latency_of_every_image(image_dir, tiny_bundle, tmp_path):
    (image_dir / "IMG 5.png").write_bytes(b"not an image")
    (image_dir / "IMG 6.png").write_bytes((image_dir / "IMG 0.png").read_bytes())
    out, timings = tmp_path / "run.csv", tmp_path / "timings.csv"
    start = time.perf_counter()
    result = run(
        *("caption", "--input", image_dir, "--bundle", tiny_bundle, "--beams", 2, "--out", out, "--allow-missing"),
        *("--timings-out", timings),
    )
    most = time.perf_counter() - start
    assert result.exit_code == 0, result.output
    header, *rows = read_run(timings)
    assert header == ["ID", "latency_s"]
    latencies = dict(rows)
    assert list(latencies) == [row[0] for row in read_run(out)[1:]]
    assert latencies.pop("IMG 5") == ""
    assert all(0 < float(latencies[f"IMG {i}"]) < most for i in range(5))
    assert 0 <= float(latencies["IMG 6"]) <= float(latencies["IMG 0"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_standard_output_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "engine", "info"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device: standard output\n")


def test_raw_text_is_not_detokenised(image_dir, tiny_bundle, tmp_path):
    arguments = ("caption", "--input", image_dir, "--bundle", tiny_bundle, "--beams", 2, "--n-best", 1)
    run(*arguments, "--out", tmp_path / "raw.csv", "--raw-text", "--n-best-out", tmp_path / "raw.jsonl")
    records = [json.loads(line) for line in (tmp_path / "raw.jsonl").read_text().splitlines()]
    raw = dict(read_run(tmp_path / "raw.csv")[1:])
    assert raw == {r["id"]: " ".join(r["hypotheses"][0]["raw_text"].split()) for r in records}


def test_manifest_selects_and_orders_images(image_dir, tiny_bundle, tmp_path):
    manifest = tmp_path / "ids.csv"
    manifest.write_text("ID\nIMG 3\nIMG 1\n")
    out = tmp_path / "run.csv"
    run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", out, "--manifest", manifest)
    assert [row[0] for row in read_run(out)[1:]] == ["IMG 3", "IMG 1"]


def test_captions_begin_with_their_prompts(image_dir, tiny_bundle, tmp_path):
    out = tmp_path / "run.csv"
    run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", out, "--prompt", "a chest x - ray")
    assert all(row[1].startswith("a chest x-ray") for row in read_run(out)[1:])


@pytest.mark.parametrize("per_image", [False, True])
def test_captions_are_written_without_their_prompts(image_dir, tiny_bundle, tmp_path, per_image):
    arguments = ["caption", "--input", image_dir, "--bundle", tiny_bundle]
    if per_image:
        (tmp_path / "prompts.csv").write_text("".join(["ID,prompt\n", *(f"IMG {i},a chest x-ray\n" for i in range(5))]))
        arguments += ["--prompts", tmp_path / "prompts.csv"]
    else:
        arguments += ["--prompt", "A chest X-ray"]
    assert run(*arguments, "--out", tmp_path / "whole.csv").exit_code == 0
    assert run(*arguments, "--out", tmp_path / "run.csv", "--without-prompt").exit_code == 0
    whole, rest = (dict(read_run(tmp_path / name)[1:]) for name in ("whole.csv", "run.csv"))
    assert any(rest.values())
    # words of the tiny model may continue the prompt's last word, so that no space follows it
    assert {name: text.removeprefix("a chest x-ray").strip() for name, text in whole.items()} == rest


def test_unreadable_images_are_all_listed_and_nothing_is_written(image_dir, tiny_bundle, tmp_path):
    (image_dir / "IMG 1.png").write_bytes(b"")
    (image_dir / "note.jpg").write_text("not an image")
    whole = (image_dir / "IMG 2.png").read_bytes()
    (image_dir / "IMG 2.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "run.csv"
    arguments = ("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", out)
    result = run(*arguments)
    assert result.exit_code == 1
    for name in ("IMG 1.png", "IMG 2.png", "note.jpg"):
        assert name in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "run.csv.journal"]
    assert run(*arguments, "--allow-missing").exit_code == 0
    captions = dict(read_run(out)[1:])
    assert [i for i, text in captions.items() if not text] == ["IMG 1", "IMG 2", "note"]


def test_folders_images_patterns_and_lists_in_one_run(image_dir, tiny_bundle, tmp_path):
    for name in ("more", "others"):
        (tmp_path / name).mkdir()
    for i, picture in enumerate(random_pictures(4, seed=1)):
        picture.save(tmp_path / ("others" if i < 2 else "more") / f"x{i}.png")
    (tmp_path / "list.txt").write_text("more/x3.png\n")
    inputs = (image_dir, tmp_path / "more/x2.png", tmp_path / "others/x*.png", tmp_path / "list.txt", "-")
    (tmp_path / "y.png").write_bytes((image_dir / "IMG 0.png").read_bytes())
    arguments = ["caption", "--bundle", tiny_bundle, "--out", tmp_path / "run.csv"]
    arguments += [part for one in inputs for part in ("--input", one)]
    result = CliRunner().invoke(main, list(map(str, arguments)), input=f"{tmp_path / 'y.png'}\n")
    assert result.exit_code == 0, result.output
    captions = dict(read_run(tmp_path / "run.csv")[1:])
    assert list(captions) == [*(f"IMG {i}" for i in range(5)), "x2", "x0", "x1", "x3", "y"]
    assert captions["y"] == captions["IMG 0"]
    (tmp_path / "link.csv").symlink_to("list.txt")
    for out in ("list.txt", "link.csv"):
        refused = run("caption", "--input", tmp_path / "list.txt", "--out", tmp_path / out)
        assert refused.exit_code == 2
        assert "would overwrite the input" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "sentence"),
    [
        (["--input", "{tmp}/nowhere"], 2, "nowhere does not exist: give a folder"),
        (["--input", "{tmp}/empty"], 2, "holds no images"),
        (["--input", "{tmp}/images/*.tif"], 2, "nothing matches"),
        (["--beams", "0"], 2, "--beams must be a whole number, at least 1, not 0"),
        (["--beams", "four"], 2, "--beams must be a whole number, at least 1, not 'four'"),
        (["--beams", ""], 2, "--beams must be a whole number, at least 1, not ''"),
        (["--top-p", "most"], 2, "--top-p must be a number, not 'most'"),
        (["--precision", "fp8"], 2, "--precision must be one of fp32, fp16, int8, bf16, not 'fp8'"),
        (["--progress"], 2, "--progress has no value: give one after it"),
        (["--colour", "red"], 2, "No such option"),
        (["--beams", "40"], 2, "40 beams are too many for a vocabulary"),
        (["--backend", "tpu"], 2, "unknown backend 'tpu'"),
        (["--rows", "some"], 2, "--rows must be auto or a whole number"),
        (["--out", "{tmp}/no/run.csv"], 2, "no does not exist, create it first"),
        (["--out", "{tmp}"], 2, "is a directory, a device or a pipe"),
        (["--out", "/dev/null"], 2, "is a directory, a device or a pipe"),
        (["--out", "{tmp}/images/IMG 1.png"], 2, "would overwrite the input"),
        (["--n-best-out", "{tmp}/run.csv"], 2, "would overwrite --out"),
        (["--timings-out", "{tmp}/run.csv.journal"], 2, "would overwrite --timings-out"),
        (["--out", "{tmp}/" + "x" * 300], 1, "File name too long"),
        (["--n-best", "2"], 2, "--n-best needs --n-best-out"),
        (["--temperature", "0.7", "--seed", "3"], 2, "temperature, seed: only for sampling: add --sample"),
        (["--n-best", "9", "--n-best-out", "{tmp}/n"], 2, "at least as many beams"),
        (["--max-new-tokens", "64"], 2, "set --max-new-tokens"),
        (["--beams", "4", "--length-penalty", "-6"], 2, "length_penalty must be a number of at least -5"),
        (["--min-new-tokens", "30"], 2, "change one of them"),
        (["--prompt", "a [SEP]"], 2, "special token"),
        (["--prompt", "a\udcff"], 2, "non-printable characters"),
        (["--manifest", "{tmp}/absent"], 2, "absent cannot be read: No such file"),
        (["--bundle", "{tmp}/nowhere"], 1, "is not a bundle"),
        (["--bundle", "{tmp}/empty"], 1, "has no manifest.json"),
        (["--bundle", "{bundle}/manifest.json"], 1, "manifest.json is a file: give its folder, {bundle}"),
        (["--bundle", "{tmp}/images/IMG 1.png"], 1, "IMG 1.png is a file: give the folder of a bundle"),
        (["--num_beams", "3"], 2, "No such option: --num_beams: did you mean --beams?"),
        (["--num-return-sequences", "3"], 2, "did you mean --n-best?"),
        (["--max-length", "3"], 2, "did you mean --max-new-tokens?"),
        (["--images", "{tmp}"], 2, "did you mean --input?"),
        (["--checkpoint", "{tmp}"], 2, "did you mean --model?"),
        (["--prefix", "a", "b.png"], 2, "unexpected extra argument (b.png): put quotes around a pattern"),
    ],
)
def test_wrong_inputs_give_one_error_line_and_no_output(
    arguments, exit_code, sentence, image_dir, tiny_bundle, tmp_path
):
    (tmp_path / "empty").mkdir()
    defaults = {"--input": image_dir, "--bundle": tiny_bundle, "--out": tmp_path / "run.csv"}
    places = {"tmp": tmp_path, "bundle": tiny_bundle}
    given = {name: value.format(**places) for name, value in zip(arguments[::2], arguments[1::2], strict=False)}
    more = arguments[-1:] if len(arguments) % 2 else []
    result = run("caption", *(part for pair in (defaults | given).items() for part in pair), *more)
    assert result.exit_code == exit_code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line != "backend: cpu"]
    assert line.startswith("error: ")
    assert sentence.replace("{bundle}", str(tiny_bundle)) in line
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "images"]


def path_options() -> list[tuple[click.Command, str, str]]:
    """Return (command, its name below that, option) of every option that is a path or names a checkpoint."""
    found = []
    for start in (main, train, export, parity, precision, restore):
        for name, command in getattr(start, "commands", {"": start}).items():
            kinds = (PathType, LocationType, LinesType, NameType)
            options = [one for one in command.params if isinstance(one, click.Option) and isinstance(one.type, kinds)]
            found += [(start, name, one.opts[0]) for one in options]
    return found


def test_an_empty_path_is_refused_by_every_option():
    """`--input "$FOLDER"` with FOLDER unset would mean the working directory."""
    assert len(path_options()) > 60
    for command, name, option in path_options():
        result = CliRunner().invoke(command, [*filter(None, [name]), option, ""])
        assert (result.exit_code, result.stdout) == (2, ""), (name, option)
        assert result.stderr == f"error: {option} is empty: give a path or a name (is a shell variable unset?)\n"


def test_control_and_bidi_characters_in_names_are_escaped(image_dir, tiny_bundle, tmp_path):
    (image_dir / "a\x1b]0;TITLE\x07\udcff\u202egnp.png").write_bytes(b"not an image")
    result = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "run.csv")
    assert "a\\x1b]0;TITLE\\x07\\udcff\\u202egnp.png" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()


def test_secrets_in_uris_are_not_printed(capsys):
    log("GET https://user:SECRET@host/a?sig=SECRET failed, file:///a?b is there")
    assert capsys.readouterr().err == "GET https://host/a failed, file:///a?b is there\n"


def test_a_closed_standard_output_is_one_line(image_dir, tiny_bundle):
    code = "import sys; sys.stdout = None; from engine.cli.app import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: --out - writes to standard output, which is closed"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [main, train, export], ids=["engine", "train", "export"])
def test_every_program_has_help_and_one_line_usage_errors(command):
    assert "--help" in CliRunner().invoke(command, ["-h"]).stdout
    result = CliRunner().invoke(command, ["--colour"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: No such option")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (["--length-penalty", "2", "--early-stopping", "true"], "length_penalty and early_stopping have no effect"),
        (["--early-stopping", "never", "--beams", "1"], "early_stopping has no effect with one beam"),
        (["--rows", "1", "--beams", "4"], "--rows 1 is less than the 4 beams of one image: 4 are used"),
        (["--length-penalty", "2", "--beams", "2"], None),
        (["--length-penalty", "1", "--rows", "1"], None),
    ],
)
def test_options_without_effect_are_noted(options, note, image_dir, tiny_bundle, tmp_path):
    result = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "run.csv", *options)
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


@pytest.mark.skipif(shutil.which("localedef") is None, reason="this system makes no locales: no localedef")
def test_a_latin_1_locale_keeps_names(image_dir, tiny_bundle, tmp_path):
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", tmp_path / "de_DE.ISO-8859-1"], capture_output=True
    )
    if made.returncode:
        pytest.skip("this system has no sources of locales")
    shutil.copy(image_dir / "IMG 0.png", tmp_path / "café.png")
    (tmp_path / "ids.txt").write_text("café\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONUTF8", "PYTHONIOENCODING")}
    environment |= {"LOCPATH": str(tmp_path), "LC_ALL": "de_DE.ISO-8859-1"}
    command = [sys.executable, "-m", "engine", "caption", "--input", tmp_path, "--bundle", tiny_bundle, "--jsonl"]
    command += ["--manifest", tmp_path / "ids.txt", "--out", tmp_path / "run.jsonl"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    row = json.loads((tmp_path / "run.jsonl").read_text(encoding="utf-8"))
    assert (row["id"], row["file"]) == ("café", str(tmp_path / "café.png"))


def test_two_images_with_one_id_are_refused(image_dir, tiny_bundle, tmp_path):
    random_pictures(1)[0].save(image_dir / "IMG 0.jpg")
    result = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "run.csv")
    assert result.exit_code == 2
    assert "two images with the id 'IMG 0': IMG 0.jpg and IMG 0.png; --ids file" in result.stderr
    out = tmp_path / "run.csv"
    result = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", out, "--ids", "file")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in read_run(out)[1:3]] == ["IMG 0.jpg", "IMG 0.png"]
    scored = run("score", "--run", out, "--references", out, "--metrics", "rouge1", "--out", tmp_path / "s.json")
    assert scored.exit_code == 0, scored.output


def test_dicom_files_without_an_image_do_not_stop_a_run(image_dir, tiny_bundle, tmp_path):
    for name, sop_class in (("DICOMDIR", "1.2.840.10008.1.3.10"), ("dose.dcm", "1.2.840.10008.5.1.4.1.1.88.67")):
        imageless(image_dir / name, sop_class)
    out = tmp_path / "run.csv"
    result = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"skipped in {image_dir}: 2 DICOM files without an image" in result.stderr
    assert [name for name, _ in read_run(out)[1:]] == [f"IMG {i}" for i in range(5)]
    named = run("caption", "--input", image_dir / "dose.dcm", "--bundle", tiny_bundle, "--out", out)
    assert named.exit_code == 1
    assert "dose.dcm: a DICOM file without an image" in named.stderr


def test_one_extreme_image_fails_alone(image_dir, tiny_bundle, tmp_path):
    (image_dir / "wide.png").write_bytes(extreme_png(1_000_001, 1))
    out = tmp_path / "run.csv"
    result = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", out, "--allow-missing")
    assert result.exit_code == 0, result.output
    assert "wide.png: refused: a side of 1000001 pixels" in result.stderr
    assert [name for name, text in read_run(out)[1:] if not text] == ["wide"]


def test_missing_onnxruntime_names_the_extra(image_dir, tiny_bundle, tmp_path):
    block = "import sys; sys.modules['onnxruntime'] = None; from engine.cli.app import main; main()"
    command = [sys.executable, "-c", block, "caption", "--input", image_dir, "--bundle", tiny_bundle]
    done = subprocess.run([*command, "--out", tmp_path / "run.csv"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'onnxruntime>=" in done.stderr
    assert not (tmp_path / "run.csv").exists()


def test_a_run_with_a_bundle_does_not_load_the_readers_of_checkpoints(image_dir, tiny_bundle, tmp_path):
    code = (
        "import sys; from engine.cli.app import main\n"
        "try: main()\n"
        "finally: print(sorted(m for m in sys.modules if m.startswith('engine.checkpoints.')))"
    )
    options = ["caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "run.csv"]
    done = subprocess.run([sys.executable, "-c", code, *options], check=True, capture_output=True, text=True)
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert loaded == {"engine.checkpoints.cache", "engine.checkpoints.hub"}, (
        "each further module makes every run slower"
    )


def test_the_command_works_from_any_directory(image_dir, tiny_bundle, tmp_path):
    engine = Path(sys.executable).with_name("engine")
    command = [
        engine,
        "caption",
        "--input",
        image_dir.name,
        "--bundle",
        tiny_bundle,
        "--beams",
        "4",
        "--out",
        "run.csv",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert len(read_run(tmp_path / "run.csv")) == 6


def test_help_loads_no_heavy_package():
    """Time is machine-dependent; what decides it is what gets imported."""
    code = (
        "import sys; from click.testing import CliRunner; from engine.cli.app import main;"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0;"
        "heavy = ('numpy', 'PIL', 'onnxruntime', 'tokenizers', 'csv', 'engine.inputs.columns', 'engine.files.atomic');"
        "print(sorted(m for m in heavy if m in sys.modules))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5


def test_inputs_and_manifests_are_never_overwritten(image_dir, tiny_bundle, tmp_path):
    manifest = tmp_path / "ids.csv"
    manifest.write_text("IMG 1\n")
    arguments = ("caption", "--input", image_dir, "--bundle", tiny_bundle, "--manifest", manifest)
    result = run(*arguments, "--out", manifest)
    assert result.exit_code == 2
    assert manifest.read_text() == "IMG 1\n"


def test_list_of_banned_words_is_not_overwritten(image_dir, tiny_bundle, tmp_path):
    banned = tmp_path / "banned.txt"
    banned.write_text("lesion\n")
    arguments = ("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "run.csv")
    result = run(*arguments, "--bad-words", banned, "--timings-out", banned)
    assert result.exit_code == 2
    assert f"--timings-out {banned} would overwrite the input {banned}" in result.stderr
    assert banned.read_text() == "lesion\n"


def test_run_without_readable_images_fails_with_allow_missing(tiny_bundle, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    arguments = ("caption", "--input", tmp_path / "images", "--bundle", tiny_bundle, "--out", tmp_path / "run.csv")
    result = run(*arguments, "--allow-missing")
    assert result.exit_code == 1
    assert "not one image could be read" in result.stderr
    assert not (tmp_path / "run.csv").exists()


def test_ctrl_c_before_writing_exits_130_and_keeps_captions(image_dir, tiny_bundle, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.files.atomic.os.fsync", interrupted)
    result = run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "run.csv")
    assert result.exit_code == 130
    assert "5 captions are kept in" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run.csv.journal"]


def test_a_link_keeps_pointing_and_a_file_keeps_its_permissions(image_dir, tiny_bundle, tmp_path):
    target = tmp_path / "target.csv"
    target.touch(mode=0o600)
    (tmp_path / "link.csv").symlink_to(target)
    run("caption", "--input", image_dir, "--bundle", tiny_bundle, "--out", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert len(read_run(target)) == 6
    assert target.stat().st_mode & 0o777 == 0o600


def test_caption_on_a_sample_of_the_challenge_corpus(tmp_path):
    """The demo bundle on distinct real-voxel JPEGs, more of them than there are slots."""
    from benchmarks.workload import write_corpus

    corpus = write_corpus(tmp_path / "corpus", 60, Path(__file__).parents[2] / "examples/images")
    out = tmp_path / "run.csv"
    result = run("caption", "--input", corpus, "--beams", 2, "--rows", 16, "--out", out)
    assert result.exit_code == 0, result.output
    rows = read_run(out)[1:]
    assert [row[0] for row in rows] == [f"corpus_{i:06d}" for i in range(60)]
    assert all(row[1] for row in rows)
    assert len({row[1] for row in rows}) > 15

"""Strange names go through caption, score, submit and report: no image is lost, doubled or given another's caption."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.cli.app import main
from engine.inputs.kinds import image_id
from tests.helpers.tiny import random_pictures, save_pictures

CHARACTERS = st.characters(codec="utf-8", exclude_characters='/\\#\0"', exclude_categories=("Cs", "Cc", "Zl", "Zp"))
NAMES = st.text(CHARACTERS, min_size=1, max_size=12).filter(
    lambda name: (
        not name.startswith(".") and name == name.strip() and image_id(name) == name and len(name.encode()) < 200
    )
)
SUFFIXES = (".png", ".jfif", ".JPG", ".webp", "")


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


@pytest.fixture(scope="module")
def expected(tiny_bundle) -> dict[int, str]:
    """The caption of each image with a plain name."""
    with tempfile.TemporaryDirectory() as folder:
        save_pictures(Path(folder), 6)
        run("caption", "--input", folder, "--bundle", tiny_bundle, "--out", f"{folder}/run.csv")
        return {int(name): caption for name, caption in rows(Path(folder, "run.csv"))[1:]}


@given(
    st.lists(NAMES, min_size=2, max_size=5, unique_by=lambda name: unicodedata.normalize("NFC", name).casefold()),
    st.lists(st.sampled_from(SUFFIXES), min_size=5, max_size=5),
    st.sampled_from(["as they are", "files", "windows", "NFD"]),
    st.booleans(),
)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_image_keeps_its_own_caption(tiny_bundle, expected, names, suffixes, written, is_deep):
    work = Path(tempfile.mkdtemp())
    try:
        folder = work / "in"
        folder.mkdir()
        for i, picture in enumerate(random_pictures(6)[: len(names)]):
            place = folder / f"s{i % 2}" if is_deep else folder
            place.mkdir(exist_ok=True)
            picture.save(place / f"{names[i]}{suffixes[i]}", "PNG")  # the content decides, whatever the suffix is
        how = ["--recursive", "--ids", "path"] if is_deep else []
        ids = [f"s{i % 2}/{name}" if is_deep else name for i, name in enumerate(names)]
        captions = {one: expected[i] for i, one in enumerate(ids)}
        run("caption", "--input", folder, *how, "--bundle", tiny_bundle, "--out", work / "run.csv")
        assert dict(rows(work / "run.csv")[1:]) == captions
        assert len(rows(work / "run.csv")) == 1 + len(ids)

        spelled = {
            "as they are": lambda one: one,
            "files": lambda one: f"{one}.png",
            "windows": lambda one: (
                "images\\" + one.replace("/", "\\") + ".png" if not is_deep else one.replace("/", "\\")
            ),
            "NFD": lambda one: unicodedata.normalize("NFD", one),
        }[written]
        references = [{"id": spelled(one), "caption": captions[one]} for one in reversed(ids)]
        (work / "references.jsonl").write_text("".join(json.dumps(one) + "\n" for one in references))
        run(
            *("score", "--run", work / "run.csv", "--references", work / "references.jsonl", "--metrics", "bleu1"),
            *("--images", folder, *(["--recursive"] if is_deep else [])),
            *("--out", work / "scores.json"),
        )
        if any(captions.values()):
            assert json.loads((work / "scores.json").read_text())["bleu1"] == pytest.approx(1.0)
        (work / "ids.txt").write_text("".join(f"{one}\n" for one in ids), encoding="utf-8")
        run(
            *("submit", "--format", "imageclef2023", "--run", work / "run.csv"),
            *("--manifest", work / "ids.txt", "--out", work / "submission.csv"),
        )
        assert [row[0] for row in rows(work / "submission.csv")[1:]] == ids
        run(
            *("report", "--run", work / "run.csv", "--images", folder, *(["--recursive"] if is_deep else [])),
            *("--references", work / "references.jsonl", "--out", work / "report"),
        )
    finally:
        shutil.rmtree(work)


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code in (1, 2), done.output
    return done.stderr.splitlines()[-1]


def test_same_names_in_other_folders_are_other_images(tmp_path):
    (tmp_path / "run.csv").write_text("ID,Caption\npatientA/1,ct\npatientB/2,mri\n")
    (tmp_path / "refs.csv").write_text("ID,Caption\npatientB/1,ct\npatientB/2,mri\n")
    files = ("--run", tmp_path / "run.csv", "--references", tmp_path / "refs.csv")
    assert "lacks 1 id" in refused("score", *files, "--metrics", "bleu1", "--out", tmp_path / "s.json")
    (tmp_path / "ids").write_text("patientB/1\npatientB/2\n")
    submission = ("--manifest", tmp_path / "ids", "--format", "imageclef2023", "--out", tmp_path / "x.csv")
    assert "no caption for 1 id" in refused("submit", "--run", tmp_path / "run.csv", *submission)

    (tmp_path / "in" / "patientC").mkdir(parents=True)
    save_pictures(tmp_path / "in" / "patientC", 3)
    looked = ("--run", tmp_path / "run.csv", "--images", tmp_path / "in", "--recursive", "--out", tmp_path / "report")
    assert "no id in common" in refused("report", *looked)


def test_two_names_of_one_image_are_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    save_pictures(tmp_path / "in", 3)
    (tmp_path / "run.csv").write_text("ID,Caption\na/1,ct\nb/1,mri\n")
    (tmp_path / "refs.csv").write_text("ID,Caption\n1,ct\n")
    run_file = ("--run", tmp_path / "run.csv")
    sentence = "a/1 and b/1 are two names of 1"
    assert sentence in refused("report", *run_file, "--images", tmp_path / "in", "--out", tmp_path / "report")
    scored = ("--references", tmp_path / "refs.csv", "--metrics", "bleu1", "--out", tmp_path / "s.json")
    assert f"run.csv: {sentence}" in refused("score", *run_file, *scored)
    (tmp_path / "refs.csv").write_text("ID,Caption\na/1,ct\nb/1,mri\n")
    assert sentence in refused("score", *run_file, *scored, "--images", tmp_path / "in")


def test_every_command_accepts_column_names(tiny_bundle, tmp_path):
    save_pictures(tmp_path / "in", 2)
    (tmp_path / "table.csv").write_text("uid,number,findings,hint\n1,9,a mass,ct\n0,8,a ct,mri\n")
    table = tmp_path / "table.csv"
    chosen = ("--id-column", "uid")
    run(
        *("caption", "--input", tmp_path / "in", "--bundle", tiny_bundle, "--n-best", 2, "--beams", 2),
        *("--n-best-out", tmp_path / "n.jsonl", "--manifest", table, "--prompts", table, *chosen),
        *("--prompt-column", "hint", "--out", tmp_path / "run.csv"),
    )
    captions = rows(tmp_path / "run.csv")[1:]
    assert [name for name, _ in captions] == ["1", "0"]
    assert [text.startswith(prompt) for (_, text), prompt in zip(captions, ("ct", "mri"), strict=True)] == [True, True]
    both = (*chosen, "--caption-column", "findings")
    files = ("--run", tmp_path / "run.csv", "--references", table)
    run("score", *files, "--metrics", "bleu1", "--out", tmp_path / "s.json", *both)
    run("report", *files, "--images", tmp_path / "in", "--out", tmp_path / "report", *both)
    run("rerank", "--n-best", tmp_path / "n.jsonl", "--support", table, "--out", tmp_path / "r.csv", *both)
    form = ("--manifest", table, "--format", "imageclef2023")
    run("submit", "--run", table, *form, "--out", tmp_path / "x.csv", *both)
    assert rows(tmp_path / "x.csv")[1:] == [["1", "a mass"], ["0", "a ct"]]
    run("check", tmp_path / "x.csv", *form, *chosen)
    wrong = ("--id-column", "uid", "--caption-column", "finding")
    sentence = "--caption-column finding: "
    assert sentence in refused("score", *files, "--metrics", "bleu1", "--out", tmp_path / "s.json", *wrong)


def test_file_names_that_are_not_utf8_are_read_by_every_command(tiny_bundle, tmp_path):
    folder, name = tmp_path / "in", os.fsdecode(b"caf\xe9")
    save_pictures(folder, 2)
    (folder / "0.png").rename(folder / f"{name}.png")
    caption = ("caption", "--input", folder, "--bundle", tiny_bundle, "--n-best", 2, "--beams", 2)
    run(
        *caption, "--n-best-out", tmp_path / "n.jsonl", "--timings-out", tmp_path / "t.csv", "--out", tmp_path / "r.csv"
    )
    lines = (tmp_path / "n.jsonl").read_bytes().decode("utf-8").splitlines()
    assert {json.loads(line)["id"] for line in lines} == {name, "1"}
    files = ("--run", tmp_path / "r.csv", "--references", tmp_path / "r.csv")
    per_image = ("--metrics", "rouge1", "--out", tmp_path / "s.json", "--per-image", tmp_path / "p.csv")
    run("score", *files, *per_image, "--images", folder)
    run("rerank", "--n-best", tmp_path / "n.jsonl", "--support", tmp_path / "r.csv", "--out", tmp_path / "v.csv")
    shown = ("--scores", tmp_path / "p.csv", "--n-best", tmp_path / "n.jsonl", "--columns", tmp_path / "t.csv")
    assert "2 images, 2 new thumbnails" in run(
        "report", *files, *shown, "--images", folder, "--out", tmp_path / "report"
    )
    (tmp_path / "ids").write_bytes(b"caf\xe9\n1\n")
    run(*caption, "--n-best-out", tmp_path / "n.jsonl", "--manifest", tmp_path / "ids", "--out", tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_bytes().splitlines()[1].startswith(b"caf\xe9,")
    form = ("--manifest", tmp_path / "ids", "--format", "imageclef2023", "--out", tmp_path / "x.csv")
    assert "not UTF-8 cannot be in a submission" in refused("submit", "--run", tmp_path / "r.csv", *form)

"""Strange names go through caption, score, submit and report: no image is lost, doubled or given another's caption."""

from __future__ import annotations

import csv
import io
import json
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
    """What each of the pictures is captioned when it has a plain name."""
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
            picture.save(place / f"{names[i]}{suffixes[i]}", "PNG")  # the bytes tell, whatever the suffix says
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

"""Run the shell and Python blocks of the documentation in a folder with small inputs, and the notebook."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from PIL import Image

from benchmarks.figures import PAGES, ROOT
from engine.cli.app import main as engine
from engine.errors import EngineError
from tests.docs.commands import check_options, run_block
from tests.docs.pages import CANNOT, Block, blocks, name_of

EXAMPLES = ("colin27_axial_082", "colin27_coronal_110", "icbm09a_axial_021", "icbm09c_sagittal_096")
SPLITS = ("split", "train", "train", "train", "valid")
NAMES = ("a.jpg", "b.png", "c.jpg", "d.jpg")
SHELL = [block for page in PAGES for block in blocks(page, "sh")]


def _engine(line: str) -> None:
    engine(line.split(), standalone_mode=False)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tiny_checkpoint, tiny_bundle) -> Path:
    """Create the inputs that docs/contributing.md lists, and the files that a page uses from earlier pages."""
    here = tmp_path_factory.mktemp("docs")
    captions = dict(csv.reader((ROOT / "examples/captions.csv").read_text(encoding="utf-8").splitlines()))
    for target, names in (("examples", [f"{example}.jpg" for example in EXAMPLES]), (".", NAMES), ("DATA", NAMES)):
        images = here / target / "images"
        images.mkdir(parents=True)
        for source, name in zip(EXAMPLES, names, strict=True):
            Image.open(ROOT / f"examples/images/{source}.jpg").save(images / name)
        rows = [f'{Path(name).stem},"{captions[example]}"' for example, name in zip(EXAMPLES, names, strict=True)]
        (images.parent / "captions.csv").write_text("\n".join(["ID,Caption", *rows]) + "\n", encoding="utf-8")
    splits = [f"{line},{split}" for line, split in zip(["ID,Caption", *rows], SPLITS, strict=True)]
    (here / "DATA/captions.csv").write_text("\n".join(splits) + "\n", encoding="utf-8")
    (here / "ids.csv").write_text("ID\na\nb\nc\nd\n")
    shutil.copytree(ROOT / "examples/plugins", here / "examples/plugins")
    shutil.copytree(tiny_checkpoint, here / "CHECKPOINT")
    for name in ("BUNDLE", "BUNDLE16"):
        shutil.copytree(tiny_bundle, here / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        common = "caption --bundle BUNDLE --input images"
        files = "--n-best-out run.jsonl --timings-out timings.csv --attention maps --out run.csv"
        _engine(f"{common} --beams 4 --n-best 4 {files}")
        _engine(f"{common} --sample --beams 1 --n-best 4 --n-best-out drawn.jsonl --out other.csv")
        for run, scores in (("run", "per_image"), ("other", "other_per_image")):
            _engine(f"score --run {run}.csv --references captions.csv --out scores.json --per-image {scores}.csv")
    return here


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch) -> Path:
    """Work in a copy of the prepared folder."""
    here = Path(shutil.copytree(prepared, tmp_path / "here"))
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name_of)
def test_every_shell_block_runs(page, folder):
    for block in blocks(page, "sh"):
        if block.mark is None:
            run_block(block, folder)


@pytest.mark.parametrize("block", [block for block in SHELL if block.mark], ids=str)
def test_block_that_does_not_run_is_valid(block: Block):
    """Its mark says why it does not run here, and its commands and options exist."""
    assert block.mark is not None
    kind, what = block.mark
    if kind == "needs":
        assert what in CANNOT
    else:
        assert (ROOT / what).is_file()
    for line in block.lines:
        check_options(line)


def test_unknown_options_are_detected(folder):
    for line in ("engine caption --input images --beam-count 4 --out run.csv", "python -m train sweep --data DATA"):
        with pytest.raises(click.UsageError, match=r"beam-count|out"):
            check_options(line)
    with pytest.raises(EngineError, match="does not exist"):
        run_block(Block(Path("page.md"), 1, "sh", "engine caption --input no/where --out run.csv", None), folder)
    with pytest.raises(AssertionError, match="there is no make nothing"):
        check_options("make nothing")


def test_shown_captions_are_current(tmp_path):
    """Caption the images of lines such as `colin27_axial_082,"axial ...`, which may end with an ellipsis."""
    shown = {line for page in PAGES for line in re.findall(r'^colin27\w+,".+$', page.read_text("utf-8"), re.MULTILINE)}
    assert len(shown) >= 3
    (tmp_path / "ids.txt").write_text("".join(f"{name}\n" for name in sorted({line.split(",")[0] for line in shown})))
    images = ROOT / "examples/images"
    _engine(f"caption --input {images} --manifest {tmp_path}/ids.txt --beams 4 --out {tmp_path}/run.csv")
    rows = (tmp_path / "run.csv").read_text(encoding="utf-8").splitlines()
    for line in shown:
        assert any(row.startswith(line.removesuffix("...").rstrip()) for row in rows), line


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "python")], ids=str)
@pytest.mark.usefixtures("folder")
def test_every_python_block_runs(block, capsys):
    exec(compile(block.text, str(block), "exec"), {})
    assert capsys.readouterr().out.splitlines()[0].startswith("a ")


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    cells = json.loads((ROOT / "examples/first_run.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "%pip install" in code[0]
    names = {"SOURCE": str(ROOT)}
    for cell in code[1:]:
        if cell.startswith("!"):
            for line in cell.splitlines():
                command = line.removeprefix("!").replace("{SOURCE}", str(ROOT))
                done = subprocess.run(command, shell=True, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
        else:
            exec(compile(cell, "cell", "exec"), names)
    assert len(names["captions"]) == 32
    assert names["caption"].text == names["captions"]["colin27_axial_082"]
    assert {path.name for path in tmp_path.iterdir()} >= {"run.csv", "scores.json", "submission.zip", "report"}

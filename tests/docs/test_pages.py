"""Check the documentation pages: size limits, links, generated tables, and the build of the site."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import figures
from benchmarks.figures import PAGES, RESULTS, ROOT
from docs.scripts import reference
from engine import errors
from engine.cli.app import main as engine
from engine.inputs.images import RepeatedIdError
from engine.scoring.base import UnavailableError
from tests.docs.pages import LINKING, anchors, links, name_of, without_code
from train.__main__ import main as train

README = ROOT / "README.md"
FIGURES = r"^<!-- figures: (.+?) -->$"
MOST_LINES, MOST_WORDS, WIDTH = 150, 1200, 120


def test_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS
    assert max(len(line) for line in text.splitlines()) <= WIDTH


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page):
    own = re.sub(r"<!-- (options|figures): .*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    long = [line for line in own.splitlines() if len(line) > WIDTH and not line.startswith(("|", "colin27", "engine:"))]
    assert not long


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_and_anchors_exist(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert other.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(other), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    """Check the paths of this repository that are in backticks. Other paths in backticks are examples."""
    paths = r"(?:engine|export|train|benchmarks|tests|docs|examples)/[\w./-]+"
    for name in re.findall(rf"`({paths})`", without_code(page)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figure_tables_are_current(page):
    assert figures.render(page) == page.read_text(encoding="utf-8"), "stale: run `make figures`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_option_tables_are_current(page):
    assert reference.render(page) == page.read_text(encoding="utf-8"), "stale: run `make figures`"


def test_every_figure_table_is_used():
    shown = {name for page in PAGES for name in re.findall(FIGURES, page.read_text("utf-8"), re.MULTILINE)}
    assert shown == set(figures.TABLES)


def test_changed_record_makes_a_table_stale(tmp_path):
    folder = Path(shutil.copytree(RESULTS, tmp_path / "results"))
    record = json.loads((folder / "base_4beams.json").read_text())
    record["programs"]["engine"]["seconds_per_image"] = 0.4321
    (folder / "base_4beams.json").write_text(json.dumps(record))
    text = figures.render(README, folder)
    assert "**0.432**" in text
    assert text != README.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib's own dependencies
def test_plots_are_current(tmp_path):
    from benchmarks import plots

    folder = Path(shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png")))
    done = CliRunner().invoke(plots.main, ["--results", str(folder)], catch_exceptions=False)
    assert (done.exit_code, done.stderr) == (0, "")
    for name in plots.PLOTS:
        with Image.open(folder / f"{name}.png") as new, Image.open(RESULTS / f"{name}.png") as committed:
            assert min(new.size) > 300
            assert committed.info.get("Records") == new.info["Records"], f"{name}.png is stale: run `make plots`"


@pytest.mark.parametrize(
    ("bundle", "shown"),
    [
        ("0" * 64, "an earlier demo bundle, 000000000000"),
        (None, "an unrecorded demo bundle"),
        ("current", "the embedded demo bundle "),
    ],
)
def test_record_of_another_bundle_is_marked(bundle, shown, tmp_path):
    folder = Path(shutil.copytree(RESULTS, tmp_path / "results"))
    record = json.loads((folder / "rows_demo_4beams.json").read_text())
    current = figures.Bundle.load().digest
    record["bundle"] = current if bundle == "current" else bundle
    (folder / "rows_demo_4beams.json").write_text(json.dumps(record))
    text = figures.figures("rows", ROOT / "docs/measurements.md", folder)
    assert shown in " ".join(text.split())
    assert current[:12] in text


def test_consensus_table_names_bundles_and_support(tmp_path):
    folder = Path(shutil.copytree(RESULTS, tmp_path / "results"))
    record = json.loads((folder / "consensus.json").read_text())
    record["further_bundles"] = ["0123456789ab"]
    record["setting"]["support"] = {"captions": 1234, "nearest": 8, "share": 0.5}
    record["runs"] |= {f"{name}, twice": scores for name, scores in record["runs"].items()}
    (folder / "consensus.json").write_text(json.dumps(record))
    text = figures.figures("consensus", ROOT / "docs/measurements.md", folder)
    assert len(re.findall(r"^\| .+, twice \| .*\[", text, re.MULTILINE)) == len(record["runs"]) // 2
    assert "0123456789ab" in text
    assert "1,234 distinct captions" in text


def commands(group: click.Group, name: str) -> list[str]:
    """Return the full names of all commands of a group, such as `engine score compare`."""
    names = []
    for word, command in group.commands.items():
        names.append(f"{name} {word}")
        if isinstance(command, click.Group):
            names += commands(command, names[-1])
    return names


def test_every_command_has_a_table():
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    wanted = [*commands(engine, "engine"), *commands(train, "python -m train"), "python -m export"]
    assert sorted(re.findall(r"<!-- options: (.+?) -->", page)) == sorted(wanted)
    assert set(wanted) <= set(re.findall(r"^## (.+)$", page, re.MULTILINE))


def test_every_section_of_caption_has_a_table():
    page = (ROOT / "docs/captioning.md").read_text(encoding="utf-8")
    sections = {getattr(param, "section", "Other") for param in engine.commands["caption"].params}
    for section in sections - {"Decoding"}:
        assert f"<!-- options: engine caption / {section} -->" in page
    assert "<!-- options: decoding -->" in page


def test_every_error_class_is_documented():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    base = errors.EngineError
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, base)]
    for error in (*classes, RepeatedIdError, UnavailableError):
        assert re.search(rf"^\| `{error.__name__}` \| {error.exit_code} \|", page, re.MULTILINE), error.__name__


def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the dependency group docs, which `make test` installs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/python.html").read_text(encoding="utf-8")
    assert "max_new_tokens" in page
    assert "https://fonts" not in page
    assert (tmp_path / "site/benchmarks/LOG.html").exists()

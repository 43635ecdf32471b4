"""Every documented program starts, and writes only to its outputs or its cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import PAGES, ROOT
from engine.cli.app import main as engine
from tests.helpers.cores import two_cores
from tests.helpers.tiny import WORDS, save_pictures
from train.__main__ import main as train

SCRIPT = ROOT / "tests/helpers/entry_points.py"
PACKAGES = "engine|export|train|benchmarks|docs"
CACHE = ".cache/blip-caption-engine"
ELSEWHERE = {
    ".config/matplotlib": "matplotlib makes its folder of settings",
    ".cache/matplotlib": "matplotlib keeps its list of fonts",
    ".cache/fontconfig": "matplotlib's search for fonts",
}
"""Folders of HOME that libraries make, and why."""
INTERNAL = {"benchmarks.host_worker", "benchmarks.gpu.first", "benchmarks.gpu.parts", "benchmarks.gpu.runs"}
"""Programs that only other benchmarks start."""
VARIABLES = ("ORT_DISABLE_TELEMETRY", "HF_HOME", "HF_HUB_CACHE", "MPLCONFIGDIR", "ENGINE_TRT_LOG", "DISPLAY")


def documented() -> set[str]:
    """Return the modules that pages and the Makefile run with `python -m`."""
    pages = (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "Makefile")
    found = re.findall(rf"python3? -m ((?:{PACKAGES})[a-z_.]*)", "\n".join(page.read_text("utf-8") for page in pages))
    return {name.rstrip(".") for name in found} - {"benchmarks"}


def runnable() -> set[str]:
    """Return the modules of the repository that do something when they are run."""
    found = set()
    for path in (path for package in PACKAGES.split("|") for path in (ROOT / package).rglob("*.py")):
        if path.name == "__main__.py":
            found.add(".".join(path.relative_to(ROOT).parts[:-1]))
        elif path.read_text("utf-8").rstrip().endswith('if __name__ == "__main__":\n    main()'):
            found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found - INTERNAL


def subcommands(group: click.Group, words: list[str]) -> list[list[str]]:
    found = []
    for name, command in group.commands.items():
        found.append([*words, name])
        if isinstance(command, click.Group):
            found += subcommands(command, found[-1])
    return found


def run_all(jobs: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    """Run programs with an empty HOME, see tests/helpers/entry_points.py."""
    places = {"HOME": folder / "home", "TMPDIR": folder / "temporary"}
    for place in (*places.values(), folder / "work"):
        place.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    for name in VARIABLES:
        environment.pop(name, None)
    environment |= {name: str(place) for name, place in places.items()}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps(jobs),
        cwd=folder / "work",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(jobs)
    return results


def strays(result: dict[str, Any], folder: Path, outputs: list[Path]) -> list[str]:
    """Return what a program wrote, and left, where it should not have."""
    allowed = [folder / "home" / one for one in (CACHE, *ELSEWHERE)] + outputs
    passing = [folder / "temporary", Path("/dev"), Path("/proc"), Path("/tmp")]
    left = [Path(one) for one in result["files"] if not _is_in(Path(one), allowed)]
    opened = [Path(one) for one in result["opened"] if not _is_in(Path(one), [*allowed, *passing])]
    return sorted({str(one) for one in (*left, *opened)})


def _is_in(path: Path, folders: list[Path]) -> bool:
    """Return whether a path is below one of the folders, or leads to one."""
    return any(path.is_relative_to(one) or one.is_relative_to(path) for one in folders)


def check(results: list[dict[str, Any]], jobs: list[list[str]], folder: Path, outputs: list[Path]) -> None:
    """Assert that all programs succeeded and wrote nothing outside of their outputs and ELSEWHERE."""
    wrong = {}
    for job, result in zip(jobs, results, strict=True):
        if result["code"] or strays(result, folder, outputs):
            wrong[" ".join(job)] = (result["code"], strays(result, folder, outputs), result["errors"][-500:])
    assert not wrong, json.dumps(wrong, indent=1)


def test_every_documented_program_has_help(tmp_path):
    modules = documented() | runnable()
    assert documented() <= runnable()
    assert {"engine", "export", "export.parity", "train", "benchmarks.throughput", "docs.scripts.reference"} <= modules
    jobs = [[module, "--help"] for module in sorted(modules)]
    jobs += [["engine", *words, "--help"] for words in subcommands(engine, [])]
    jobs += [["train", *words, "--help"] for words in subcommands(train, [])]
    check(run_all(jobs, tmp_path), jobs, tmp_path, [])
    assert not list((tmp_path / "home").rglob(CACHE))


REAL = """
export --checkpoint CHECKPOINT --out out/bundle
export.parity --checkpoint CHECKPOINT --bundle out/bundle --images IMAGES --beams 1 --no-repeat-ngram 0 --out out/p.json
export.precision --bundle BUNDLE --against BUNDLE --images IMAGES --beams 1 --out out/precision.json
export.restore --bundle BUNDLE --out out/restored
engine caption --input IMAGES --bundle BUNDLE --out out/run.csv --n-best 2 --beams 2 --n-best-out out/n.jsonl
engine caption --input IMAGES --bundle BUNDLE --processes 2 --out out/processes.csv
engine caption --input IMAGES --bundle BUNDLE --backend openvino --out out/openvino.csv
engine caption --input file://IMAGES --bundle file://BUNDLE --out out/uri.csv
engine caption --input IMAGES --bundle BUNDLE --shard 1/1 --out out/part.csv
engine merge out/part.csv --out out/merged.csv
engine verify --bundle BUNDLE
engine bench --images 2 --bundle BUNDLE
engine info
engine score --run out/run.csv --references REFERENCES --metrics rouge1,bleu1 --out out/s.json --per-image out/s.csv
engine score compare out/run.csv out/uri.csv --references REFERENCES --metrics rouge1
engine rerank --n-best out/n.jsonl --out out/reranked.csv
engine submit --run out/run.csv --manifest REFERENCES --format imageclef2026 --out out/submission.zip
engine check out/submission.zip --manifest REFERENCES --format imageclef2026
engine report --run out/run.csv --images IMAGES --references REFERENCES --out out/report
train inspect --data DATA --out out/looked
train finetune --recipe smoke --epochs 2 --set valid_share=0.5 --model CHECKPOINT --data DATA --out out/tuned
train average out/tuned 1 2 --out out/average
train sweep --bundle BUNDLE --data DATA --split train --beams 1 --metrics rouge1 --examples 1 --out out/sweep
benchmarks.host --images 4 --beams 1 --rows 4 --repeats 1 --out out/host.json
benchmarks.plots --results RESULTS
"""
"""Tiny work for every entry point. Not for `engine plan`, which needs NVIDIA's libraries, for `train demo` and `train
small-bert`, which fetch packages, for benchmarks that take minutes, nor for `benchmarks.figures` and
`docs.scripts.reference`, which write into the pages of the repository.
"""


@two_cores
def test_programs_write_only_to_outputs_and_cache(tiny_checkpoint, tiny_bundle, tmp_path):
    images = save_pictures(tmp_path / "inputs/data/images", 6)
    references = tmp_path / "inputs/data/captions.csv"
    references.write_text("ID,Caption\n" + "".join(f'{i},"{WORDS[i]} of the {WORDS[i + 9]}"\n' for i in range(6)))
    plots = Path(shutil.copytree(ROOT / "benchmarks/results", tmp_path / "results"))
    places = {"CHECKPOINT": tiny_checkpoint, "BUNDLE": tiny_bundle, "IMAGES": images, "DATA": images.parent}
    places |= {"REFERENCES": references, "RESULTS": plots}
    words = re.compile("|".join(places))
    jobs = [words.sub(lambda found: str(places[found[0]]), line).split() for line in REAL.strip().splitlines()]
    (tmp_path / "work/out").mkdir(parents=True)
    check(run_all(jobs, tmp_path), jobs, tmp_path, [tmp_path / "work/out", plots])

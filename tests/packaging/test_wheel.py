"""What ships."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from engine.report.build import SCRIPTS, STYLES
from engine.version import COMPARED_WITH

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


def test_the_wheel_holds_only_the_engine_and_its_demo_bundle(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"engine"}
    demo = {name.removeprefix("engine/assets/demo/") for name in names if name.startswith("engine/assets/demo/")}
    assert {"manifest.json", "encoder.onnx", "decoder.onnx", "regroup.onnx", "tokenizer.json", "golden.npz"} <= demo
    assert "engine/py.typed" in names


def test_the_wheel_holds_the_page_of_the_report(wheel):
    assets = ROOT / "engine/report/assets"
    found = {path.relative_to(ROOT).as_posix() for path in assets.rglob("*") if path.is_file()}
    assert {f"engine/report/assets/{name}" for name in (*STYLES, *SCRIPTS, "page.html")} <= found
    assert found <= set(wheel.namelist())


def test_what_others_wrote_for_the_page_is_what_the_notice_says():
    notice = (ROOT / "NOTICE").read_text()
    for path in (ROOT / "engine/report/assets/vendor").glob("*.min.*"):
        assert f"{path.name} " in notice
        assert hashlib.sha256(path.read_bytes()).hexdigest() in notice


def test_the_wheel_carries_licence_and_notice(wheel):
    names = wheel.namelist()
    assert any(name.endswith("LICENSE") for name in names)
    assert any(name.endswith("NOTICE") for name in names)


def test_neither_runtime_is_a_base_dependency(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    required = [line for line in wheel.read(metadata).decode().splitlines() if line.startswith("Requires-Dist")]
    assert not [line for line in required if "onnxruntime" in line and "extra ==" not in line]
    assert not [line for line in required if "torch" in line and "extra ==" not in line]


def test_the_releases_of_transformers_that_are_named_are_those_the_tests_run_on():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    pins = [
        one.removeprefix("transformers==")
        for group in ("export", "next")
        for one in groups[group]
        if "transformers==" in one
    ]
    assert pins == list(COMPARED_WITH)


def test_no_tracked_file_but_the_demo_bundle_is_larger_than_a_megabyte():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    paths = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    large = [path for path in paths if path.exists() and path.stat().st_size > 1 << 20]
    assert [path for path in large if "assets/demo" not in str(path)] == []
    assert sum(path.stat().st_size for path in (ROOT / "engine/assets/demo").iterdir()) <= 70e6

"""`engine verify`, `info` and `bench`: what they print, and their exit codes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engine.bundle.manifest import GOLDEN, MANIFEST
from engine.cli.app import main
from engine.errors import PACKAGES, install_command
from engine.host import processor
from engine.machine.verify import Golden
from tests.helpers.tiny import save_pictures


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "images", 5, name="IMG {}.png")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_verify_passes_and_fails_with_the_bundle(tiny_bundle):
    result = run("verify", "--bundle", tiny_bundle)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("ok ") == 6 + 5, "the decoder whole, and its halves but for greedy with a penalty"


def test_verify_counts_images_left_out_at_export(tiny_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    golden = Golden.load(bundle / GOLDEN)
    golden.skip(0, 1, 0)
    golden.save(bundle / GOLDEN)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][GOLDEN] = hashlib.sha256((bundle / GOLDEN).read_bytes()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    lines = run("verify", "--bundle", bundle).stdout.splitlines()
    first, second = lines[:2]
    count = len(golden.pixel_values)
    assert first.startswith(f"ok   {count - 1}/{count - 1} identical, score difference ")
    assert ", 1 left out at export: " in first
    assert "left out" not in second


def test_info_reports_what_is_missing_and_why():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["backends"]["cpu"] == "ready"
    assert facts["backends"]["cuda"] != "ready"
    assert facts["packages"]["numpy"]
    assert facts["extras"].pop("heic") in ("ready", "missing: pi-heif: pip install 'pi-heif>=1.0'")
    assert facts["extras"].pop("remote") in ("ready", f"missing: s3fs, gcsfs: {install_command('remote')}")
    assert facts["extras"] == dict.fromkeys(("dicom", "parquet", "ray", "score", "score-neural"), "ready")


@pytest.mark.parametrize(
    ("cpuinfo", "is_said"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx_vnni\n", False),
        ("processor : 0\nflags\t\t: fpu avx512f avx512_vnni\n", False),
        ("processor : 0\nFeatures\t: fp asimd asimddp\n", False),
        (None, False),
    ],
)
def test_info_notes_slow_int8_only_without_vnni(cpuinfo, is_said, monkeypatch, tmp_path):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr("engine.host.CPUINFO", tmp_path / "cpuinfo")
    facts = json.loads(run("info", "--json").stdout)
    assert ("no VNNI" in facts.get("int8", "")) == ("int8" in facts) == is_said


def test_info_names_the_extra_of_what_is_missing(monkeypatch):
    monkeypatch.setattr("engine.machine.info.EXTRAS", {"dicom": ("a-package-nobody-has",)})
    facts = json.loads(run("info", "--json").stdout)
    assert facts["extras"] == {"dicom": "missing: a-package-nobody-has: pip install 'pydicom>=3.0'"}


def test_install_commands_name_the_packages_of_the_extras():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {extra: list(packages) for extra, packages in PACKAGES.items()} == project["optional-dependencies"]
    assert install_command("score").startswith("pip install 'rouge-score==0.1.2' 'pycocoevalcap==1.2' ")


def test_bench_prints_speed_and_json_last(image_dir, tiny_bundle):
    result = run("bench", "--input", image_dir, "--images", 5, "--bundle", tiny_bundle, "--beams", 3, "--rows", 6)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["images"] == 5
    assert report["side_by_side"] == 2
    assert report["images_per_s"] == pytest.approx(5 / report["seconds"])
    assert report["processor"] == processor().full_name
    assert re.search(rf"^machine +\d+ cores? of {re.escape(report['processor'])}$", result.stderr, re.MULTILINE)
    assert len(result.stdout.splitlines()) == 1
    assert "num_beams:3" in report["signature"]


def test_bench_without_images_and_with_a_folder(image_dir, tiny_bundle):
    assert run("bench", "--images", 3, "--bundle", tiny_bundle).exit_code == 0
    whole = run("bench", "--input", image_dir, "--bundle", tiny_bundle)
    assert json.loads(whole.stdout)["images"] == 5, "all images of a folder with fewer than 64"
    result = run("bench", "--input", image_dir, "--images", 6, "--bundle", tiny_bundle)
    assert result.exit_code == 2
    assert "has 5 images: set --images to 5 or less" in result.output


@pytest.mark.parametrize("damage", ["empty", "no archive"])
def test_verify_fails_if_nothing_was_compared(damage, tiny_bundle, tmp_path):
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    golden = Golden.load(bundle / GOLDEN)
    for setting in range(len(golden.settings)):
        for image in range(len(golden.pixel_values)):
            golden.skip(setting, image, 0)
    golden.save(bundle / GOLDEN)
    if damage == "no archive":
        (bundle / GOLDEN).write_bytes(b"PK no archive")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][GOLDEN] = hashlib.sha256((bundle / GOLDEN).read_bytes()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    result = run("verify", "--bundle", bundle)
    assert result.exit_code == 1, result.output
    assert ("nothing was verified" if damage == "empty" else "golden.npz cannot be read") in result.stderr

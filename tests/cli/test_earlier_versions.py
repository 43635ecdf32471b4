"""Files of an earlier version, 084ae4d, still work: a journal and a bundle."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.bundle.manifest import Bundle
from engine.cli.app import main
from tests.helpers.earlier import bundle_of_084ae4d

JOURNAL = Path(__file__).parents[1] / "data/run_of_084ae4d.journal"
"""Of `engine caption --beams 2 --rows 2 --n-best 2` on the first six example images, killed after three captions."""
IMAGES = sorted((Path(__file__).parents[2] / "examples/images").iterdir())[:6]
SIGNATURE = (
    "engine:0.1.0|bundle:02ae885f201a|precision:fp32|backend:cpu|num_beams:2|no_repeat_ngram_size:3|max_length:64|"
    "min_length:0|length_penalty:1.0|early_stopping:False|num_return_sequences:2"
)
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "pydicom", "tokenizers")


def key_of_084ae4d(images: list[Path]) -> str:
    """Return the key that 084ae4d gave such a run with the packages installed here."""
    from importlib.metadata import PackageNotFoundError, version

    installed = []
    for package in PACKAGES:
        try:
            installed.append(f"{package}:{version(package)}")
        except PackageNotFoundError:
            continue
    digest = hashlib.sha256(f"{SIGNATURE}|{'|'.join(installed)}".encode())
    for image in images:
        digest.update(json.dumps([image.stem, str(image.absolute()), 0]).encode())
    return digest.hexdigest()


def at_home(lines: list[bytes], images: list[Path]) -> bytes:
    """Return a journal as if it had been written about these copies of the images: new times, new key, nothing else."""
    records = [json.loads(line[9:]) for line in lines]
    records[0]["key"] = key_of_084ae4d(images)
    for record in records[1:]:
        status = next(image for image in images if image.stem == record["id"]).stat()
        record["file"] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    bodies = [json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode() for record in records]
    return b"".join(b"%08x %s\n" % (zlib.crc32(body), body) for body in bodies)


@pytest.fixture
def bundle(tmp_path) -> Path:
    return bundle_of_084ae4d(tmp_path / "bundle")


def test_journal_of_an_earlier_version_resumes(tmp_path, bundle):
    (tmp_path / "images").mkdir()
    images = [Path(shutil.copy(image, tmp_path / "images")) for image in IMAGES]
    lines = JOURNAL.read_bytes().splitlines()
    (tmp_path / "run.csv.journal").write_bytes(at_home(lines, images))
    words = ["caption", "--input", str(tmp_path / "images"), "--beams", "2", "--rows", "2", "--n-best", "2"]
    words += ["--n-best-out", str(tmp_path / "run.jsonl"), "--bundle", str(bundle)]
    resumed = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "run.csv"), "--json"])
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout.splitlines()[-1])["resumed"] == len(lines) - 1 == 3
    assert SIGNATURE in resumed.stderr
    again = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "again.csv")])
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "run.csv").read_bytes() == (tmp_path / "again.csv").read_bytes()


def test_bundle_of_an_earlier_version_gives_the_same_captions(bundle):
    assert Bundle.load(bundle).digest.startswith("02ae885f201a")
    result = CliRunner().invoke(main, ["verify", "--bundle", str(bundle), "--backend", "cpu", "--json"])
    assert result.exit_code == 0, result.stderr
    checks = json.loads(result.stdout)["checks"]
    assert checks
    assert all(check["passed"] for check in checks)

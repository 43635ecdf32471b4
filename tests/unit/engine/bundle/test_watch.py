"""A bundle that is overwritten while a run uses it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from engine.bundle.manifest import Bundle, watched
from engine.bundle.open import combine
from engine.errors import BundleError

WEIGHTS = "decoder.onnx.data"


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def overwrite(path: Path, *, keep_times: bool) -> None:
    """Write other bytes of the same size into a file, as cp, scp and rsync --inplace do."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    with path.open("r+b") as stream:
        stream.write(content)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True])
def test_overwriting_in_place_is_detected(folder, keep_times):
    with watched(Bundle.load(folder)) as watch:
        watch.check()
        overwrite(folder / WEIGHTS, keep_times=keep_times)
        with pytest.raises(BundleError, match=rf"{WEIGHTS} was overwritten during the run"):
            watch.check()


def test_overwriting_after_load_is_detected(folder):
    bundle = Bundle.load(folder)
    overwrite(folder / WEIGHTS, keep_times=True)
    with pytest.raises(BundleError, match=rf"{WEIGHTS} was overwritten"), watched(bundle):
        pass


def test_every_bundle_of_an_ensemble_is_watched(folder, tiny_bundle):
    both = combine([Bundle.load(tiny_bundle), Bundle.load(folder)], [1.0, 1.0])
    with watched(both) as watch:
        watch.check()
        overwrite(folder / "tokenizer.json", keep_times=False)
        with pytest.raises(BundleError, match=r"tokenizer\.json was overwritten"):
            watch.check()


def test_chmod_and_replaced_folder_are_allowed(folder, tmp_path):
    """An export to the same path renames a new folder to it, and the run keeps the files it has open."""
    with watched(Bundle.load(folder)) as watch:
        for path in folder.iterdir():
            path.chmod(0o600)
        watch.check()
        shutil.copytree(folder, tmp_path / "new")
        overwrite(tmp_path / "new" / WEIGHTS, keep_times=False)
        shutil.rmtree(folder)
        (tmp_path / "new").rename(folder)
        watch.check()

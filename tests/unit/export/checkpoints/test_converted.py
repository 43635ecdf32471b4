"""The cache of converted checkpoints: written once, also by concurrent callers, and closed to other users."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.checkpoints.files import SAFE
from engine.errors import BackendError, CheckpointError
from export.checkpoints.find import cached, find_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs user ids and permissions")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "blip-caption-engine" / "converted"


def write(draft: Path) -> None:
    (draft / SAFE).write_text("weights")


def test_concurrent_callers_convert_once(cache):
    drafts, barrier = [], threading.Barrier(4)

    def convert(draft: Path) -> None:
        drafts.append(draft)
        (draft / SAFE).write_text("weights")

    def request(_: int) -> str:
        barrier.wait()
        return (cached("checkpoint", convert) / SAFE).read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(request, range(4))) == ["weights"] * 4
    assert len(drafts) == 1
    assert sorted(entry.name for entry in cache.iterdir()) == ["checkpoint", "checkpoint.lock"]


def test_failed_conversion_leaves_no_folder(cache):
    def fail(draft: Path) -> None:
        (draft / "config.json").write_text("{}")
        raise CheckpointError("not a checkpoint")

    with pytest.raises(CheckpointError, match="not a checkpoint"):
        cached("checkpoint", fail)
    assert cached("checkpoint", write) == cache / "checkpoint"


@pytest.mark.parametrize("what", ["the cache", "the folder", "the weights"])
def test_files_writable_by_others_are_refused(cache, what):
    folder = cached("checkpoint", write)
    open_to_all = {"the cache": cache, "the folder": folder, "the weights": folder / SAFE}[what]
    cache.chmod(0o755)
    open_to_all.chmod(0o777)
    with pytest.raises(BackendError, match=f"others may write into {open_to_all}, and the weights cached there decide"):
        cached("checkpoint", write)


def test_cache_of_another_user_is_refused(cache, monkeypatch):
    cached("checkpoint", write)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(BackendError, match="converted belongs to another user"):
        cached("checkpoint", write)


@pytest.mark.usefixtures("cache")
def test_files_in_a_private_cache_are_not_checked():
    """Default permissions may let a group write to the folder, but its private parent keeps the group out."""
    folder = cached("checkpoint", write)
    folder.chmod(0o775)
    assert cached("checkpoint", write) == folder


def test_names_that_are_paths_are_not_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "best").mkdir(parents=True)
    for name in ("runs/best", "/nowhere/best", "./runs/other", "../runs/x", "best", "a/b/c"):
        assert find_checkpoint(name) == Path(name)

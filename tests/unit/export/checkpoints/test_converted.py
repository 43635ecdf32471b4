"""Checkpoints that are converted once into the cache, whoever asks for them, and however many at a time."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import BackendError, CheckpointError
from export.checkpoints.files import SAFE
from export.checkpoints.find import kept_or_made

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs user ids and permissions")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "blip-caption-engine" / "converted"


def write(draft: Path) -> None:
    (draft / SAFE).write_text("weights")


def test_several_at_a_time_make_it_once(cache):
    made, together = [], threading.Barrier(4)

    def convert(draft: Path) -> None:
        made.append(draft)
        (draft / SAFE).write_text("weights")

    def ask(_: int) -> str:
        together.wait()
        return (kept_or_made("checkpoint", convert) / SAFE).read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["weights"] * 4
    assert len(made) == 1
    assert sorted(entry.name for entry in cache.iterdir()) == ["checkpoint", "checkpoint.lock"]


def test_a_conversion_that_fails_leaves_nothing_unfinished(cache):
    def fail(draft: Path) -> None:
        (draft / "config.json").write_text("{}")
        raise CheckpointError("not a checkpoint")

    with pytest.raises(CheckpointError, match="not a checkpoint"):
        kept_or_made("checkpoint", fail)
    assert kept_or_made("checkpoint", write) == cache / "checkpoint"


@pytest.mark.parametrize("what", ["the cache", "the folder", "the weights"])
def test_what_others_could_have_written_is_refused(cache, what):
    folder = kept_or_made("checkpoint", write)
    open_to_all = {"the cache": cache, "the folder": folder, "the weights": folder / SAFE}[what]
    cache.chmod(0o755)
    open_to_all.chmod(0o777)
    with pytest.raises(BackendError, match=f"others may write into {open_to_all}, and the weights kept there decide"):
        kept_or_made("checkpoint", write)


def test_what_another_user_wrote_is_refused(cache, monkeypatch):
    kept_or_made("checkpoint", write)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(BackendError, match="converted belongs to another user"):
        kept_or_made("checkpoint", write)


@pytest.mark.usefixtures("cache")
def test_a_private_cache_needs_no_look_at_its_files():
    """Where the default permissions let a group write, as on many machines, the folder above keeps it out."""
    folder = kept_or_made("checkpoint", write)
    folder.chmod(0o775)
    assert kept_or_made("checkpoint", write) == folder

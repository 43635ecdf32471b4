"""Checkpoints by name: folders before hubs, and nothing but safe files from these. No hub is asked here."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from engine.errors import CheckpointError
from export.checkpoints.hub import find_checkpoint


@pytest.fixture
def asked(monkeypatch) -> list:
    calls = []

    def download(repository: str, **options: object) -> str:
        calls.append((repository, options["revision"], options["allow_patterns"]))
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_folder_comes_before_a_hub(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "best").mkdir(parents=True)
    for name in ("runs/best", "/nowhere/best", "./runs/other", "../runs/x", "best", "a/b/c"):
        assert find_checkpoint(name) == Path(name)
    assert asked == []


def test_an_id_is_fetched_without_pickles_and_code(asked):
    assert find_checkpoint("Salesforce/blip-image-captioning-base") == Path("/cache/snapshot")
    find_checkpoint("owner/model@refs-pr-1")
    (first, revision, patterns), (second, other, _) = asked
    assert (first, revision) == ("Salesforce/blip-image-captioning-base", None)
    assert (second, other) == ("owner/model", "refs-pr-1")
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".py", ".pt", "*"))]


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection,\nand nothing cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"^owner/model is no folder here, .* no connection, and nothing cached"):
        find_checkpoint("owner/model")

"""The location of the cache folder, and the check of its owner and permissions."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from engine.errors import BackendError
from engine.files.atomic import cache_folder, cache_root, draft_folder, require_private

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs user ids and permissions")


@pytest.fixture
def no_home(tmp_path, monkeypatch) -> Path:
    """A user id without an account and without HOME, as in containers; return the temporary directory."""

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_cache_without_home_is_private_and_temporary(no_home):
    root = cache_root()
    assert root == no_home / f"blip-caption-engine-{os.getuid()}"
    assert root.stat().st_mode & 0o777 == 0o700
    assert cache_root() == root


def test_empty_home_counts_as_no_home(no_home, monkeypatch):
    monkeypatch.setenv("HOME", "")
    assert cache_root().parent == no_home


def test_foreign_temporary_cache_is_refused(no_home, tmp_path):
    root = no_home / f"blip-caption-engine-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to("elsewhere")
    with pytest.raises(BackendError, match="is a link: set HOME or XDG_CACHE_HOME"):
        cache_root()
    root.unlink()
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(BackendError, match="others may write into"):
        cache_root()
    root.rmdir()
    root.write_text("")
    with pytest.raises(BackendError, match=r"cannot be used \(File exists\): set HOME or XDG_CACHE_HOME"):
        cache_root()


def test_foreign_cache_folder_is_refused_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder("0" * 64, "openvino", "compiled graphs are executable code")
    folder.chmod(0o770)
    with pytest.raises(BackendError, match=r"others may write into .*, and compiled graphs are executable code"):
        cache_folder("0" * 64, "openvino", "compiled graphs are executable code")
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(BackendError, match="belongs to another user, and plans are executable code"):
        require_private(folder, "plans are executable code")


def test_draft_folder_deletes_leftovers_of_killed_processes(tmp_path):
    (tmp_path / ".unfinished-bundle-killed" / "draft").mkdir(parents=True)
    with draft_folder(tmp_path / "other") as other, draft_folder(tmp_path / "bundle") as draft:
        assert not (tmp_path / ".unfinished-bundle-killed").exists()
        assert other.is_dir(), "another process is filling it"
        draft.rename(tmp_path / "bundle")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]

"""Recognise files by their first bytes."""

from __future__ import annotations

import pytest

from engine.inputs.kinds import wrong_content


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"\n  <!DOCTYPE html><html>404", "download failed"),
        (b"<HTML lang=en>", "download failed"),
        (b"\x89PNG\r\n\x1a\n", None),
        (b"version 1", None),
        (b'{"a": "<html>"}', None),
    ],
)
def test_wrong_content_names_the_cause(head: bytes, named: str | None) -> None:
    reason = wrong_content(head)
    assert reason is None if named is None else named in (reason or "")

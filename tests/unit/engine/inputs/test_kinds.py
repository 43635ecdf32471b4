"""Recognise files by their first bytes."""

from __future__ import annotations

import pytest

from engine.inputs.kinds import HEAD_BYTES, kind_of, wrong_content


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


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"P6\n512 512\n255\n\x00", "PPM"),
        (b"P5 # made by hand\n# twice\n3 # wide\n2 255 ", "PPM"),
        (b"P4\n#" + b"a long comment " * 20, "PPM"),
        (b"P1\t34\tM\nP2\t51\tF\n", None),
        (b"P3 patients\n", None),
    ],
)
def test_text_about_patients_is_no_picture(head: bytes, kind: str | None) -> None:
    assert kind_of(head[:HEAD_BYTES]) == kind

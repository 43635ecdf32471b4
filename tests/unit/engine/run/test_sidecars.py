"""Sidecars: paths, content, and files that are never overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError, OutputError, UsageError
from engine.inputs.images import ImageFile
from engine.inputs.remote import RemoteFolder
from engine.run.outputs import check_sidecars, joined, sidecar_paths, write_sidecars

TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=8) | st.text(" a,.", max_size=6)


@pytest.mark.parametrize(
    ("mode", "old", "text", "expected"),
    [
        ("overwrite", "tags", " a brain ", "a brain\n"),
        ("append", "tags\n", "a brain", "tags a brain\n"),
        ("append", "tags", ", a brain", "tags, a brain\n"),
        ("append", "", ", a brain", ", a brain\n"),
        ("append", "tags a brain", "a brain", "tags a brain"),
        ("append", "a brain\n", "a brain", "a brain\n"),
        ("append", "a tomcat", "cat", "a tomcat cat\n"),
        ("append", "two\r\nlines\r\n", "a brain", "two\r\nlines a brain\n"),
        ("append", "\udcff", "a brain", "\udcff a brain\n"),
        ("prepend", "tags\n", "a brain", "a brain tags\n"),
        ("prepend", "\ufefftags", "a brain, ", "\ufeffa brain, tags\n"),
        ("prepend", "a brain tags", "a brain", "a brain tags"),
        ("prepend", "a brainstem", "a brain", "a brain a brainstem\n"),
        ("append", "tags", "", "tags"),
    ],
)
def test_content_of_a_sidecar(mode, old, text, expected):
    assert joined(old, text, mode) == expected


@given(TEXTS, TEXTS, st.sampled_from(["overwrite", "append", "prepend"]))
def test_writing_twice_changes_nothing(old, text, mode):
    once = joined(old, text, mode)
    assert joined(once, text, mode) == once
    assert text.strip() in once
    assert mode == "overwrite" or old.strip() in once


def pictures(folder: Path, *names: str, root: Path | None = None) -> list[ImageFile]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [ImageFile(name, folder / name, root=root or folder) for name in names]


def test_sidecar_name(tmp_path):
    from engine.inputs.tables import find_sidecars

    images = pictures(tmp_path, "a.b.PNG", "1.2.840.1", "c.jpeg", "IM-0001")
    paths = sidecar_paths(images, None)
    write_sidecars(dict.fromkeys(paths, "x"), paths, "skip")
    expected = zip(["a.b", "1.2.840.1", "c", "IM-0001"], paths.values(), strict=True)
    assert find_sidecars(tmp_path) == {name: [path] for name, path in expected}


def test_sidecar_dir_has_the_folders_of_the_input(tmp_path):
    images = pictures(tmp_path / "in", "s1/a.png", "s2/a.png")
    images += pictures(tmp_path / "other", "b.png", root=tmp_path / "in")
    images.append(ImageFile("u", Path("s3/u.png"), folder=RemoteFolder("s3://bucket/in")))
    out = tmp_path / "out"
    paths = sidecar_paths(images, out)
    check_sidecars(paths, "overwrite", out, {})
    assert write_sidecars(dict.fromkeys(paths, "x"), paths, "overwrite", out) == (4, 0)
    outside = (tmp_path / "other/b.txt").as_posix().lstrip("/")
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.txt"))
    assert found == sorted(["s1/a.txt", "s2/a.txt", "s3/u.txt", outside])


def test_images_that_cannot_have_a_sidecar_are_refused(tmp_path):
    cases = [
        (pictures(tmp_path, "a.png", "a.jpg"), None, r"a.png and .*a.jpg would share the sidecar .*a.txt"),
        ([ImageFile("u", Path("u.png"), folder=RemoteFolder("s3://bucket"))], None, "add --sidecar-dir"),
        ([ImageFile("u", Path("../u.png"), folder=RemoteFolder("s3://bucket"))], tmp_path, "outside of --sidecar-dir"),
        ([ImageFile("n", tmp_path / ("n" * 252))], None, "too long for a sidecar"),
    ]
    for images, folder, sentence in cases:
        with pytest.raises(UsageError, match=sentence):
            sidecar_paths(images, folder)


@pytest.mark.parametrize("mode", ["overwrite", "append", "prepend"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "kept", "read-only"])
def test_forbidden_sidecars_are_refused_before_the_run(tmp_path, monkeypatch, kind, mode):
    paths = sidecar_paths(pictures(tmp_path, "a.png"), None)
    kept = {}
    if kind == "link":
        (tmp_path / "a.txt").symlink_to("elsewhere")
    elif kind == "folder":
        (tmp_path / "a.txt").mkdir()
    elif kind == "pipe":
        os.mkfifo(tmp_path / "a.txt")
    elif kind == "kept":
        kept = {tmp_path / "a.txt": "the list"}
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match=r"a.txt|not a writable folder") as raised:
        check_sidecars(paths, mode, None, kept)
    assert "\n" not in str(raised.value)


def test_no_link_is_followed_even_a_late_one(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("kept")
    folder = tmp_path / "in"
    paths = sidecar_paths(pictures(folder, "a.png", "b.png"), None)
    check_sidecars(paths, "append", None, {})
    (folder / "a.txt").symlink_to(secret)
    (folder / ".b.txt.tmp").symlink_to(secret)
    with pytest.raises(OutputError, match=r"a\.txt cannot be read: Too many levels"):
        write_sidecars({"a.png": "x"}, paths, "append")
    write_sidecars({"b.png": "x"}, paths, "append")
    assert secret.read_text() == "kept"
    assert (folder / "b.txt").read_text() == "x\n"
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "a.txt", "b.png", "b.txt"]


def test_a_linked_folder_below_the_folder_for_sidecars_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/s1").symlink_to(tmp_path)
    paths = sidecar_paths(pictures(tmp_path / "in", "s1/a.png"), tmp_path / "out")
    for call in (
        lambda: check_sidecars(paths, "skip", tmp_path / "out", {}),
        lambda: write_sidecars({"s1/a.png": "x"}, paths, "skip", tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match="out/s1 is a link"):
            call()
    assert not (tmp_path / "a.txt").exists()


@pytest.mark.parametrize("content", [b"\xff\xfet\0", b"x" * ((1 << 24) + 1)])
def test_other_files_at_the_sidecar_path_are_unchanged(tmp_path, content):
    paths = sidecar_paths(pictures(tmp_path, "a.png"), None)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(EngineError, match=r"a\.txt is "):
        write_sidecars({"a.png": "x"}, paths, "append")
    assert (tmp_path / "a.txt").read_bytes() == content


def test_long_names_and_permissions_are_kept(tmp_path):
    images = pictures(tmp_path, "n" * 251 + ".png", "b.png")
    paths = sidecar_paths(images, None)
    paths["b.png"].touch(mode=0o600)
    write_sidecars(dict.fromkeys(paths, "x"), paths, "overwrite")
    assert (tmp_path / ("n" * 251 + ".txt")).read_text() == "x\n"
    assert paths["b.png"].stat().st_mode & 0o777 == 0o600

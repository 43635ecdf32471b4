"""Images and bundles at URIs: file:// through pyarrow, memory:// through fsspec."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import fsspec
import pytest

import engine.inputs.remote
from engine.bundle.manifest import MANIFEST
from engine.bundle.open import open_bundle
from engine.errors import BundleError, EngineError, ImageError, UsageError
from engine.inputs.images import ImageFile, find_images
from engine.inputs.pixels import decode_image
from engine.inputs.remote import RemoteFolder, location
from engine.run.record import fingerprints
from tests.helpers.tiny import random_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (picture,) = random_pictures(1)
    for name in ("b.png", "a.png", ".hidden.png", "notes.txt", "deep/c.png", "deep/.no/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name, "png")
    return tmp_path


def test_what_has_a_scheme_is_a_uri():
    assert location("s3://bucket/a") == RemoteFolder("s3://bucket/a")
    assert location("a/b") == Path("a/b")
    with pytest.raises(UsageError, match="not a valid URI: s3://"):
        location("s3://[bucket/secret")


def test_credentials_are_never_shown():
    assert str(RemoteFolder("s3://key:secret@bucket/a/?endpoint_override=h:1")) == "s3://bucket/a"
    assert str(RemoteFolder("https://host/a?X-Amz-Signature=secret")) == "https://host/a"
    assert str(RemoteFolder("file:///a?b/")) == "file:///a?b"
    assert str(RemoteFolder("s3://key:sec/ret+@bucket/a")) == "s3://bucket/a"
    assert str(RemoteFolder("hf://datasets/a/b@main/c")) == "hf://datasets/a/b@main/c"
    assert str(RemoteFolder("s3://host:9000/a@b")) == "s3://host:9000/a@b"


class Storage(fsspec.AbstractFileSystem):
    """An HTTP server as fsspec shows it: paths are whole URLs, with their query; after an error nothing exists."""

    protocol = "signed"
    cachable = False
    answer: Exception | bytes = b""

    @classmethod
    def _strip_protocol(cls, path):
        return path

    def info(self, path, **_):
        if isinstance(self.answer, Exception):
            raise FileNotFoundError(path) from self.answer
        if not path.endswith("/a.png?sig=SECRET"):
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.answer), "type": "file"}

    def isdir(self, path):
        return not isinstance(self.answer, Exception) and path == "signed://user:SECRET@host/x?sig=SECRET"

    def find(self, path, **_):
        return {f"{path}/a.png": {"name": f"{path}/a.png", "size": 3, "type": "file"}}

    def _open(self, path, *_, **__):
        self.info(path)
        return io.BytesIO(self.answer)


class StatusError(Exception):
    """Not an OSError, as those of aiohttp."""

    status = 500


@pytest.fixture
def storage(monkeypatch):
    fsspec.register_implementation("signed", Storage, clobber=True)
    engine.inputs.remote._open.cache_clear()
    monkeypatch.setattr(Storage, "answer", b"abc")
    return lambda answer: monkeypatch.setattr(Storage, "answer", answer)


SIGNED = RemoteFolder("signed://user:SECRET@host/x?sig=SECRET")
FAILURES = [
    StatusError("500, message='Internal Server Error', url='signed://user:SECRET@host/x?sig=SECRET'"),
    ConnectionRefusedError("Cannot connect to host, with url: /x?sig=SECRET"),
]


@pytest.mark.usefixtures("storage")
def test_signature_follows_the_file_name():
    (image,) = find_images(SIGNED, recursive=True).images
    assert str(image.source) == "signed://host/x/a.png"
    assert SIGNED.read("a.png", most_bytes=3) == b"abc"


@pytest.mark.parametrize("failure", FAILURES, ids=["status", "refused"])
def test_a_storage_failure_is_named_without_secrets(failure, storage):
    storage(failure)
    said = r"^signed://host/x.* cannot be read: .*(Internal|Cannot connect)"
    for call in (lambda: find_images(SIGNED), lambda: open_bundle(SIGNED), lambda: SIGNED.read("a", most_bytes=1)):
        with pytest.raises(EngineError, match=said) as caught:
            call()
        assert "SECRET" not in str(caught.value)
        assert not isinstance(caught.value, UsageError | BundleError)


def test_an_answer_that_nothing_is_there_is_no_failure(storage):
    storage(type("NotFoundError", (StatusError,), {"status": 404})("404, url='signed://host/x?sig=SECRET'"))
    with pytest.raises(UsageError, match=r"^signed://host/x is not a directory"):
        find_images(SIGNED)
    with pytest.raises(BundleError, match=r"^signed://host/x is not a bundle: it has no manifest\.json"):
        open_bundle(SIGNED)


@pytest.mark.parametrize("recursive", [False, True])
def test_a_uri_is_listed_as_its_directory_is(folder, recursive):
    (folder / "deep/.no/d.png").unlink()  # for a directory a hidden folder is an entry that was left aside
    (folder / "deep/.no").rmdir()
    here = find_images(folder, recursive=recursive)
    there = find_images(RemoteFolder(folder.as_uri()), recursive=recursive)
    assert [image.id for image in there.images] == [image.id for image in here.images]
    assert there.ignored == here.ignored
    for a, b in zip(here.images, there.images, strict=True):
        assert decode_image(b.source).tobytes() == decode_image(a.source).tobytes()


def test_hidden_folders_are_not_entered(folder):
    found = find_images(RemoteFolder(folder.as_uri()), recursive=True)
    assert [image.path.as_posix() for image in found.images] == ["a.png", "b.png", "deep/c.png"]


def test_fsspec_opens_what_pyarrow_does_not_know(folder):
    fsspec.filesystem("memory").pipe("/corpus/a.png", (folder / "a.png").read_bytes())
    (image,) = find_images(RemoteFolder("memory://corpus")).images
    assert str(image.source) == "memory://corpus/a.png"
    assert decode_image(image.source).tobytes() == decode_image(folder / "a.png").tobytes()


def test_a_replaced_file_has_another_fingerprint(folder):
    images = find_images(RemoteFolder(folder.as_uri()), recursive=True).images
    before = fingerprints(images)
    (folder / "deep/c.png").write_bytes(b"other")
    (folder / "a.png").unlink()
    after = fingerprints(images)
    assert after == before | {"c": after["c"], "a": None}
    assert after["c"] != before["c"]


@pytest.mark.parametrize(
    ("uri", "said"), [("file:///no/such", "is not a directory"), ("nosuch://x", "no folder that pyarrow or fsspec")]
)
def test_a_uri_that_leads_nowhere_is_named(uri, said):
    with pytest.raises(UsageError, match=said) as caught:
        find_images(RemoteFolder(uri))
    assert str(caught.value).startswith(uri)


def test_without_pyarrow_one_sentence_names_the_extra(folder, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    engine.inputs.remote._open.cache_clear()
    with pytest.raises(EngineError, match=r"is read by pyarrow, which is missing: pip install 'pyarrow>=15'$"):
        find_images(RemoteFolder(folder.as_uri()))


def test_a_file_that_is_gone_is_one_unreadable_image(folder):
    with pytest.raises(ImageError, match=r"gone\.png"):
        decode_image(ImageFile("gone", Path("gone.png"), 0, RemoteFolder(folder.as_uri())).source)


def test_storage_that_fails_stops_the_run(folder, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr("engine.inputs.remote._open", lambda _: (type("System", (), {"open_input_file": fail})(), "x"))
    with pytest.raises(EngineError, match="is its storage there") as caught:
        decode_image(ImageFile("a", Path("a.png"), 0, RemoteFolder(folder.as_uri())).source)
    assert not isinstance(caught.value, ImageError)


def test_a_bundle_is_copied_once_and_again_when_its_copy_is_damaged(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there = RemoteFolder(tiny_bundle.as_uri())
    bundle = open_bundle(there)
    assert bundle.digest == open_bundle(tiny_bundle).digest == bundle.path.name
    copied = (bundle.path / "encoder.onnx").stat().st_ino
    assert (open_bundle(there).path / "encoder.onnx").stat().st_ino == copied
    (bundle.path / "encoder.onnx").write_bytes(b"damaged")
    assert open_bundle(there).path == bundle.path
    assert (bundle.path / "encoder.onnx").read_bytes() == (tiny_bundle / "encoder.onnx").read_bytes()


def test_a_bundle_that_is_none_or_not_whole_is_refused(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = tmp_path / "bundle"
    other.mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(RemoteFolder(other.as_uri()))
    for path in tiny_bundle.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "encoder.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"encoder\.onnx has changed"):
        open_bundle(RemoteFolder(other.as_uri()))
    (other / "encoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"is incomplete: it has no encoder\.onnx: export it again"):
        open_bundle(RemoteFolder(other.as_uri()))
    (other / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="not a manifest"):
        open_bundle(RemoteFolder(other.as_uri()))


def test_a_cache_and_a_storage_that_fail_are_told_apart(tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BundleError, match=r"cannot be copied to .*: Not a directory: set XDG_CACHE_HOME"):
        open_bundle(RemoteFolder(tiny_bundle.as_uri()))

    class Broken:
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, count: int) -> bytes:
            raise OSError(f"connection lost before {count} bytes")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(RemoteFolder, "open", lambda *_: Broken())
    monkeypatch.setattr(RemoteFolder, "read", lambda *_, **__: (tiny_bundle / MANIFEST).read_bytes())
    with pytest.raises(BundleError, match=r"cannot be read: connection lost before .*: run the same command again"):
        open_bundle(RemoteFolder(tiny_bundle.as_uri()))
    assert not [path for path in (tmp_path / "blip-caption-engine" / "bundles").iterdir() if path.is_dir()]

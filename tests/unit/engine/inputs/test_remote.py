"""Images and bundles at URIs, with fsspec's file:// and memory://, and a web server."""

from __future__ import annotations

import errno
import functools
import http.server
import io
import os
import sys
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

import engine.inputs.remote
from engine.bundle.manifest import MANIFEST
from engine.bundle.open import open_bundle
from engine.errors import BundleError, EngineError, ImageError, UsageError
from engine.inputs.images import ImageFile, find_images
from engine.inputs.pixels import decode_image
from engine.inputs.remote import RemoteFile, RemoteFolder, location
from engine.run.record import fingerprints
from tests.helpers.tiny import random_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (image,) = random_pictures(1)
    for name in ("b.png", "a.png", ".hidden.png", "notes.txt", "deep/c.png", "deep/.no/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name, "png")
    return tmp_path


def test_location_with_a_scheme_is_a_uri():
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
    """An HTTP server like fsspec's: paths are whole URLs with their query, and after an error nothing exists."""

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

    def ls(self, path, **_):
        if isinstance(self.answer, Exception):
            raise self.answer
        return [{"name": f"{path}/a.png", "size": 3, "type": "file"}]

    def _open(self, path, *_, **__):
        self.info(path)
        return io.BytesIO(self.answer)


class StatusError(Exception):
    """Not an OSError, like the errors of aiohttp."""

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
def test_storage_failure_is_reported_without_secrets(failure, storage):
    storage(failure)
    sentence = r"^signed://host/x.* cannot be read: .*(Internal|Cannot connect)"
    for call in (lambda: find_images(SIGNED), lambda: open_bundle(SIGNED), lambda: SIGNED.read("a", most_bytes=1)):
        with pytest.raises(EngineError, match=sentence) as caught:
            call()
        assert "SECRET" not in str(caught.value)
        assert not isinstance(caught.value, UsageError | BundleError)


def test_missing_uri_is_not_a_storage_failure(storage):
    storage(type("NotFoundError", (StatusError,), {"status": 404})("404, url='signed://host/x?sig=SECRET'"))
    with pytest.raises(UsageError, match=r"^signed://host/x is not a directory"):
        find_images(SIGNED)
    with pytest.raises(BundleError, match=r"^signed://host/x is not a bundle: it has no manifest\.json"):
        open_bundle(SIGNED)


@pytest.mark.parametrize("recursive", [False, True])
def test_uri_is_listed_like_its_directory(folder, recursive):
    (folder / "deep/.no/d.png").unlink()  # a local hidden folder is reported as skipped, a remote one is not
    (folder / "deep/.no").rmdir()
    local = find_images(folder, recursive=recursive)
    remote = find_images(RemoteFolder(folder.as_uri()), recursive=recursive)
    assert [image.id for image in remote.images] == [image.id for image in local.images]
    # the folders of a local directory are marked with a slash
    assert sorted(remote.ignored) == sorted(name.rstrip("/") for name in local.ignored)
    for a, b in zip(local.images, remote.images, strict=True):
        assert decode_image(b.source).tobytes() == decode_image(a.source).tobytes()


def test_hidden_folders_are_not_entered(folder):
    found = find_images(RemoteFolder(folder.as_uri()), recursive=True)
    assert [image.path.as_posix() for image in found.images] == ["a.png", "b.png", "deep/c.png"]


def test_images_are_read_from_memory(folder):
    fsspec.filesystem("memory").pipe("/corpus/deep/a.png", (folder / "a.png").read_bytes())
    (image,) = find_images(RemoteFolder("memory://corpus"), recursive=True).images
    assert str(image.source) == "memory://corpus/deep/a.png"
    assert decode_image(image.source).tobytes() == decode_image(folder / "a.png").tobytes()
    with pytest.raises(ValueError, match="larger than 9 bytes"):
        image.source.open(most_bytes=9)


def test_links_at_a_uri_are_followed_to_files_only(folder, tmp_path_factory):
    linked = tmp_path_factory.mktemp("linked folder")
    os.mkfifo(linked / "pipe.png")
    for name, target in {"a": folder / "a.png", "gone": folder / "gone", "pipe-link": linked / "pipe.png"}.items():
        (linked / f"{name}.png").symlink_to(target)
    (linked / "loop").symlink_to(linked)
    found = find_images(RemoteFolder(linked.as_uri()), recursive=True)
    assert [image.path.as_posix() for image in found.images] == ["a.png"]
    decode_image(found.images[0].source)


def test_subfolder_that_cannot_be_listed_is_an_error(folder, monkeypatch):
    listed = LocalFileSystem.ls

    def ls(system, path, **how):
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(system, path, **how)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    with pytest.raises(EngineError, match=r"cannot be read: .*Permission denied: .*deep"):
        find_images(RemoteFolder(folder.as_uri()), recursive=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Lists and sends the files of a folder."""

    def log_message(self, *_: object) -> None:
        pass


def test_images_are_read_from_a_web_server(folder):
    pytest.importorskip("aiohttp")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    (folder / "b.png").rename(folder / "scan é 1.png")
    try:
        found = find_images(RemoteFolder(uri), recursive=True)
        assert [image.id for image in found.images] == ["a", "c", "scan é 1"]
        for image, name in zip(found.images, ("a.png", "deep/c.png", "scan é 1.png"), strict=True):
            assert decode_image(image.source).tobytes() == decode_image(folder / name).tobytes()
        with pytest.raises(UsageError, match="/none is not a directory"):
            find_images(RemoteFolder(f"{uri}/none"))
        with pytest.raises(ImageError, match=r"/none\.png: does not exist$"):
            decode_image(RemoteFile(RemoteFolder(uri), "none.png"))
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(EngineError, match="cannot be read: Cannot connect to host"):
        find_images(RemoteFolder(uri))
    with pytest.raises(EngineError, match="cannot be read: Cannot connect to host"):
        decode_image(found.images[0].source)


def test_replaced_file_has_another_fingerprint(folder):
    images = find_images(RemoteFolder(folder.as_uri()), recursive=True).images
    before = fingerprints(images)
    (folder / "deep/c.png").write_bytes(b"other")
    (folder / "a.png").unlink()
    after = fingerprints(images)
    assert after == before | {"c": after["c"], "a": None}
    assert after["c"] != before["c"]


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [("file:///no/such", "is not a directory"), ("nosuch://x", "cannot be opened by fsspec")],
)
def test_error_names_a_uri_that_does_not_exist(uri, sentence):
    with pytest.raises(UsageError, match=sentence) as caught:
        find_images(RemoteFolder(uri))
    assert str(caught.value).startswith(uri)


@pytest.mark.parametrize(("uri", "package"), [("s3://k:SECRET/@bucket/a", "s3fs"), ("gs://bucket/a", "gcsfs")])
def test_missing_package_names_the_install_command(uri, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=r"^[a-z0-9]+://bucket/a needs .* pip install 's3fs>=.*' 'gcsfs>=.*'$"):
        find_images(RemoteFolder(uri))


def test_keys_in_a_uri_become_options_of_s3(monkeypatch):
    opened = []

    class Bucket(MemoryFileSystem):
        cachable = False

        def __init__(self, **options: str) -> None:
            super().__init__()
            opened.append(options)

        def ls(self, *_, **__):
            error = FileNotFoundError("The specified bucket does not exist")
            error.__cause__ = type("ClientError", (Exception,), {"response": answer})()
            raise error

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    folder = RemoteFolder("s3://key:sec/r%2Fet@bucket/a")
    answer = {"ResponseMetadata": {"HTTPStatusCode": 404}}
    with pytest.raises(UsageError, match=r"^s3://bucket/a is not a directory"):
        find_images(folder)
    assert opened == [{"key": "key", "secret": "sec/r/et"}]
    answer = {"ResponseMetadata": {"HTTPStatusCode": 503}}
    with pytest.raises(EngineError, match=r"^s3://bucket/a cannot be read"):
        find_images(folder)


def test_unreachable_hub_is_not_a_missing_folder(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match=r"^hf://owner/name/a cannot be read: .*offline") as caught:
        find_images(RemoteFolder("hf://owner/name/a"))
    assert not isinstance(caught.value, UsageError)


def test_missing_file_is_an_unreadable_image(folder):
    with pytest.raises(ImageError, match=r"gone\.png"):
        decode_image(ImageFile("gone", Path("gone.png"), 0, RemoteFolder(folder.as_uri())).source)


class Deleted(io.BytesIO):
    """A file that was listed, and is missing when its content is requested."""

    def read(self, *_: object) -> bytes:
        raise FileNotFoundError("The specified key does not exist")


@pytest.mark.usefixtures("storage")
def test_file_deleted_after_listing_is_an_unreadable_image(monkeypatch):
    monkeypatch.setattr(Storage, "_open", lambda *_, **__: Deleted())
    with pytest.raises(ImageError, match=r"^signed://host/x/a\.png: does not exist$"):
        decode_image(RemoteFile(SIGNED, "a.png"))


def test_failing_storage_stops_the_run(folder, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr("engine.inputs.remote._open", lambda _: (type("System", (), {"open": fail})(), "x"))
    with pytest.raises(EngineError, match="check the address and your access rights") as caught:
        decode_image(ImageFile("a", Path("a.png"), 0, RemoteFolder(folder.as_uri())).source)
    assert not isinstance(caught.value, ImageError)


def test_bundle_is_copied_once_unless_its_copy_is_damaged(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remote = RemoteFolder(tiny_bundle.as_uri())
    bundle = open_bundle(remote)
    assert bundle.digest == open_bundle(tiny_bundle).digest == bundle.path.name
    copied = (bundle.path / "encoder.onnx").stat().st_ino
    assert (open_bundle(remote).path / "encoder.onnx").stat().st_ino == copied
    (bundle.path / "encoder.onnx").write_bytes(b"damaged")
    assert open_bundle(remote).path == bundle.path
    assert (bundle.path / "encoder.onnx").read_bytes() == (tiny_bundle / "encoder.onnx").read_bytes()


def test_missing_or_incomplete_bundle_is_refused(tiny_bundle, tmp_path, monkeypatch):
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


def test_errors_of_cache_and_storage_are_distinguished(tiny_bundle, tmp_path, monkeypatch):
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

"""Read folders at a URI (file://, http://, https://, hf://, s3://, gs:// and others) through fsspec.

A URI may contain credentials and options (`user:key@`, `?...`). Messages never show them.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from engine.errors import EngineError, UsageError, install_command

PLAIN = ("file", "memory")
"""Schemes in which `?` is part of a name. In others it begins options, or a signature that grants access."""
S3, GCS, HTTP = ("s3", "s3a"), ("gs", "gcs"), ("http", "https")
"""Schemes whose packages the extra `remote` installs."""
TREES = (*S3, *GCS, "hf", "abfs", "abfss", "az")
"""Schemes whose storages list a tree in few requests. The `find` of others omits folders that it cannot list."""
CHUNK_BYTES = 1 << 24
NOT_THERE = (404, 410)
"""HTTP status codes for a URL that does not exist."""
CHANGING = ("mtime", "LastModified", "last_modified", "updated", "ETag", "blob_id")
"""What storages call the time of a file's last change, or the hash of its content; the first known one is used."""
_CREDENTIALS = re.compile(r"^(?:[^\s'\"?#]*:(?!\d+/)[^\s'\"?#]*@|[^\s'\"/?#]*@)")
"""Credentials before the host. A secret key may contain a `/`, which would end the host; a port is not a secret."""
_URI = re.compile(r"\b([a-z][a-z0-9+.-]*)://([^\s'\"]+)", re.IGNORECASE)
_QUERY = re.compile(r"\?[\w.%-]+=[^\s'\"]*")
"""Libraries also name URLs without scheme and host, as in `with url: /x?sig=1`."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URI. Its string form has no credentials or options."""

    uri: str

    def __str__(self) -> str:
        scheme, _, rest = self.uri.partition("://")
        return f"{scheme}://{_public(scheme, rest)}".rstrip("/")

    def list(self, *, recursive: bool = False) -> dict[str, tuple[int, int] | None]:
        """Return {path inside the folder: (bytes, a number that changes with the file)}, with None for other entries.

        Raises UsageError if the folder does not exist, and EngineError if its storage does not answer.
        """
        system, base = _open(self.uri)
        try:
            system.invalidate_cache()  # a run lists a folder again at its end, to notice changed files
            is_tree = recursive and self.uri.partition("://")[0] in TREES
            entries = list(system.find(base, detail=True).values()) if is_tree else []
            entries = entries or system.ls(base, detail=True)  # which raises an error if the folder does not exist
            if [entry["name"].rstrip("/") for entry in entries if entry["type"] == "file"] == [base]:
                raise NotADirectoryError
            if recursive and not is_tree:
                entries = list(_walk(system, base, entries))
            stamps = {_relative(entry["name"], base): _stamp(system, entry) for entry in entries}
        except Exception as error:  # fsspec passes on the errors of each storage's own library
            explained = _explained(self, error)
            if isinstance(explained, FileNotFoundError):
                raise UsageError(f"{self} is not a directory: give a folder") from None
            raise explained from error
        return {name: stamp for name, stamp in stamps.items() if name}

    def shown(self, name: str) -> str:
        """Return the name of a file in readable form: web servers list `a%20b.png` for `a b.png`."""
        return unquote(name) if self.uri.partition("://")[0] in HTTP else name

    def read(self, name: str, *, most_bytes: int) -> bytes:
        """Return the content of a file inside the folder.

        Raises FileNotFoundError or PermissionError, ValueError if it is larger than `most_bytes`, and EngineError if
        the storage does not answer.
        """
        content = bytearray()
        with self.open(name) as stream:
            size = getattr(stream, "size", None) or 0  # some web servers do not send it
            try:
                while max(size, len(content)) <= most_bytes and (chunk := stream.read(CHUNK_BYTES)):
                    content += chunk
            except Exception as error:
                raise _explained(RemoteFile(self, name), error) from error
        if max(size, len(content)) > most_bytes:
            raise ValueError(f"larger than {most_bytes} bytes, refused")
        return bytes(content)

    def open(self, name: str) -> IO[bytes]:
        """Open a file inside the folder; see `read` for the errors."""
        system, base = _open(self.uri)
        try:
            stream: IO[bytes] = system.open(_join(base, name), "rb")
        except (PermissionError, IsADirectoryError):
            raise
        except Exception as error:
            raise _explained(RemoteFile(self, name), error) from error
        return stream


@dataclass(frozen=True)
class RemoteFile:
    """A file inside a remote folder."""

    folder: RemoteFolder
    name: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def open(self, *, most_bytes: int) -> IO[bytes]:
        """Read the whole file and return it as a stream. Decoders read in small steps, and each would be a request."""
        return io.BytesIO(self.folder.read(self.name, most_bytes=most_bytes))


Location = Path | RemoteFolder


def location(text: str) -> Location:
    """Parse a path or URI. Returns a RemoteFolder if the text has a scheme; raises UsageError for an invalid URI."""
    if "://" not in text:
        return Path(text)
    try:
        urlsplit(text)
    except ValueError as error:
        raise UsageError(f"not a valid URI: {text.partition('://')[0]}://...: {error}") from None
    return RemoteFolder(text)


def without_secrets(text: str) -> str:
    """Remove the credentials and query strings of all URIs in a message.

    Example: `GET http://user:key@host/x?sig=1 failed` becomes `GET http://host/x failed`.
    """
    return _URI.sub(lambda match: f"{match[1]}://{_public(match[1].lower(), match[2])}", text)


def _public(scheme: str, rest: str) -> str:
    """Return the part of a URI after `scheme://` without secrets."""
    return _CREDENTIALS.sub("", rest if scheme in PLAIN else rest.partition("?")[0])


@functools.lru_cache(maxsize=16)
def _open(uri: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URI, and the path of the folder inside it."""
    import fsspec  # only here, because it takes long

    shown = RemoteFolder(uri)
    scheme, _, rest = uri.partition("://")
    options = {}
    if scheme == "file":
        uri = unquote(uri)
    elif scheme in S3 and (match := _CREDENTIALS.match(rest)):  # s3fs takes them only as options
        key, _, secret = match[0][:-1].partition(":")
        uri, options = f"{scheme}://{rest[match.end() :]}", {"key": unquote(key), "secret": unquote(secret)}
    elif scheme in GCS:  # gcsfs logs a traceback before it raises the same error
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        system, base = fsspec.core.url_to_fs(uri, **options)
    except ImportError as error:
        remedy = install_command("remote") if scheme in (*S3, *GCS, *HTTP) else one_line_of(error)
        raise EngineError(f"{shown} needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        raise UsageError(f"{shown} cannot be opened by fsspec: {one_line_of(error)}") from None
    except Exception as error:  # some storages are connected at once
        raise EngineError(f"{shown} cannot be opened: {one_line_of(error)}") from error
    return system, base.rstrip("/")


def _walk(system: Any, folder: str, entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a folder and of all folders below it."""
    for entry in entries:
        yield entry
        if entry["type"] == "directory" and entry["name"].rstrip("/") != folder.rstrip("/"):
            with suppress(FileNotFoundError):  # deleted meanwhile, or a dead link of a web page
                yield from _walk(system, entry["name"], system.ls(entry["name"], detail=True))


def _stamp(system: Any, entry: dict[str, Any]) -> tuple[int, int] | None:
    """Return the size of a file in bytes and a number that changes with it, or None if the entry is not a file."""
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(system, LocalFileSystem):  # its entries do not follow links, and have rounded times
        path = Path(entry["name"])
        status = path.stat() if path.is_file() else None
        return status and (status.st_size, status.st_mtime_ns)
    if entry["type"] != "file":
        return None
    changed = next((entry[key] for key in CHANGING if entry.get(key)), "")
    return entry.get("size") or 0, zlib.crc32(str(changed).encode())


def _join(base: str, name: str) -> str:
    """Return the path of a file in a folder. For HTTP `base` is a whole URL, whose query moves after the file name."""
    folder, mark, query = base.partition("?") if "://" in base else (base, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def _relative(path: str, base: str) -> str:
    if "://" in base and not path.startswith(f"{base}/"):  # a signed URL, whose server lists signed paths
        path, base = path.partition("?")[0], base.partition("?")[0]
    return path.lstrip("/").removeprefix(base.lstrip("/")).lstrip("/")


def _explained(shown: RemoteFolder | RemoteFile, error: BaseException) -> Exception:
    """Return the error to raise: FileNotFoundError if a file or folder does not exist, else EngineError with the cause.

    Over HTTP every failure, such as a refused connection, becomes a FileNotFoundError, with the failure as its cause.
    """
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        statuses = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:  # of aiohttp, azure, requests or httpx
        statuses = [getattr(place, name, None) for place in (error, response) for name in ("status", "status_code")]
    if isinstance(error, FileNotFoundError | NotADirectoryError) or any(status in NOT_THERE for status in statuses):
        return FileNotFoundError(errno.ENOENT, "does not exist", str(shown))
    return EngineError(f"{shown} cannot be read: {one_line_of(error)}: check the address and your access rights")


def one_line_of(error: BaseException) -> str:
    """Return the message of a storage library's error on one line, without secrets."""
    return " ".join(_QUERY.sub("", without_secrets(str(error))).split())[:300] or type(error).__name__

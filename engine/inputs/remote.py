"""Folders at a URI: s3://, gs://, hdfs://, file:// through pyarrow, anything else through fsspec; knows no images.

Needs pyarrow, which the extra `ray` brings. Credentials and options (`user:key@`, `?...`) may be part of a URI;
messages never show them.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from engine.errors import EngineError, UsageError, install_command

PLAIN = ("file", "memory")
"""Schemes in which `?` is part of a name; elsewhere it begins options, or a signature that lets its bearer in."""
NOT_THERE = (404, 410)
"""HTTP status codes of an answer that nothing is at a URL."""
_CREDENTIALS = re.compile(r"^(?:[^\s'\"?#]*:(?!\d+/)[^\s'\"?#]*@|[^\s'\"/?#]*@)")
"""What stands before the host. A secret key may hold a `/`, which would end the host; a port is no secret."""
_URI = re.compile(r"\b([a-z][a-z0-9+.-]*)://([^\s'\"]+)", re.IGNORECASE)
_QUERY = re.compile(r"\?[\w.%-]+=[^\s'\"]*")
"""Libraries also name URLs without scheme and host, as in `with url: /x?sig=1`."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URI; as a string without its credentials and options."""

    uri: str

    def __str__(self) -> str:
        scheme, _, rest = self.uri.partition("://")
        return f"{scheme}://{_public(scheme, rest)}".rstrip("/")

    def list(self, *, recursive: bool = False) -> dict[str, tuple[int, ...] | None]:
        """Return {path inside the folder: (bytes, time of change in ns)} of files, None for what is not a file.

        Raises UsageError when there is no such folder, EngineError when its storage does not answer.
        """
        system, base = _open(self.uri)
        from pyarrow import fs

        try:
            found = system.get_file_info(fs.FileSelector(base, recursive=recursive))
        except (FileNotFoundError, NotADirectoryError):
            if (reason := _failure_behind(system, base)) is not None:
                raise _trouble(str(self), reason) from reason
            raise UsageError(f"{self} is not a directory: give a folder") from None
        except Exception as error:  # fsspec passes on what each storage's library raises
            raise _trouble(str(self), error) from error
        return {
            _relative(info.path, base): (info.size or 0, info.mtime_ns or 0) if info.type == fs.FileType.File else None
            for info in found
        }

    def read(self, name: str, *, most_bytes: int) -> bytes:
        """Return the content of a file inside the folder.

        Raises FileNotFoundError or PermissionError, ValueError when it is larger than `most_bytes`, and EngineError
        when the storage does not answer.
        """
        with self.open(name) as stream:
            if stream.size() > most_bytes:
                raise ValueError(f"larger than {most_bytes} bytes, refused")
            try:
                content: bytes = stream.readall()
            except Exception as error:
                raise _trouble(str(RemoteFile(self, name)), error) from error
        return content

    def open(self, name: str) -> Any:
        """Return a pyarrow NativeFile; see `read` for the errors."""
        system, base = _open(self.uri)
        path = _join(base, name)
        try:
            return system.open_input_file(path)
        except (PermissionError, IsADirectoryError):
            raise
        except FileNotFoundError:
            if (reason := _failure_behind(system, path)) is not None:
                raise _trouble(str(RemoteFile(self, name)), reason) from reason
            raise
        except Exception as error:
            raise _trouble(str(RemoteFile(self, name)), error) from error


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
        """Return its whole content as a stream: decoders read in small steps, each of which would be a request."""
        return io.BytesIO(self.folder.read(self.name, most_bytes=most_bytes))


Location = Path | RemoteFolder


def location(text: str) -> Location:
    """Return the folder that a text means: a URI where it has a scheme, else a path. Raises UsageError."""
    if "://" not in text:
        return Path(text)
    try:
        urlsplit(text)
    except ValueError as error:
        raise UsageError(f"not a valid URI: {text.partition('://')[0]}://...: {error}") from None
    return RemoteFolder(text)


def without_secrets(text: str) -> str:
    """Return a message without the credentials and the query strings of the URIs in it.

    Example: `GET http://user:key@host/x?sig=1 failed` becomes `GET http://host/x failed`.
    """
    return _URI.sub(lambda found: f"{found[1]}://{_public(found[1].lower(), found[2])}", text)


def _public(scheme: str, rest: str) -> str:
    """Return what follows `scheme://` as it may be shown."""
    return _CREDENTIALS.sub("", rest if scheme in PLAIN else rest.partition("?")[0])


@functools.lru_cache(maxsize=16)
def _open(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI and the path of the folder in it."""
    try:
        import pyarrow as pa
        from pyarrow import fs
    except ImportError:
        raise EngineError(
            f"{RemoteFolder(uri)} is read by pyarrow, which is missing: {install_command('parquet')}"
        ) from None
    try:
        system, base = fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        system, base = _open_fsspec(uri)
    except OSError as error:
        raise _trouble(str(RemoteFolder(uri)), error) from error
    return system, base.rstrip("/")


def _open_fsspec(uri: str) -> tuple[Any, str]:
    """The same through fsspec, which knows more schemes."""
    from pyarrow import fs

    shown = RemoteFolder(uri)
    try:
        import fsspec

        system, base = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise EngineError(f"{shown} cannot be opened: {one_line_of(error)}") from None
    except ValueError as error:
        raise UsageError(f"{shown} is no folder that pyarrow or fsspec can open: {one_line_of(error)}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(system)), base


def _join(base: str, name: str) -> str:
    """Return the path of a file in a folder. HTTP's folder is a whole URL: its query follows the file's name."""
    folder, mark, query = base.partition("?") if "://" in base else (base, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def _relative(path: str, base: str) -> str:
    if "://" in base and not path.startswith(f"{base}/"):  # a signed URL, and what its server lists is signed, too
        path, base = path.partition("?")[0], base.partition("?")[0]
    return path.lstrip("/").removeprefix(base.lstrip("/")).lstrip("/")


def _failure_behind(system: Any, path: str) -> Exception | None:
    """Return why a storage could not tell what is at `path`; None if it answered that nothing is there.

    isdir, isfile and exists of fsspec are False after any error, a refused connection included. Its info raises the
    error, but over HTTP as the cause of a FileNotFoundError.
    """
    storage = getattr(getattr(system, "handler", None), "fs", None)
    if storage is None:
        return None
    try:
        storage.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        cause = error.__cause__
        answered = cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in NOT_THERE
        return None if answered or not isinstance(cause, Exception) else cause
    except Exception as error:
        return error
    return None


def _trouble(name: str, error: Exception) -> EngineError:
    return EngineError(f"{name} cannot be read: {one_line_of(error)}: is its storage there, and are you allowed in?")


def one_line_of(error: Exception) -> str:
    """Return what a storage's library says of a failure, on one line and without secrets."""
    return " ".join(_QUERY.sub("", without_secrets(str(error))).split())[:300] or type(error).__name__

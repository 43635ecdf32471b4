"""Read folders at a URI: s3://, gs://, hdfs:// and file:// through pyarrow, other schemes through fsspec.

Needs pyarrow, which the extra `ray` installs. A URI may contain credentials and options (`user:key@`, `?...`). Messages
never show them.
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
"""Schemes in which `?` is part of a name. In others it begins options, or a signature that grants access."""
NOT_THERE = (404, 410)
"""HTTP status codes for a URL that does not exist."""
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

    def list(self, *, recursive: bool = False) -> dict[str, tuple[int, ...] | None]:
        """Return {path inside the folder: (bytes, modification time in ns)}; the value is None if it is not a file.

        Raises UsageError if the folder does not exist, and EngineError if its storage does not answer.
        """
        system, base = _open(self.uri)
        from pyarrow import fs

        try:
            entries = system.get_file_info(fs.FileSelector(base, recursive=recursive))
        except (FileNotFoundError, NotADirectoryError):
            if (reason := _hidden_failure(system, base)) is not None:
                raise _trouble(str(self), reason) from reason
            raise UsageError(f"{self} is not a directory: give a folder") from None
        except Exception as error:  # fsspec passes on the errors of each storage's own library
            raise _trouble(str(self), error) from error
        return {
            _relative(info.path, base): (info.size or 0, info.mtime_ns or 0) if info.type == fs.FileType.File else None
            for info in entries
        }

    def read(self, name: str, *, most_bytes: int) -> bytes:
        """Return the content of a file inside the folder.

        Raises FileNotFoundError or PermissionError, ValueError if it is larger than `most_bytes`, and EngineError if
        the storage does not answer.
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
        """Open a file inside the folder as a pyarrow NativeFile; see `read` for the errors."""
        system, base = _open(self.uri)
        path = _join(base, name)
        try:
            return system.open_input_file(path)
        except (PermissionError, IsADirectoryError):
            raise
        except FileNotFoundError:
            if (reason := _hidden_failure(system, path)) is not None:
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
    """Return the file system of a URI, and the path of the folder inside it."""
    try:
        import pyarrow as pa
        from pyarrow import fs
    except ImportError:
        raise EngineError(
            f"{RemoteFolder(uri)} needs pyarrow, which is not installed: {install_command('parquet')}"
        ) from None
    try:
        system, base = fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        system, base = _open_fsspec(uri)
    except OSError as error:
        raise _trouble(str(RemoteFolder(uri)), error) from error
    return system, base.rstrip("/")


def _open_fsspec(uri: str) -> tuple[Any, str]:
    """Like `_open`, through fsspec, which supports more schemes."""
    from pyarrow import fs

    shown = RemoteFolder(uri)
    try:
        import fsspec

        system, base = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise EngineError(f"{shown} cannot be opened: {one_line_of(error)}") from None
    except ValueError as error:
        raise UsageError(f"{shown} cannot be opened by pyarrow or fsspec: {one_line_of(error)}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(system)), base


def _join(base: str, name: str) -> str:
    """Return the path of a file in a folder. For HTTP `base` is a whole URL, whose query moves after the file name."""
    folder, mark, query = base.partition("?") if "://" in base else (base, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def _relative(path: str, base: str) -> str:
    if "://" in base and not path.startswith(f"{base}/"):  # a signed URL, whose server lists signed paths
        path, base = path.partition("?")[0], base.partition("?")[0]
    return path.lstrip("/").removeprefix(base.lstrip("/")).lstrip("/")


def _hidden_failure(system: Any, path: str) -> Exception | None:
    """Return the error that made a storage report `path` as missing, or None if the path really does not exist.

    fsspec's isdir, isfile and exists return False after any error, including a refused connection. Its info raises the
    error, but over HTTP only as the cause of a FileNotFoundError.
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
    return EngineError(f"{name} cannot be read: {one_line_of(error)}: check the address and your access rights")


def one_line_of(error: Exception) -> str:
    """Return the message of a storage library's error on one line, without secrets."""
    return " ".join(_QUERY.sub("", without_secrets(str(error))).split())[:300] or type(error).__name__

"""Folders at a URI: s3://, gs://, hdfs://, file:// through pyarrow, anything else through fsspec; knows no images.

Needs pyarrow, which the extra `ray` brings. Credentials and options (`user:key@`, `?...`) may be part of a URI;
they are never shown.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from engine.errors import EngineError, UsageError, install_command

PLAIN = ("file", "memory")
"""Schemes in which `?` is part of a name; elsewhere it begins options, or a signature that lets its bearer in."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URI; as a string without its credentials and options."""

    uri: str

    def __str__(self) -> str:
        parts = urlsplit(self.uri)
        query = parts.query if parts.scheme in PLAIN else ""
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query)).rstrip("/")

    def list(self, *, recursive: bool = False) -> dict[str, tuple[int, ...] | None]:
        """Return {path inside the folder: (bytes, time of change in ns)} of files, None for what is not a file.

        Raises UsageError when there is no such folder, EngineError when its storage does not answer.
        """
        system, base = _open(self.uri)
        from pyarrow import fs

        try:
            found = system.get_file_info(fs.FileSelector(base, recursive=recursive))
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"{self} is not a directory: give a folder") from None
        except OSError as error:
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
            except OSError as error:
                raise _trouble(str(RemoteFile(self, name)), error) from error
        return content

    def open(self, name: str) -> Any:
        """Return a pyarrow NativeFile; see `read` for the errors."""
        system, base = _open(self.uri)
        try:
            return system.open_input_file(f"{base}/{name}")
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError as error:
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
        raise UsageError(f"a URI beginning with {text.partition('://')[0]}:// is none: {error}") from None
    return RemoteFolder(text)


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
        raise EngineError(f"{shown} cannot be opened: {_line(error)}") from None
    except ValueError as error:
        raise UsageError(f"{shown} is no folder that pyarrow or fsspec can open: {_line(error)}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(system)), base


def _relative(path: str, base: str) -> str:
    return path.lstrip("/").removeprefix(base.lstrip("/")).lstrip("/")


def _trouble(name: str, error: OSError) -> EngineError:
    return EngineError(f"{name} cannot be read: {_line(error)}: is its storage there, and are you allowed in?")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

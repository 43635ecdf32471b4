"""A minimal Hugging Face hub on the loopback interface, to be set as HF_ENDPOINT.

It supports only what huggingface_hub requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

JSON = {"Content-Type": "application/json"}


@dataclass
class Hub:
    """Repositories {owner/name: folder}, of which those in `gated` require access.

    The first download of a file in `cut` stops halfway.
    """

    endpoint: str
    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    """Downloads, as `NAME from FIRST_BYTE`."""
    commits: dict[str, str] = field(default_factory=dict)
    """The newest commit of a repository, of which only the newest exists; by default a hash of its name."""


class Handler(BaseHTTPRequestHandler):
    """Handles the requests of huggingface_hub: lists of files, and files or byte ranges."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.hub.repositories.get(name)
        if name in self.server.hub.gated:
            return self.refuse(403, "GatedRepo")
        if folder is None:
            return self.refuse(404, "RepoNotFound")
        commit = self.server.hub.commits.get(name) or hashlib.sha1(name.encode()).hexdigest()
        if len(rest) > 1 and rest[1] not in ("main", commit):
            return self.refuse(404, "RevisionNotFound")
        path = folder.joinpath(*rest[2:])
        if not path.exists():
            return self.refuse(404, "EntryNotFound")
        if not is_api:
            return self.send_file(path, commit, with_body=with_body)
        entries = path.rglob("*") if "recursive=true" in self.path.lower() else path.iterdir()
        listed = list_tree(folder, entries, commit) if rest[:1] == ["tree"] else list_files(folder, name, commit)
        return self.send(200, json.dumps(listed).encode(), JSON, with_body=with_body)

    def send_file(self, path: Path, commit: str, *, with_body: bool) -> None:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        if with_body:
            self.server.hub.asked.append(f"{path.name} from {first}")
        if asked:
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self.send(206 if asked else 200, part, headers, with_body=with_body, name=path.name)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, with_body=True)

    def send(
        self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool, name: str | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if not with_body or self.command == "HEAD":
            return
        if name in self.server.hub.cut:
            self.server.hub.cut.remove(name)
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)


class HubServer(ThreadingHTTPServer):
    """A hub on a free port."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = Hub(f"http://127.0.0.1:{self.server_port}")


def list_tree(root: Path, entries: Iterable[Path], commit: str) -> object:
    """Return entries of a repository in the format of the hub's API, for file systems and release 1."""
    return [
        {
            "type": "file" if path.is_file() else "directory",
            "path": path.relative_to(root).as_posix(),
            "size": path.stat().st_size,
            "oid": commit,
        }
        for path in sorted(entries)
    ]


def list_files(folder: Path, name: str, commit: str) -> object:
    """Return the files of a repository in the format of the hub's API."""
    siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in sorted(folder.iterdir())]
    return {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """Serve a hub until the context exits."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()

"""A Hugging Face hub on the loopback interface, as much of it as its client asks: to be set as HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

JSON = {"Content-Type": "application/json"}


@dataclass
class Hub:
    """Repositories {owner/name: folder}; those in `gated` ask for access. Files in `cut` end early once."""

    endpoint: str
    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    """Paths that were asked for, with the first byte of a range behind them."""


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """Serve a hub until the context is left."""
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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
            folder = hub.repositories.get(name)
            if name in hub.gated:
                return self.refuse(403, "GatedRepo")
            if folder is None:
                return self.refuse(404, "RepoNotFound")
            commit = hashlib.sha1(name.encode()).hexdigest()
            if len(rest) > 1 and rest[1] not in ("main", commit):
                return self.refuse(404, "RevisionNotFound")
            if is_api:
                paths = sorted(folder.iterdir())
                if rest[:1] == ["tree"]:  # asked for by the client from release 1 on
                    tree = [
                        {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": commit}
                        for path in paths
                    ]
                    return self.send(200, json.dumps(tree).encode(), JSON, with_body=with_body)
                files = [{"rfilename": path.name} for path in paths]
                body = json.dumps({"id": name, "sha": commit, "siblings": files, "tags": [], "private": False}).encode()
                return self.send(200, body, JSON, with_body=with_body)
            path = folder / rest[-1]
            if not path.is_file():
                return self.refuse(404, "EntryNotFound")
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
            first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if with_body:
                hub.asked.append(f"{path.name} from {first}")
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self.send(206 if first else 200, content[first:], headers, with_body=with_body, name=path.name)

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
            if name in hub.cut:
                hub.cut.remove(name)
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

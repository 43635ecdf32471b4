"""Equal images are captioned once, and captions leave in the order of their images; knows nothing of decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator

from engine.captions import Alternative, Caption

REMEMBERED = 4096
"""Distinct images whose captions are kept for repeats: a few megabytes."""


class Repeats:
    """Equal pixels are captioned once; the last REMEMBERED captions are kept, so that memory does not grow."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, list[tuple[int, str, str | None, float]]] = {}
        self._known: dict[bytes, tuple[Alternative, ...]] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether any image waits for a caption."""
        return bool(self._waiting)

    def known(self, digest: bytes) -> tuple[Alternative, ...] | None:
        """Return what was said of these pixels, None where nothing was."""
        return self._known.get(digest)

    def wait(self, digest: bytes, index: int, name: str, file_sha256: str | None = None) -> bool:
        """Let image `index` wait for the caption of these pixels; return whether it is the first that does."""
        self._waiting.setdefault(digest, []).append((index, name, file_sha256, time.perf_counter()))
        return len(self._waiting[digest]) == 1

    def resolve(self, digest: bytes, alternatives: tuple[Alternative, ...]) -> Iterator[tuple[int, Caption]]:
        """Yield the index and the caption of every image that waited for these pixels."""
        now = time.perf_counter()
        self._known[digest] = alternatives
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        for index, name, file_sha256, since in self._waiting.pop(digest):
            yield index, Caption(name, alternatives, latency_s=now - since, file_sha256=file_sha256)


class InOrder:
    """Hands out captions in the order of their images."""

    def __init__(self) -> None:
        self._early: dict[int, Caption] = {}
        self._next = 0

    def add(self, index: int, caption: Caption) -> None:
        """Take in the caption of image `index`."""
        self._early[index] = caption

    def ready(self) -> Iterator[Caption]:
        """Yield the captions whose turn it is."""
        while self._next in self._early:
            yield self._early.pop(self._next)
            self._next += 1

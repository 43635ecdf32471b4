"""Runtimes that execute a bundle's graphs; `open_backend` picks one by name."""

from __future__ import annotations

from engine.backends.base import Backend, Cache, Encoded, StepInputs
from engine.bundle import Bundle
from engine.errors import UsageError

BACKENDS = ("auto", "cpu", "cuda", "tensorrt")
"""Names `open_backend` takes; all but `auto` are ONNX Runtime with the provider of that name."""

__all__ = ["BACKENDS", "Backend", "Cache", "Encoded", "StepInputs", "open_backend"]


def open_backend(bundle: Bundle, name: str = "auto", *, threads: int | None = None) -> Backend:
    """Load the bundle's graphs into the backend called `name`, with `threads` CPU threads (None: all cores).

    Only `auto` may choose, and what it chose is `Backend.name`. Raises UsageError for an unknown name,
    BackendError when the runtime or the provider is not there.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    from engine.backends.ort import OrtBackend

    return OrtBackend(bundle, name, threads=threads)

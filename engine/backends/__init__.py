"""Runtimes that execute a bundle's graphs; `open_backend` picks one by name."""

from __future__ import annotations

from pathlib import Path

from engine.bundle.manifest import Bundle
from engine.decoding.backend import Backend, Cache, Encoded, StepInputs
from engine.errors import UsageError

BACKENDS = ("auto", "cpu", "cuda", "tensorrt", "trt")
"""Names `open_backend` takes: ONNX Runtime with the provider of that name, or (trt) TensorRT itself with plans made by
`engine plan`.
"""

__all__ = ["BACKENDS", "Backend", "Cache", "Encoded", "StepInputs", "check_choice", "open_backend", "require_backend"]


def check_choice(name: str, plans: Path | None = None, cuda_graphs: bool = False) -> None:
    """Raise UsageError for an unknown name, or for options of trt beside another one; looks at no machine."""
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name != "trt" and (plans is not None or cuda_graphs):
        raise UsageError(f"plans and CUDA graphs are for the backend trt, not for {name}: leave these options out")


def require_backend(name: str) -> str:
    """Return the name of the backend that `name` means here: only `auto` may choose.

    Raises UsageError for an unknown name, BackendError, in one sentence and at once, when something is missing.
    """
    check_choice(name)
    if name == "trt":
        from engine.backends.trt import require
    else:
        from engine.backends.providers import choose, require

        name = choose(name)
    require(name)
    return name


def open_backend(
    bundle: Bundle,
    name: str = "auto",
    *,
    threads: int | None = None,
    plans: Path | None = None,
    cuda_graphs: bool = False,
) -> Backend:
    """Load the bundle's graphs into the backend called `name`, with `threads` CPU threads (None: all cores).

    `plans` is where `engine plan` put what `trt` runs, None where it puts them by itself; with `cuda_graphs` steps of
    one shape are captured and replayed. What `auto` chose is `Backend.name`. Raises as require_backend does, and
    BundleError or BackendError where graphs or plans are not the bundle's.
    """
    check_choice(name, plans, cuda_graphs)
    name = require_backend(name)
    if name == "cpu":
        from engine.backends.ort import OrtBackend

        return OrtBackend(bundle, name, threads=threads)
    from engine.backends.buckets import Bucketed

    if name == "trt":
        from engine.backends.trt import TrtBackend

        return Bucketed(TrtBackend.load(bundle, plans, uses_cuda_graphs=cuda_graphs))
    from engine.backends.ort import OrtBackend

    return Bucketed(OrtBackend(bundle, name, threads=threads))

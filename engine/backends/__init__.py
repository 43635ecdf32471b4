"""Runtimes that execute a bundle's graphs; `open_backend` picks one by name."""

from __future__ import annotations

from dataclasses import replace

from engine.bundle.manifest import Bundle
from engine.decoding.backend import Backend, Cache, Encoded, StepInputs
from engine.errors import UsageError
from engine.host import available_cores
from engine.runtime import BACKENDS, Runtime

DEFAULT = Runtime()

__all__ = [
    "BACKENDS",
    "OF_ENSEMBLES",
    "Backend",
    "Cache",
    "Encoded",
    "StepInputs",
    "open_backend",
    "open_backends",
    "require_backend",
]


def require_backend(name: str, cpu_precision: str = "fp32") -> str:
    """Return the name of the backend that `name` means here: only `auto` may choose.

    Raises UsageError for an unknown name, BackendError, in one sentence and at once, when something is missing, were it
    only the processor's instructions for `cpu_precision`.
    """
    Runtime(name, cpu_precision=cpu_precision)  # refuses an unknown one
    if name == "openvino":
        from engine.backends.compiled import require_openvino

        require_openvino(cpu_precision)
    elif name == "trt":
        from engine.backends.trt import require_tensorrt

        require_tensorrt()
    else:
        from engine.backends.providers import choose, require_cpu_precision, require_provider

        name = choose(name)
        require_provider(name)
        Runtime(name, cpu_precision=cpu_precision)  # `auto` may have become a GPU
        if name == "cpu":
            require_cpu_precision(cpu_precision)
    return name


OF_ENSEMBLES = ("cpu", "cuda")
CORES_OF_A_STREAM = 8
"""From twice as many on, a CPU is divided: small products do not get quicker with more threads. A guess: no machine of
so many was at hand.
"""


def open_backends(bundle: Bundle, runtime: Runtime = DEFAULT) -> list[Backend]:
    """Load the bundle's graphs once for each stream of `runtime`, on a CPU, with a share of its threads; else once.

    Raises UsageError where streams were asked for and the backend is another; see open_backend for the rest.
    """
    name = require_backend(runtime.backend, runtime.cpu_precision)
    if name != "cpu":
        if runtime.streams is not None:
            raise UsageError(f"streams are for the backend cpu, not for {name}: leave --streams out")
        return [open_backend(bundle, runtime)]
    threads = runtime.threads or available_cores()
    streams = min(threads, runtime.streams or max(1, threads // CORES_OF_A_STREAM))
    shares = [threads // streams + (i < threads % streams) for i in range(streams)]
    return [open_backend(bundle, replace(runtime, backend=name, threads=share, streams=None)) for share in shares]


def open_backend(bundle: Bundle, runtime: Runtime = DEFAULT) -> Backend:
    """Load the bundle's graphs as `runtime` says; what `auto` chose is `Backend.name`.

    Raises as require_backend does, and BundleError or BackendError where graphs or plans are not the bundle's.
    """
    name = require_backend(runtime.backend, runtime.cpu_precision)
    if bundle.members:
        return _open_ensemble(bundle, name, runtime)
    if name == "cpu":
        from engine.backends.ort import OrtBackend

        return OrtBackend(bundle, name, threads=runtime.threads, cpu_precision=runtime.cpu_precision)
    if name == "openvino":
        from engine.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(bundle, threads=runtime.threads, cpu_precision=runtime.cpu_precision)
    from engine.backends.shapes import PaddedBackend

    if name == "trt":
        from engine.backends.trt import TrtBackend

        return PaddedBackend(TrtBackend.load(bundle, runtime.plans, uses_cuda_graphs=runtime.cuda_graphs))
    from engine.backends.ort import OrtBackend

    return PaddedBackend(OrtBackend(bundle, name, threads=runtime.threads))


def _open_ensemble(bundle: Bundle, name: str, runtime: Runtime) -> Backend:
    if name not in OF_ENSEMBLES:
        raise UsageError(
            f"several bundles caption together on {' and '.join(OF_ENSEMBLES)}, not on {name}: choose another --backend"
        )
    from engine.backends.ensemble import EnsembleBackend
    from engine.backends.shapes import PaddedBackend

    backend = EnsembleBackend(bundle, name, threads=runtime.threads, cpu_precision=runtime.cpu_precision)
    return backend if name == "cpu" else PaddedBackend(backend)

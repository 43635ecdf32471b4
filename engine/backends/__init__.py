"""Backends: runtimes that execute a bundle's graphs. `open_backend` loads one by name."""

from __future__ import annotations

from dataclasses import replace

from engine.bundle.manifest import Bundle
from engine.decoding.backend import Backend, Cache, Encoded, StepInputs
from engine.errors import BackendError, UsageError, install_command
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
    "resolve_runtime",
]


def require_backend(name: str, cpu_precision: str = "fp32") -> str:
    """Check that a backend can run on this machine, before anything is loaded. Return its name (`auto` is resolved).

    Raises UsageError for an unknown name, BackendError if a library, a device or the processor's instructions for
    `cpu_precision` are missing.
    """
    Runtime(name, cpu_precision=cpu_precision)  # raises UsageError for an unknown name
    if name == "openvino":
        from engine.backends.openvino import require_openvino

        require_openvino(cpu_precision)
    elif name == "trt":
        from engine.backends.trt import require_tensorrt

        require_tensorrt()
    elif name == "torch":
        try:
            import engine.backends.torch  # noqa: F401  # the modules of this backend are the only ones that import torch
        except ImportError as error:
            raise BackendError(f"torch is not installed ({error}): {install_command('torch')}") from error
    else:
        from engine.backends.providers import choose, require_cpu_precision, require_provider

        name = choose(name)
        require_provider(name)
        Runtime(name, cpu_precision=cpu_precision)  # again, because `auto` may have become a GPU
        if name == "cpu":
            require_cpu_precision(cpu_precision)
    return name


def resolve_runtime(runtime: Runtime) -> Runtime:
    """Return the runtime with the backend that `auto` stands for, and the device of torch. Raises as require_backend.

    Also raises BackendError if torch does not find the device.
    """
    name = require_backend(runtime.backend, runtime.cpu_precision)
    if name != "torch":
        return replace(runtime, backend=name)
    from engine.backends.torch import find_device

    return replace(runtime, device=find_device(runtime.device))


OF_ENSEMBLES = ("cpu", "cuda", "torch")
"""Backends that support ensembles."""
FEW_CORES = 2
"""With at most this many threads each is a stream of its own in a run over many images. Threads that share a product
wait for the slower one, so that another program on one core delays both. Measured with 2 cores (benchmarks/LOG.md).
"""
CORES_OF_A_STREAM = 8
"""Threads per stream by default, so a CPU with at least twice as many is divided: small matrix products do not get
faster with more threads. A guess: it was never measured on a machine with so many cores.
"""


def open_backends(bundle: Bundle, runtime: Runtime = DEFAULT, *, many_images: bool = False) -> list[Backend]:
    """Load the bundle's graphs for the streams of `runtime`; the threads are divided among the streams.

    Streams of one thread share one backend, and so its weights. `many_images` chooses streams for a run over many
    images instead of a low latency of each image, where `runtime` leaves the choice.
    Backends other than `cpu` have one stream; if `runtime.streams` is set for them, this raises UsageError. Otherwise
    raises as open_backend does.
    """
    runtime = resolve_runtime(runtime)
    name = runtime.backend
    if name != "cpu":
        if runtime.streams is not None:
            raise UsageError(f"streams are for the backend cpu, not for {name}: remove --streams")
        return [open_backend(bundle, runtime)]
    threads = runtime.threads or available_cores()
    is_small = many_images and threads <= FEW_CORES
    streams = min(threads, runtime.streams or (threads if is_small else max(1, threads // CORES_OF_A_STREAM)))
    counts = [threads // streams + (i < threads % streams) for i in range(streams)]
    if max(counts) == 1:
        # a session of one thread runs in the thread that calls it, so that all streams can share the weights
        return [open_backend(bundle, replace(runtime, backend=name, threads=1, streams=None))] * streams
    return [open_backend(bundle, replace(runtime, backend=name, threads=count, streams=None)) for count in counts]


def open_backend(bundle: Bundle, runtime: Runtime = DEFAULT) -> Backend:
    """Load the bundle's graphs with the backend and settings of `runtime`. `Backend.name` is the resolved name.

    Raises as require_backend does, and BundleError or BackendError if graphs or plans do not match the bundle.
    """
    runtime = resolve_runtime(runtime)
    name = runtime.backend
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
    if name == "torch":
        from engine.backends.torch import TorchBackend

        return PaddedBackend(TorchBackend.load(bundle, runtime))
    from engine.backends.ort import OrtBackend

    return PaddedBackend(OrtBackend(bundle, name, threads=runtime.threads))


def _open_ensemble(bundle: Bundle, name: str, runtime: Runtime) -> Backend:
    if name not in OF_ENSEMBLES:
        raise UsageError(
            f"several bundles caption together on {', '.join(OF_ENSEMBLES)}, not on {name}: change --backend"
        )
    from engine.backends.ensemble import EnsembleBackend
    from engine.backends.shapes import PaddedBackend

    backend = EnsembleBackend.load(bundle, runtime)
    return backend if name == "cpu" else PaddedBackend(backend)

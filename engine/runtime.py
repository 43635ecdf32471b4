"""Runtime: what runs a bundle's graphs. Workers: which processes do it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UsageError
from engine.options import option

BACKENDS = ("auto", "cpu", "openvino", "cuda", "tensorrt", "trt")
"""openvino: OpenVINO. trt: TensorRT with plans built by `engine plan`. Others: ONNX Runtime with that provider."""
CPU_BACKENDS = ("cpu", "openvino")


@dataclass(frozen=True)
class Runtime:
    """What runs a bundle's graphs, and how. Captions do not depend on it. Raises UsageError for invalid values."""

    backend: str = option(
        "auto",
        "--backend",
        f"Backend: {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}; auto takes a GPU if one works, else the CPU.",
    )
    threads: int | None = option(None, "--threads", "Number of CPU threads; all cores by default.", least=1)
    streams: int | None = option(
        None,
        "--streams",
        "Parallel decoding streams on the CPU (--backend cpu), which divide the threads among them; the default "
        "depends on the number of threads.",
        least=1,
    )
    cpu_precision: str = option(
        "fp32",
        "--cpu-precision",
        "Precision of matrix products on the CPU (cpu, openvino); bf16 needs processor support, captions may differ.",
        choices={"fp32": "fp32", "bf16": "bf16"},
    )
    plans: Path | None = option(
        None, "--plans", "Folder written by `engine plan`, for --backend trt; by default where `engine plan` puts it."
    )
    cuda_graphs: bool = option(
        False,
        "--cuda-graphs",
        "Capture decoding steps of the same shape as CUDA graphs and replay them, with --backend trt.",
    )

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"unknown backend {self.backend!r}: choose one of {', '.join(BACKENDS)}")
        if self.streams is not None and self.backend not in ("auto", "cpu"):
            raise UsageError(f"streams are for the backend cpu, not for {self.backend}: remove --streams")
        if self.cpu_precision not in ("fp32", "bf16"):
            raise UsageError(f"cpu_precision must be fp32 or bf16, not {self.cpu_precision!r}")
        if self.cpu_precision != "fp32" and self.backend not in ("auto", *CPU_BACKENDS):
            raise UsageError(
                f"{self.cpu_precision} is for the backends {' and '.join(CPU_BACKENDS)}, not for {self.backend}: "
                "remove --cpu-precision"
            )
        if self.streams and self.threads and self.streams > self.threads:
            raise UsageError(
                f"{self.streams} streams need at least as many threads, not {self.threads}: lower --streams"
            )
        if self.backend != "trt" and (self.plans is not None or self.cuda_graphs):
            raise UsageError(f"--plans and --cuda-graphs are for the backend trt, not for {self.backend}: remove them")


@dataclass(frozen=True)
class Workers:
    """Which processes make the captions. By default it is this one.

    `processes` starts that many workers on this machine, `devices` one worker per GPU. `address` connects to a Ray
    cluster and starts `actors` workers there. Raises UsageError if two of these are combined.
    """

    address: str | None = option(
        None,
        "--ray",
        "Caption on the Ray cluster at ADDRESS (extra `ray`); without an address, start a cluster on this machine.",
        bare="local",
        metavar="[ADDRESS]",
    )
    actors: int | None = option(
        None,
        "--ray-actors",
        "Number of workers on the Ray cluster; by default one per GPU, or on CPUs one per --threads CPUs.",
        least=1,
    )
    processes: int | None = option(
        None,
        "--processes",
        "Number of worker processes (cpu, openvino), which divide cores and threads among them; by default none.",
        least=1,
    )
    devices: str | None = option(
        None, "--devices", "GPUs to use, with one worker process each, such as cuda:0,cuda:1.", metavar="GPUS"
    )

    def __post_init__(self) -> None:
        if self.address is None and self.actors is not None:
            raise UsageError(
                "--ray-actors is the number of workers on a Ray cluster: add --ray, or remove --ray-actors"
            )
        if self.address is not None and (self.processes, self.devices) != (None, None):
            raise UsageError(
                "--ray starts its workers on the cluster: remove --processes and --devices, and use --ray-actors"
            )
        if self.processes is not None and self.devices is not None:
            raise UsageError("--devices starts one worker process per GPU: remove --processes")
        if len(set(self.gpus)) < len(self.gpus):
            raise UsageError(f"--devices {self.devices} lists a GPU twice: list each GPU once")

    @property
    def gpus(self) -> list[int]:
        """The numbers of the GPUs in `devices`. Raises UsageError for an entry that is not `cuda:N`."""
        names = [] if self.devices is None else [name.strip() for name in self.devices.split(",")]
        if not all(re.fullmatch("cuda:[0-9]{1,4}", name) for name in names):
            raise UsageError(f"--devices expects GPUs such as cuda:0,cuda:1, not {self.devices!r}")
        return [int(name.removeprefix("cuda:")) for name in names]

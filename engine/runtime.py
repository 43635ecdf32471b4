"""Runtime: what runs a bundle's graphs. Workers: which processes do it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UsageError
from engine.options import option

BACKENDS = ("auto", "cpu", "openvino", "cuda", "tensorrt", "trt", "torch")
"""openvino: OpenVINO. trt: TensorRT with plans built by `engine plan`. torch: torch on any of its devices. Others: ONNX
Runtime with that provider.
"""
CPU_BACKENDS = ("cpu", "openvino")
TORCH_DEVICES = ("cuda", "xpu", "mps", "cpu")
"""Kinds of devices of the backend torch, in the order in which they are looked for."""
ARITHMETIC = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
"""Precisions that a bundle can be run in; fp32 is the bundle's own."""


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
        "Precision of matrix products on the CPU (cpu, openvino); bf16 needs processor support, captions may differ. "
        "With torch the same as --precision.",
        choices=ARITHMETIC,
    )
    device: str | None = option(
        None,
        "--device",
        "Device of --backend torch: cuda, cuda:N (also AMD's GPUs), xpu, mps or cpu; by default the first that exists.",
        metavar="DEVICE",
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
        if self.cpu_precision not in ARITHMETIC:
            raise UsageError(f"cpu_precision must be fp32, fp16 or bf16, not {self.cpu_precision!r}")
        backends = {"fp32": BACKENDS, "fp16": ("torch",), "bf16": (*CPU_BACKENDS, "torch")}[self.cpu_precision]
        if self.backend not in backends and not (self.backend == "auto" and "cpu" in backends):
            raise UsageError(
                f"{self.cpu_precision} is for --backend {' or '.join(backends)}, not for {self.backend}: "
                "remove --cpu-precision"
            )
        if self.device is not None and self.backend != "torch":
            raise UsageError(f"--device is for the backend torch, not for {self.backend}: remove it")
        if self.device is not None and not re.fullmatch("(cuda|xpu)(:[0-9]{1,4})?|mps|cpu", self.device):
            raise UsageError(f"--device must be cuda, cuda:N, xpu, xpu:N, mps or cpu, not {self.device!r}")
        if self.streams and self.threads and self.streams > self.threads:
            raise UsageError(
                f"{self.streams} streams need at least as many threads, not {self.threads}: lower --streams"
            )
        if self.backend != "trt" and (self.plans is not None or self.cuda_graphs):
            raise UsageError(f"--plans and --cuda-graphs are for the backend trt, not for {self.backend}: remove them")


def divide_precision(backend: str, precision: str | None, cpu_precision: str) -> tuple[str | None, str]:
    """Return the precision that a checkpoint is converted to, and the one that its bundle is run in.

    With the backend torch, `precision` is the latter: one float32 bundle serves all of fp32, fp16 and bf16, and weights
    are rounded when they are loaded. int8 always needs a conversion. Raises UsageError if both are given and differ.
    """
    if backend != "torch" or precision not in ARITHMETIC:
        if precision == "bf16":
            raise UsageError(f"--precision bf16 is for the backend torch, not for {backend}: use fp32, fp16 or int8")
        return precision, cpu_precision
    if cpu_precision not in ("fp32", precision):
        raise UsageError(f"--precision {precision} and --cpu-precision {cpu_precision} differ: remove one of them")
    return None, precision


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

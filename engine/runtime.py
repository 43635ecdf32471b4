"""What runs a bundle's graphs, and who does the work: Runtime and Workers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UsageError
from engine.options import option

BACKENDS = ("auto", "cpu", "openvino", "cuda", "tensorrt", "trt")
"""ONNX Runtime with the provider of that name, OpenVINO, or (trt) TensorRT itself with plans made by `engine plan`."""
CPU_BACKENDS = ("cpu", "openvino")


@dataclass(frozen=True)
class Runtime:
    """What runs a bundle's graphs, and how; the same words come out of all of them. Checked on construction
    (UsageError).
    """

    backend: str = option("auto", "--backend", f"{', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.")
    threads: int | None = option(None, "--threads", "CPU threads; all cores when absent.", least=1)
    streams: int | None = option(
        None,
        "--streams",
        "Of --backend cpu: sets of images decoded beside each other, each with a share of the threads; one where "
        "cores are few.",
        least=1,
    )
    cpu_precision: str = option(
        "fp32",
        "--cpu-precision",
        "Of --backend cpu and openvino: bf16 rounds products where the processor has instructions for it; not parity.",
        choices={"fp32": "fp32", "bf16": "bf16"},
    )
    plans: Path | None = option(None, "--plans", "Of --backend trt: folder that `engine plan` wrote.")
    cuda_graphs: bool = option(False, "--cuda-graphs", "Of --backend trt: capture steps of one shape, replay them.")

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(f"unknown backend {self.backend!r}: choose one of {', '.join(BACKENDS)}")
        if self.streams is not None and self.backend not in ("auto", "cpu"):
            raise UsageError(f"streams are for the backend cpu, not for {self.backend}: leave --streams out")
        if self.cpu_precision not in ("fp32", "bf16"):
            raise UsageError(f"cpu_precision must be fp32 or bf16, not {self.cpu_precision!r}")
        if self.cpu_precision != "fp32" and self.backend not in ("auto", *CPU_BACKENDS):
            raise UsageError(
                f"{self.cpu_precision} is for the backends {' and '.join(CPU_BACKENDS)}, not for {self.backend}: leave "
                "--cpu-precision out"
            )
        if self.streams and self.threads and self.streams > self.threads:
            raise UsageError(f"{self.streams} streams cannot share {self.threads} threads: ask for fewer --streams")
        if self.backend != "trt" and (self.plans is not None or self.cuda_graphs):
            raise UsageError(
                f"plans and CUDA graphs are for the backend trt, not for {self.backend}: leave these options out"
            )


@dataclass(frozen=True)
class Workers:
    """Where captions come from: this process, `processes` workers of this machine or one on each of its `devices`, or
    `actors` workers of the Ray cluster at `address`. UsageError for workers of none, and of two kinds.
    """

    address: str | None = option(
        None,
        "--ray",
        "Caption with the workers of a Ray cluster (extra `ray`); one on this machine without an address.",
        bare="local",
        metavar="[ADDRESS]",
    )
    actors: int | None = option(
        None, "--ray-actors", "Workers of --ray; one a GPU, or one per --threads CPUs.", least=1
    )
    processes: int | None = option(
        None,
        "--processes",
        "Of --backend cpu and openvino: worker processes, each with a share of cores and threads.",
        least=1,
    )
    devices: str | None = option(None, "--devices", "GPUs with a worker process each: cuda:0,cuda:1.", metavar="GPUS")

    def __post_init__(self) -> None:
        if self.address is None and self.actors is not None:
            raise UsageError("--ray-actors is how many workers --ray has: give both, or neither")
        if self.address is not None and (self.processes, self.devices) != (None, None):
            raise UsageError("--ray has workers of its own, see --ray-actors: leave --processes and --devices out")
        if self.processes is not None and self.devices is not None:
            raise UsageError("--devices is one worker process a GPU: leave --processes out")
        if len(set(self.gpus)) < len(self.gpus):
            raise UsageError(f"--devices {self.devices} names a GPU twice: name each once")

    @property
    def gpus(self) -> list[int]:
        """The numbers of `devices`. Raises UsageError for what are none."""
        names = [] if self.devices is None else [name.strip() for name in self.devices.split(",")]
        if not all(re.fullmatch("cuda:[0-9]{1,4}", name) for name in names):
            raise UsageError(f"--devices takes GPUs of this machine, cuda:0,cuda:1, not {self.devices!r}")
        return [int(name.removeprefix("cuda:")) for name in names]

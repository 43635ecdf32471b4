"""Compile the stand-ins for CUDA's libraries and print the environment variables that select them.

    eval "$(python -m tests.nvidia.fake.build build/fake)"

Needs gcc, CUDA 13's headers (in CUDA_INCLUDE, by default /usr/local/cuda/include) and an environment without NVIDIA's
own libraries. ENGINE_ORT_GPU names a folder with an unzipped onnxruntime-gpu wheel. The stand-ins read FAKE_SM=9.0 (a
compute capability), FAKE_MEM=2 (memory in GiB) and FAKE_FAST=1 (leave out copies within the device). No GPU has run
this.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from engine.errors import EngineError

HERE = Path(__file__).parent
LIBRARIES = {
    "libcudart.so.13": "cudart.c",
    "libcublas.so.13": "cublas.c",
    "libcublasLt.so.13": "cublaslt.c",
    "libcudnn.so.9": "cudnn.c",
    "libcuda.so.1": "cuda.c",
    "libcurand.so.10": os.devnull,  # must be there, but our graphs call nothing of it
}
"""Library -> source. All but libcudart use the event log in libcudart, which is therefore first."""
FLAGS = ("-O1", "-Wall", "-Wextra", "-shared", "-fPIC")


def include_folder() -> Path:
    """Return the folder of CUDA's headers."""
    return Path(os.environ.get("CUDA_INCLUDE", "/usr/local/cuda/include"))


def missing_tools() -> str | None:
    """Return what is missing to compile the stand-ins, or None."""
    if shutil.which("gcc") is None:
        return "gcc is not installed: install it, for example with apt-get install gcc"
    header = include_folder() / "cuda_runtime_api.h"
    return None if header.exists() else f"{header} does not exist: set CUDA_INCLUDE to the folder of CUDA 13's headers"


def build(folder: Path) -> dict[str, str]:
    """Compile the libraries into `folder`. Return LD_LIBRARY_PATH and PYTHONPATH for programs that use them.

    Raises EngineError if gcc or CUDA's headers are missing, or gcc fails.
    """
    missing = missing_tools()
    if missing:
        raise EngineError(missing)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(LIBRARIES))
    for library, source in LIBRARIES.items():
        # ONNX Runtime's symbols have the library as their version, as NVIDIA's own have
        versions = folder / f"{library}.map"
        versions.write_text(f"{library} {{ global: *; }};\n")
        command = ["gcc", *FLAGS, f"-I{include_folder()}", "-x", "c", str(HERE / source), "-x", "none"]
        command += ["-o", str(folder / library), f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}"]
        command += [] if library == first else [str(folder / first)]
        done = subprocess.run([*command, "-lpthread"], capture_output=True, text=True)
        if done.returncode:
            raise EngineError(f"gcc cannot compile {source}: {' '.join(done.stderr.split())[:400]}")
    paths = [str(HERE / "python"), os.environ.get("ENGINE_ORT_GPU"), str(HERE.parents[2]), os.environ.get("PYTHONPATH")]
    return {"LD_LIBRARY_PATH": str(folder.resolve()), "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def main() -> None:
    """Compile into the folder that is named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m tests.nvidia.fake.build FOLDER")
    try:
        variables = build(Path(sys.argv[1]))
    except EngineError as error:
        sys.exit(f"error: {error}")
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()

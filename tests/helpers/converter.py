"""Run `engine` as a program, with slow conversions, and with stand-ins for parts of the conversion that are missing.

    python -m tests.helpers.converter caption --model ...

CONVERTER_SECONDS is the time that each conversion takes longer. It writes its process id to CONVERTER_STARTED once half
a bundle is there. CONVERTER_BUNDLE is the bundle that a stand-in copies.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from engine.bundle.manifest import GOLDEN, MANIFEST
from engine.checkpoints import cache
from engine.cli.app import main
from engine.errors import CheckpointError

IS_REAL = importlib.util.find_spec("engine.checkpoints.convert") is not None
"""Whether checkpoints are really converted. Otherwise the stand-ins copy a bundle."""


def read_checkpoint(checkpoint: Path, *, image_size: int | None = None, sha256: Any = None) -> SimpleNamespace:  # noqa: ARG001
    """Stand-in: return a checkpoint without weights."""
    if checkpoint.is_dir() and not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no config.json")
    return SimpleNamespace(family="blip", shape={}, image_size=image_size, notes=())


def convert(checkpoint: SimpleNamespace, out: Path, *, precision: str, source: Any, log: Any) -> None:  # noqa: ARG001
    """Stand-in: copy a bundle, without golden recordings."""
    shutil.copytree(os.environ["CONVERTER_BUNDLE"], out, ignore=shutil.ignore_patterns(GOLDEN))
    manifest = json.loads((out / MANIFEST).read_text())
    manifest |= {"precision": precision, "converted": {"source": dict(source)}}
    del manifest["files"][GOLDEN]
    (out / MANIFEST).write_text(json.dumps(manifest))


def add_stand_ins() -> None:
    """Add modules for those that are missing."""
    graphs = SimpleNamespace(version="stand-in")
    for name, parts in {
        "read": {"read_checkpoint": read_checkpoint},
        "convert": {"convert": convert},
        "graphs": {
            "find_graphs": lambda *_: graphs,
            "known_architectures": lambda: [("BLIP-base", ("fp32", "fp16", "int8"))],
        },
    }.items():
        module = ModuleType(f"engine.checkpoints.{name}")
        vars(module).update(parts)
        sys.modules[module.__name__] = module
    cache._graph_versions = lambda _: {graphs.version}


def slow_down(seconds: float) -> None:
    """Make each conversion stop for some seconds with half a bundle."""
    plain = cache._convert

    def slow(checkpoint: Any, out: Path, **options: Any) -> None:
        out.mkdir()
        (out / "encoder.onnx").write_bytes(b"half")
        with Path(os.environ["CONVERTER_STARTED"]).open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        shutil.rmtree(out)
        plain(checkpoint, out, **options)

    cache._convert = slow


if not IS_REAL:
    add_stand_ins()

if __name__ == "__main__":
    if "CONVERTER_SECONDS" in os.environ:
        slow_down(float(os.environ["CONVERTER_SECONDS"]))
    main(prog_name="engine")

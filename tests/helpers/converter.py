"""Run `engine` as a program whose conversions are slow.

    python -m tests.helpers.converter caption --model ...

CONVERTER_SECONDS is the time that each conversion takes longer. It writes its process id to CONVERTER_STARTED once half
a bundle is there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from engine.checkpoints import convert
from engine.cli.app import main


def slow_down(seconds: float) -> None:
    """Make each conversion stop for some seconds with half a bundle."""
    plain = convert.convert

    def slow(checkpoint: Any, graphs: Any, out: Path, **options: Any) -> None:
        (out / "encoder.onnx").write_bytes(b"half")
        with Path(os.environ["CONVERTER_STARTED"]).open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        (out / "encoder.onnx").unlink()
        plain(checkpoint, graphs, out, **options)

    convert.convert = slow


if __name__ == "__main__":
    if "CONVERTER_SECONDS" in os.environ:
        slow_down(float(os.environ["CONVERTER_SECONDS"]))
    main(prog_name="engine")

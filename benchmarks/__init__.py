"""Measurements: they print machine, versions, spread and a checksum of the captions, and assert nothing about time."""

from pathlib import Path

import engine  # noqa: F401  (first: it turns off ONNX Runtime's telemetry)

# `python -m benchmarks.rows` finds speed/rows.py: every command has a short name, in whichever room its file lies
__path__ += [str(init.parent) for init in sorted(Path(__file__).parent.glob("*/__init__.py"))]

"""Measurements: they print machine, versions, spread and a checksum of the captions, and assert nothing about time."""

import engine  # noqa: F401  (first: it turns off ONNX Runtime's telemetry)

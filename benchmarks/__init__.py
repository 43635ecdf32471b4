"""Benchmarks. They record the machine, versions, spread and a checksum of the captions; they assert no times."""

import engine  # noqa: F401  (first, because it turns off ONNX Runtime's telemetry)

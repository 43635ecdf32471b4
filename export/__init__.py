"""Export checkpoints to bundles with torch. Only this package handles both formats."""

import engine  # noqa: F401  (import it first: it turns off ONNX Runtime's telemetry)

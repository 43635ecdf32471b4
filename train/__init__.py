"""Fine-tuning, in torch, on top of what export knows of checkpoints and the engine of captions and scores."""

import engine  # noqa: F401  (first: it turns off ONNX Runtime's telemetry)

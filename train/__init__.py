"""Fine-tune BLIP checkpoints in torch, with the checkpoint code of `export` and the metrics of `engine`."""

import engine  # noqa: F401  (first, because it turns off ONNX Runtime's telemetry)

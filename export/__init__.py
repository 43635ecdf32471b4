"""From a BLIP checkpoint to a bundle, in torch; the only place that knows both sides."""

import engine  # noqa: F401  (first: it turns off ONNX Runtime's telemetry)

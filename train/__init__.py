"""Fine-tuning and checkpoint surgery, in torch; knows nothing of bundles, ONNX or the engine."""

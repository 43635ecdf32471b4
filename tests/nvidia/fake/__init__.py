"""Stand-ins for CUDA's libraries: the real onnxruntime-gpu runs graphs without a GPU. No GPU has run this."""

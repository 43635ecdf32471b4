"""Fine-tuning, in torch, on top of what export knows of checkpoints and the engine of captions and scores."""

"""Find checkpoints by name, convert them to Hugging Face's layout, and load them safely."""

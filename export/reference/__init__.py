"""What PyTorch says: Hugging Face's generate, recordings of it, and why a caption differs."""

"""The PyTorch reference: Hugging Face's generate, recordings of its captions, and tracing of mismatches."""

"""Checkpoints in Hugging Face's layout, read without torch. Export and the engine read them by the code here."""

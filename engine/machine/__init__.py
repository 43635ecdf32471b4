"""This machine: what is installed, how fast it captions, and whether a bundle says here what PyTorch said."""

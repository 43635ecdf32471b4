"""Checks of this machine: what is installed, how fast it captions, and whether captions equal PyTorch's."""

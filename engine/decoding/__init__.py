"""The decoding core, in numpy only: beams, logits processors, ancestry and the scheduler that owns the slots."""

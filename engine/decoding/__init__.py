"""The decoding core, numpy only: beam search, logits processors, the ancestry mask and the scheduler."""

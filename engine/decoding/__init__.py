"""The decoding core, in numpy only: beams, bans, ancestry and the scheduler that owns the slots."""

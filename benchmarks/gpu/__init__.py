"""For owners of a GPU: parity, speed and the machine itself. Never run on one yet."""

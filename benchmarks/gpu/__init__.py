"""Checks on a GPU: parity, speed and the machine itself. They have not been run on a GPU yet."""

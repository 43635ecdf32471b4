"""Whether this machine has a GPU, for tests of what is said where there is none."""

from __future__ import annotations

from engine.backends.providers import find_gpu
from engine.errors import BackendError


def missing_gpu() -> str | None:
    """Return why no GPU can be used, or None when one can."""
    try:
        find_gpu()
    except BackendError as error:
        return str(error)
    return None

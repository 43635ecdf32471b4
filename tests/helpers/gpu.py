"""Detect a GPU, for tests of the errors on machines without one."""

from __future__ import annotations

from engine.backends.providers import find_gpu
from engine.errors import BackendError


def missing_gpu() -> str | None:
    """Return why no GPU can be used, or None if one can."""
    try:
        find_gpu()
    except BackendError as error:
        return str(error)
    return None

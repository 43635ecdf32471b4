"""The demo bundle, and the bounds that its plans are built for."""

from __future__ import annotations

import pytest

from engine.backends.shapes import Bounds
from engine.bundle.manifest import Bundle


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load()


@pytest.fixture(scope="module")
def bounds(bundle) -> Bounds:
    return Bounds.of(bundle)

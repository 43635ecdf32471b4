"""A headless Chromium for the tests of pages; without one they are skipped, unless REPORT_BROWSER=required."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from benchmarks.pages.browser import NoBrowserError, open_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(open_browser())
        except NoBrowserError as error:
            if os.environ.get("REPORT_BROWSER") == "required":
                raise
            pytest.skip(f"no browser: {error}")
        yield found

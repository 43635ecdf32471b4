"""Fixtures with a headless Chromium. Without it the tests are skipped, unless REPORT_BROWSER=required."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import NoBrowserError, open_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            chromium = stack.enter_context(open_browser())
        except NoBrowserError as error:
            if os.environ.get("REPORT_BROWSER") == "required":
                raise
            pytest.skip(f"no browser: {error}")
        yield chromium


@pytest.fixture
def open_from_disk(browser: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a page. The test fails if the console logs anything or a request leaves the disk."""
    contexts, trouble = [], []

    def opened(path: Path, *, width: int = 1440, theme: str = "light", anchor: str = "") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or trouble.append(request.url))
        page.on("requestfailed", lambda request: trouble.append(request.url))
        page.goto(path.as_uri() + anchor)
        page.wait_for_selector("html[data-ready]")
        return page

    opened.trouble = trouble
    yield opened
    for context in contexts:
        context.close()
    assert trouble == []

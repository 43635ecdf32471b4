"""The page of a challenge-sized run opens quickly and scrolls to its last image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.inputs.images import find_images
from engine.report.build import Thumbnails, render
from engine.report.gather import ReportRequest, gather
from tests.helpers.report_page import measure_page, write_inputs
from tests.helpers.tiny import save_pictures


def selected(page: Any) -> str:
    return page.locator("#rows .row.selected .id").inner_text()


@pytest.fixture(scope="module")
def large_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with the 17,237 images of a challenge, two runs, four scores each and candidates; 16 thumbnails."""
    work = tmp_path_factory.mktemp("large")
    save_pictures(work / "report" / "thumbnails", 16, name="{}.jpg")
    save_pictures(work / "images", 1, name="ID_00000.png")
    ids = [f"ID_{i:05d}" for i in range(17_237)]
    content = gather(ReportRequest(images=work / "images", out=work / "report", **write_inputs(work, ids)))
    assert len(find_images(work / "images").images) == 1
    thumbnails = Thumbnails([f"{i % 16}.jpg" for i in range(len(ids))], {}, 0)
    path = work / "report" / "index.html"
    path.write_text(render(content, thumbnails, notes=content.notes))
    return path


def test_large_page_opens_and_scrolls_without_gaps(browser, large_page):
    measured = measure_page(browser, large_page)
    print(json.dumps(measured))
    for manner in ("reading", "flicking", "dragging"):
        assert measured[manner]["gaps"] == 0
        assert measured[manner]["most_rows"] < 40
    assert measured["dragging"]["place"] > 1_000_000
    assert measured["first_rows_s"] < 5, "the goal is 2 s, with a margin for the shared cores of CI"


def test_keyboard_reaches_the_last_of_many_images(open_from_disk, large_page):
    page = open_from_disk(large_page)
    page.focus("#grid")
    page.keyboard.press("End")
    assert selected(page) == "ID_17236"
    box = page.locator("#rows .row.selected").bounding_box()
    assert box["y"] > 0
    assert box["y"] + box["height"] <= 900 + 1  # pixels are rounded this far down
    page.keyboard.press("PageUp")
    assert selected(page) < "ID_17236"
    assert page.locator("#rows .row").count() < 40

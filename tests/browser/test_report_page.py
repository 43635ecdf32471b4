"""The page of `engine report` in a headless Chromium, opened from disk as users open it."""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from engine.attention import write_attention
from engine.captions import Attention
from engine.cli.app import main
from engine.run.outputs import write_run
from tests.helpers.tiny import random_pictures

INJECTED = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
LARGE, SMALL = "a chest film with a large nodule", "a chest film with a small nodule"
RUN = {"axial_1": SMALL, "axial_2": "ct of the head", "coronal_10": "", "coronal_9": INJECTED}
OTHER = {"axial_1": LARGE, "axial_2": "ct of the head", "coronal_10": "mr of the knee"}
REFERENCES = {"axial_1": LARGE, "axial_2": "ct of the head.", "coronal_10": "mr of the knee"}
SCORES = {"axial_1": (0.8, 1.0), "axial_2": (0.9, 0.9), "coronal_10": (0.0, 0.7), "coronal_9": (0.3, 0.1)}


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("report")
    (work / "images").mkdir()
    for name, image in zip(RUN, random_pictures(3), strict=False):
        image.save(work / "images" / f"{name}.png")
    (work / "images" / "coronal_10.png").write_bytes(b"not an image")
    header = "ID,Caption,latency_s,modality"
    facts = {"axial_1": "0.5,x-ray", "axial_2": "0.25,ct", "coronal_10": "1.5,mr", "coronal_9": ",ct"}
    (work / "run.csv").write_text("\n".join([header, *(f'{i},"{t}",{facts[i]}' for i, t in RUN.items())]) + "\n")
    write_run(work / "other.csv", OTHER.items())
    write_run(work / "references.csv", REFERENCES.items())
    for run, name in enumerate(("scores", "others")):
        lines = [f"{image_id},{values[run]},{values[run] * 2}" for image_id, values in SCORES.items()]
        (work / f"{name}.csv").write_text("\n".join(["ID,rouge1@11111111,cider@22222222", *lines]) + "\n")
    with (work / "run.jsonl").open("w") as stream:
        for image_id, text in RUN.items():
            second = {"text": "a knee", "sum_log_prob": -1.0 - math.log(3)}
            several = [{"text": text, "sum_log_prob": -1.0}, second]
            stream.write(json.dumps({"id": image_id, "hypotheses": several}) + "\n")
    options = {"run": "run.csv", "images": "images", "references": "references.csv", "scores": "scores.csv"}
    options |= {"n-best": "run.jsonl", "against": "other.csv", "against-scores": "others.csv", "out": "report"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(work / value))]
    result = CliRunner().invoke(main, ["report", *words, "--signature", "rouge1:F|made:up"])
    assert result.exit_code == 0, result.output
    return work / "report" / "index.html"


@pytest.fixture
def open_page(open_from_disk: Callable[..., Any], page_path: Path) -> Callable[..., Any]:
    return functools.partial(open_from_disk, page_path)


def shown(page: Any) -> list[str]:
    rows = page.locator("#rows .row")
    indexed = [(int(row.get_attribute("aria-rowindex")), row.locator(".id").inner_text()) for row in rows.all()]
    return [name for _, name in sorted(indexed)]


def selected(page: Any) -> str:
    return page.locator("#rows .row.selected .id").inner_text()


def test_row_shows_image_captions_reference_and_scores(open_page):
    page = open_page()
    row = page.locator("#rows .row", has_text="axial_1")
    assert row.locator("img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 0
    assert [mark.inner_text() for mark in row.locator(".line-0 mark").all()] == ["small"]
    assert row.locator(".line-1 mark").count() == 0
    assert [mark.inner_text() for mark in row.locator(".reference mark").all()] == ["large"]
    assert row.locator(".number").first.inner_text().split() == ["0.800", "1.000", "−0.200"]
    broken = page.locator("#rows .row", has_text="coronal_10")
    assert broken.locator(".no-picture").inner_text() == "cannot be read"
    assert "1 image cannot be read, shown as a placeholder: coronal_10.png" in page.locator("#notes").inner_text()


def test_markup_in_a_caption_is_shown_as_text(open_page):
    page = open_page()
    page.locator("#rows .row", has_text="coronal_9").click()
    assert page.locator("#rows .selected .line-0 .words").inner_text() == INJECTED
    assert page.locator("#detail .said.run-0").inner_text() == INJECTED
    assert page.evaluate("window.hacked") is None
    assert page.locator("#rows img[src='x'], #detail img[src='x']").count() == 0


def test_policy_blocks_an_injected_script(open_page):
    page = open_page()
    blocked = page.evaluate(
        """() => new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (event) => done(event.violatedDirective));
            const script = document.createElement("script");
            script.textContent = "window.hacked = 3";
            document.body.append(script);
        })"""
    )
    assert blocked.startswith("script-src")
    assert page.evaluate("window.hacked") is None
    assert "inline script violates" in open_page.func.trouble.pop()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("axial", ["axial_1", "axial_2"]),
        ("LARGE nodule", ["axial_1"]),
        ("window.hacked", ["coronal_9"]),
        ("knee", ["coronal_10"]),
        ("nowhere", []),
    ],
)
def test_search_covers_ids_captions_and_references(query, expected, open_page):
    page = open_page()
    page.fill("#search", query)
    assert shown(page) == expected
    assert page.locator("#count").inner_text() == f"{len(expected)} of 4 images"
    assert page.locator("#nothing").is_visible() == (not expected)


def test_sort_by_any_column_with_unknown_values_last(open_page):
    page = open_page()
    for label, order in {
        "rouge1 (run)": ["coronal_10", "coronal_9", "axial_1", "axial_2"],
        "cider (other)": ["coronal_9", "coronal_10", "axial_2", "axial_1"],
        "Gain in rouge1": ["coronal_10", "axial_1", "axial_2", "coronal_9"],
        "latency_s (run)": ["axial_2", "axial_1", "coronal_10", "coronal_9"],
        "ID": ["axial_1", "axial_2", "coronal_9", "coronal_10"],
        "Order of the run": list(RUN),
    }.items():
        page.select_option("#sort", label=label)
        assert shown(page) == order, label
    page.select_option("#sort", label="latency_s (run)")
    page.click("#direction")
    assert shown(page) == ["coronal_10", "axial_1", "axial_2", "coronal_9"]


def test_column_header_sorts_and_shows_the_order(open_page):
    page = open_page()
    page.get_by_role("columnheader", name="rouge1").get_by_role("button").click()
    assert shown(page)[0] == "coronal_10"
    assert page.locator('[aria-sort="ascending"]').inner_text() == "rouge1 ↑"
    page.keyboard.press("Enter")
    assert shown(page)[0] == "axial_2"
    assert page.locator('[aria-sort="descending"]').inner_text() == "rouge1 ↓"


def test_filters_by_number_value_and_words_combine(open_page):
    page = open_page()
    page.click("#filter-open")
    page.select_option("#filter-column", label="rouge1 (run)")
    page.click("text=Add filter")
    assert page.locator(".chip").count() == 0
    assert page.evaluate("document.activeElement.id") == "filter-low"
    page.fill("#filter-low", "0.3")
    page.click("text=Add filter")
    assert shown(page) == ["axial_1", "axial_2", "coronal_9"]
    page.select_option("#filter-column", label="modality (run)")
    page.select_option("#filter-text", value="ct")
    page.click("text=Add filter")
    assert shown(page) == ["axial_2", "coronal_9"]
    page.select_option("#filter-column", label="Caption (run)")
    page.select_option("#filter-test", value="hasNot")
    page.fill("#filter-text", "SCRIPT")
    page.keyboard.press("Enter")
    assert shown(page) == ["axial_2"]
    page.get_by_role("button", name="Remove the filter rouge1").click()
    page.get_by_role("button", name="Remove the filter modality").click()
    assert shown(page) == ["axial_1", "axial_2", "coronal_10"]


def test_keyboard_steps_through_images(open_page):
    page = open_page()
    page.keyboard.press("j")
    assert selected(page) == "axial_1"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("j")
    assert selected(page) == "coronal_10"
    assert page.locator("#detail h2").inner_text() == "coronal_10"
    page.keyboard.press("k")
    assert selected(page) == "axial_2"
    page.focus("#grid")
    page.keyboard.press("End")
    assert selected(page) == "coronal_9"
    active = page.get_attribute("#grid", "aria-activedescendant")
    assert page.locator(f"#{active} .id").inner_text() == "coronal_9"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("ArrowLeft")
    assert selected(page) == "coronal_10"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "grid"
    assert not page.locator("#detail").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.input_value("#search") == "jk"


def test_on_a_phone_covered_elements_are_inert(open_page):
    page = open_page(width=390)
    page.locator("#rows .row", has_text="axial_2").click()
    for _ in range(6):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('#detail')")
    page.get_by_role("button", name="Next image").click()
    assert page.locator("#detail h2").inner_text() == "coronal_10"
    page.get_by_role("button", name="Close").click()
    assert page.evaluate("document.activeElement.id") == "grid"
    page.click("#direction")
    assert shown(page)[0] == "coronal_9"


def test_letter_shortcuts_can_be_switched_off(open_page):
    page = open_page()
    page.keyboard.press("?")
    page.uncheck("#letters")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert page.locator("#rows .selected").count() == 0


def test_wins_and_losses_filter_the_images(open_page):
    page = open_page()
    cells = page.locator("#scores tbody tr").first.locator("td").all_inner_texts()
    assert cells[:3] == ["0.500", "0.675", "−0.175"]
    page.get_by_role("button", name="rouge1: 2 images B better").click()
    assert shown(page) == ["coronal_10", "axial_1"]
    page.get_by_role("button", name="rouge1: 1 image A better").click()
    assert shown(page) == ["coronal_9"]
    page.get_by_role("button", name="Remove the filter").click()
    page.get_by_role("button", name="2 captions differ").click()
    assert sorted(shown(page)) == ["axial_1", "coronal_10"]


@pytest.mark.parametrize(
    ("caption", "references", "extra", "lacking"),
    [
        ("a b c", ["a b c"], [], []),
        ("A, b. c", ["a b (c)"], [], []),
        ("a x b", ["a b"], ["x"], []),
        ("b a", ["a b"], ["b"], ["b"]),
        ("", ["a b"], [], ["a b"]),
        ("a b c d", ["x y", "a b d e."], ["c"], ["e"]),
        ("a - b", ["a b"], ["-"], []),
        ("1 2 3, 4", ["9 2 9"], ["1", "3, 4"], ["9", "9"]),
    ],
)
def test_word_differences_ignore_case_and_punctuation(caption, references, extra, lacking, open_page):
    found = open_page().evaluate(
        """([caption, references]) => {
            const { a, b, aAlone, bAlone } = Report.words.nearest(caption, references).compared;
            return [Report.words.alone(a, aAlone), Report.words.alone(b, bAlone)];
        }""",
        [caption, references],
    )
    assert found == [extra, lacking]


def test_page_of_only_a_run_and_its_images(open_from_disk, page_path):
    work = page_path.parents[1]
    words = ("report", "--run", work / "other.csv", "--images", work / "images", "--out", work / "least")
    assert CliRunner().invoke(main, [str(word) for word in words]).exit_code == 0
    page = open_from_disk(work / "least" / "index.html")
    assert shown(page) == list(OTHER)
    assert page.locator("mark").count() == 0
    page.select_option("#sort", label="Words")
    assert shown(page) == ["axial_2", "coronal_10", "axial_1"]
    page.locator("#rows .row").first.click()
    assert page.locator("#detail .said").all_inner_texts() == ["ct of the head"]


def test_candidates_show_their_probability(open_page):
    page = open_page()
    page.locator("#rows .row", has_text="axial_2").click()
    items = page.locator("#detail .candidates li")
    assert items.locator(".percent").all_inner_texts() == ["75.0 %", "25.0 %"]
    assert items.nth(1).locator("mark").inner_text() == "a knee"


def test_range_dragged_in_a_chart_becomes_a_filter(open_page):
    page = open_page()
    charts = page.locator(".chart")
    assert charts.locator("select").evaluate_all("(all) => all.map((one) => one.selectedOptions[0].text)") == [
        "rouge1",
        "words",
        "latency_s (run)",
    ]
    assert "4 images: median 0.800" in charts.first.locator(".canvas").get_attribute("aria-label")
    box = charts.first.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + 50, steps=4)
    page.mouse.up()
    assert shown(page) == ["axial_1", "axial_2"]


def test_address_keeps_the_view(open_page):
    page = open_page()
    page.fill("#search", "a")
    page.select_option("#sort", label="rouge1 (run)")
    page.keyboard.press("Tab")
    page.locator("#rows .row", has_text="axial_2").click()
    page.wait_for_url(lambda url: "id=axial_2" in url)
    again = open_page(anchor=page.evaluate("location.hash"))
    assert shown(again) == shown(page)
    assert selected(again) == "axial_2"
    odd = open_page(anchor="#sort=-nothing&f=[1&f=[%22id%22,%22constructor%22]&id=nobody")
    assert shown(odd) == list(RUN)[::-1]


def test_page_lists_sources_and_signatures(open_page):
    page = open_page()
    page.click(".about summary")
    text = page.locator(".about").inner_text()
    assert "engine:" in text
    assert "rouge1@11111111" in text
    assert "rouge1:F|made:up" in text
    for name in ("run.csv", "other.csv", "references.csv", "scores.csv", "others.csv", "run.jsonl"):
        assert f"{name} · sha256 " in text


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_axe_finds_no_serious_violation(theme, width, open_page):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(width=width, theme=theme)
    for selector in (None, "#filter-open", "#rows .row"):
        if selector:
            page.locator(selector).first.click()
        violations = Axe().run(page).response["violations"]
        grave = {v["id"]: [n["html"] for n in v["nodes"]] for v in violations if v["impact"] in ("serious", "critical")}
        assert grave == {}


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_page_fits_the_window_width(width, open_page):
    page = open_page(width=width)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#rows .row").first.click()
    assert page.locator("#detail").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_theme_button_overrides_the_system(open_page):
    page = open_page(theme="dark")
    colour = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != dark
    page.click("#theme")
    assert page.evaluate(colour) == dark


@pytest.fixture(scope="module")
def sure_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose n-best file has expected scores: of b the lowest, of c unknown."""
    work = tmp_path_factory.mktemp("sure")
    (work / "images").mkdir()
    expected = {"a": 0.7, "b": 0.25, "c": None, "d": 0.5}
    for name, image in zip(expected, random_pictures(4), strict=True):
        image.save(work / "images" / f"{name}.png")
    write_run(work / "run.csv", [(name, "a chest film") for name in expected])
    (work / "scores.csv").write_text("ID,rouge1@11111111,rouge_l@1\na,1,1\nb,0.2,0\nc,0.3,1\nd,0.6,1\n")
    hypotheses = [{"text": "a chest film", "sum_log_prob": -1.0}]
    lines = [{"id": name, "expected_score": value, "hypotheses": hypotheses} for name, value in expected.items()]
    (work / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"run": "run.csv", "images": "images", "scores": "scores.csv", "n-best": "run.jsonl", "out": "report"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(work / value))]
    assert CliRunner().invoke(main, ["report", *words]).exit_code == 0
    return work / "report" / "index.html"


def test_lowest_expected_scores_come_first(sure_page, open_from_disk):
    page = open_from_disk(sure_page)
    assert shown(page) == ["b", "d", "a", "c"]
    assert page.locator("#sort").evaluate("(list) => list.selectedOptions[0].text") == "expected_score (n-best)"
    page.locator("#sort").select_option("order")
    assert shown(page) == ["a", "b", "c", "d"]
    page.wait_for_url("**#sort=order")
    assert shown(open_from_disk(sure_page, anchor="#sort=order")) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_curve_of_the_surest_captions(theme, width, sure_page, open_from_disk):
    from axe_playwright_python.sync_playwright import Axe

    page = open_from_disk(sure_page, width=width, theme=theme)
    figure = page.locator("figure.chart", has_text="Surest captions")
    note = figure.locator("figcaption")
    assert note.inner_text().startswith("surest 50 %: 0.800 (95 % ")
    assert "; all: 0.525 (95 % " in note.inner_text()
    assert "Mean rouge1 of the surest captions" in figure.locator(".canvas").get_attribute("aria-label")
    assert (
        figure.locator("canvas").evaluate(
            "(c) => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        > 3
    )
    figure.locator("select").select_option(label="rouge_l")
    assert "; all: 0.750 (95 % " in note.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    violations = Axe().run(page).response["violations"]
    assert [v["id"] for v in violations if v["impact"] in ("serious", "critical")] == []


@pytest.fixture(scope="module")
def looking_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with attention: two words with maps in opposite corners for a, markup for b, nothing for c."""
    work = tmp_path_factory.mktemp("looking")
    (work / "images").mkdir()
    (work / "maps").mkdir()
    captions = {"a": "a lesion.", "b": INJECTED, "c": "a chest film"}
    for name in captions:
        Image.new("RGB", (80, 40), "grey").save(work / "images" / f"{name}.png")
    write_run(work / "run.csv", captions.items())
    maps = np.zeros((4, 4, 4), np.float16)
    maps[0, 0, 0] = maps[1, 3, 3] = maps[2, 0, 3] = maps[3, 3, 0] = 0.5
    maps[2, 3, 3] = 0.2
    first = Attention((7, 8, 9, 3), maps, ("a", "lesion."), (0, 1, 1, -1), (0,))
    write_attention(work / "maps" / "a.npz", first)
    second = Attention((7,), maps[:1], tuple(INJECTED.split()[:1]), (0,), (0,), crop=(32, 32, 32))
    write_attention(work / "maps" / "b.npz", second)
    options = {"run": "run.csv", "images": "images", "attention": "maps", "out": "report"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(work / value))]
    result = CliRunner().invoke(main, ["report", *words])
    assert result.exit_code == 0, result.output
    assert f"{work / 'maps'} lacks 1 of 3 ids of {work / 'run.csv'}: c" in result.output
    return work / "report" / "index.html"


def redness(page: Any) -> list[list[int]]:
    """Return how much redder than green the corners of the image with its map are, as [[top left, top right], ...]."""
    with Image.open(io.BytesIO(page.locator("#detail canvas.map").screenshot())) as shot:
        small = np.asarray(shot.convert("RGB").resize((4, 4), Image.Resampling.BOX), int)
    return (small[::3, ::3, 0] - small[::3, ::3, 1]).tolist()


def test_words_show_their_maps(looking_page, open_from_disk):
    page = open_from_disk(looking_page)
    page.locator("#rows .row", has_text="a lesion.").click()
    first, second = page.locator(".look button").all()
    canvas = page.locator("#detail canvas.map")
    assert [button.text_content() for button in (first, second)] == [
        "a, looks most at the top left",
        "lesion., looks most at the bottom right",
    ]
    assert canvas.is_hidden()
    first.hover()
    canvas.wait_for(state="visible")
    frame, image = canvas.bounding_box(), page.locator("#detail .frame img").bounding_box()
    assert frame["width"] == pytest.approx(2 * frame["height"], rel=0.02), "the map has the shape of the image"
    assert frame["width"] <= image["width"] + 1
    (top_left, top_right), (bottom_left, bottom_right) = redness(page)
    assert top_left > 60 + max(top_right, bottom_left, bottom_right)
    page.locator("#detail h2").hover()
    canvas.wait_for(state="hidden")
    second.click()
    page.locator("#detail h2").hover()
    (top_left, top_right), (bottom_left, bottom_right) = redness(page)
    assert bottom_right > 60 + max(top_left, bottom_left)
    assert bottom_right > top_right > top_left, "the third token of the word looks elsewhere: its map is a mean"
    assert canvas.is_visible(), "a chosen word keeps its map"
    assert second.get_attribute("aria-pressed") == "true"
    second.click()
    page.locator("#detail h2").click()
    canvas.wait_for(state="hidden")


def test_words_are_reached_by_keyboard_and_touch(looking_page, open_from_disk, browser):
    page = open_from_disk(looking_page)
    page.locator("#rows .row", has_text="a lesion.").click()
    page.locator("#detail .close").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.look button')")
    canvas = page.locator("#detail canvas.map")
    canvas.wait_for(state="visible")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator(".look button").nth(1).get_attribute("aria-pressed") == "true"
    page.keyboard.press("j")
    assert page.locator("#detail h2").inner_text() == "b"
    phone = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    try:
        touched = phone.new_page()
        touched.goto(looking_page.as_uri())
        touched.wait_for_selector("html[data-ready]")
        touched.locator("#rows .row", has_text="a lesion.").tap()
        button = touched.locator(".look button").nth(1)
        button.tap()
        touched.locator("#detail canvas.map").wait_for(state="visible")
        assert button.get_attribute("aria-pressed") == "true"
        assert min(button.bounding_box()["height"], button.bounding_box()["width"]) >= 44
        button.tap()
        assert button.get_attribute("aria-pressed") == "false"
    finally:
        phone.close()


def test_markup_in_a_word_and_images_without_maps(looking_page, open_from_disk):
    page = open_from_disk(looking_page)
    page.locator("#rows .row").nth(1).click()
    assert page.locator(".look button").first.inner_text().startswith("</script><script>window.hacked")
    page.locator(".look button").first.hover()
    page.locator("#detail canvas.map").wait_for(state="visible")
    assert page.evaluate("window.hacked") is None
    page.locator("#rows .row").nth(2).click()
    assert page.locator(".look, #detail canvas").count() == 0


def test_differing_captions_are_sorted_by_their_change(open_page):
    page = open_page()
    page.locator("#subtitle button").click()
    changes = {"axial_1": 2 / 12, "coronal_10": 1.0}
    assert shown(page) == sorted(changes, key=lambda name: -changes[name])
    assert page.locator("#sort").input_value() == "change"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_on_a_page_with_maps(theme, width, looking_page, open_from_disk):
    from axe_playwright_python.sync_playwright import Axe

    page = open_from_disk(looking_page, width=width, theme=theme)
    page.locator("#rows .row", has_text="a lesion.").click()
    page.locator(".look button").nth(1).click()
    page.locator("#detail canvas.map").wait_for(state="visible")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    violations = Axe().run(page).response["violations"]
    assert [v["id"] for v in violations if v["impact"] in ("serious", "critical")] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_of_pairs_shows_images_and_passes_axe(theme, width, open_from_disk, tmp_path):
    from axe_playwright_python.sync_playwright import Axe

    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(random_pictures(3)):
        image.save(folder / f"{i}.png")
        image.resize((90, 80)).save(folder / f"<b>{i}.png")
    (folder / "bad.png").write_bytes(b"damaged")
    (folder / "bad2.png").write_bytes(b"damaged")
    out = tmp_path / "twins.html"
    words = ["duplicates", "--input", str(folder), "--out", str(tmp_path / "twins.csv"), "--page", str(out)]
    assert CliRunner().invoke(main, words).exit_code == 0
    page = open_from_disk(out, width=width, theme=theme)
    assert page.locator("#copy").inner_text() == "Copies"
    assert page.locator("li.card").count() == 4
    widths = page.locator("img").evaluate_all("(all) => all.map((image) => image.naturalWidth)")
    assert len(widths) == 6
    assert min(widths) > 0
    assert page.locator(".no-picture").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page)
    assert [problem["id"] for problem in found.response["violations"]] == []

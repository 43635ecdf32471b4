"""Write the input files of a challenge-sized report, and measure how fast its page loads and scrolls in a browser."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.run.outputs import write_run
from tests.helpers.legends import make_caption

SIZE = {"width": 1440, "height": 900}
WATCH = """window.firstRow = new Promise((done) => new MutationObserver((_, watching) => {
    if (!document.querySelector("#rows .row")) return;
    watching.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now())));
}).observe(document, { childList: true, subtree: true }));"""
"""The first row counts as painted after the frame that contains it."""
PAINTED_S = """async () => {
    const firstRow = await window.firstRow;
    const anything = performance.getEntriesByName("first-contentful-paint")[0].startTime;
    return [anything, firstRow].map((ms) => Math.round(ms) / 1000);
}"""
SCROLL = """async ([step, frames]) => {
    const rows = document.getElementById("rows"), top = document.querySelector(".bar").offsetHeight + 60;
    let gaps = 0, most = 0, slowest = 0, before = performance.now();
    for (let k = 0; k < frames; k++) {
        window.scrollBy(0, step);
        await new Promise(requestAnimationFrame);
        const now = performance.now();
        slowest = Math.max(slowest, now - before);
        before = now;
        most = Math.max(most, rows.children.length);
        for (let y = Math.max(top, rows.getBoundingClientRect().top + 1); y < innerHeight; y += 40) {
            if (!document.elementFromPoint(300, y)?.closest(".row")) gaps++;
        }
    }
    return { gaps, most_rows: most, slowest_frame_s: Math.round(slowest) / 1000, place: scrollY };
}"""
"""Scroll by one step per frame. A gap is a point of a grid with steps of 40 px that shows no row in a frame."""


def write_inputs(folder: Path, ids: Sequence[str], seed: int = 0) -> dict[str, Path]:
    """Write two runs, references, candidates and scores of generated captions. Returns {option: file}."""
    rng = random.Random(seed)
    files = {name: folder / f"{name}.csv" for name in ("run", "against", "references", "scores", "against_scores")}
    texts = {name: [make_caption(rng) for _ in ids] for name in ("run", "against", "references")}
    for name, captions in texts.items():
        write_run(files[name], zip(ids, captions, strict=True))
    for name in ("scores", "against_scores"):
        lines = ["ID,bertscore@0a,rouge1@0b,bleurt@0c,clipscore@0d"]
        lines += [",".join([image_id, *(f"{rng.betavariate(5, 3):.6f}" for _ in range(4))]) for image_id in ids]
        files[name].write_text("\n".join(lines) + "\n")
    files["n_best"] = folder / "run.jsonl"
    with files["n_best"].open("w") as stream:
        for image_id, text in zip(ids, texts["run"], strict=True):
            texts_of_image = [text, *(make_caption(rng) for _ in range(3))]
            hypotheses = [{"text": t, "sum_log_prob": -9.0 - k * rng.random()} for k, t in enumerate(texts_of_image)]
            stream.write(json.dumps({"id": image_id, "hypotheses": hypotheses}) + "\n")
    return files


def measure_page(browser: Any, page: Path) -> dict[str, Any]:
    """Open a report from disk and measure it.

    Returns the seconds until the first paint and until the first rows are painted, the results of SCROLL for three
    speeds, and the seconds of a search and a sort.
    """
    context = browser.new_context(viewport=SIZE)
    tab = context.new_page()
    tab.add_init_script(WATCH)
    tab.goto(page.resolve().as_uri())
    first_paint_s, first_rows_s = tab.evaluate(PAINTED_S)
    result = {"first_paint_s": first_paint_s, "first_rows_s": first_rows_s}
    for name, step in (("reading", 120), ("flicking", 2400), ("dragging", 60_000)):
        result[name] = tab.evaluate(SCROLL, [step, 60 if step < 60_000 else 30])
    times = {}
    for name, act in {
        "search": lambda: tab.fill("#search", "fracture"),
        "sort": lambda: tab.select_option("#sort", label="bertscore (run)"),
    }.items():
        start = time.perf_counter()
        act()
        tab.evaluate("() => new Promise(requestAnimationFrame)")
        times[f"{name}_s"] = round(time.perf_counter() - start, 3)
    context.close()
    return result | times

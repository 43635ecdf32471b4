"""Pictures of `engine report` for the README: the example images, 4 beams against greedy.

python -m benchmarks.report_shots
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from PIL import Image

from benchmarks.pages.browser import open_browser

IMAGES, REFERENCES = "examples/images", "examples/captions.csv"
MOST_BYTES = 300_000


def make_report(work: Path) -> Path:
    """Caption, score and report as a reader of the README would; return the page."""
    work.mkdir(parents=True, exist_ok=True)
    signatures = []
    for name, beams in (("beams4", "4"), ("greedy", "1")):
        files = {kind: str(work / f"{name}.{kind}") for kind in ("csv", "jsonl", "json")}
        more = ("--n-best", beams, "--n-best-out", files["jsonl"], "--timings-out", str(work / f"{name}_timings.csv"))
        said = _engine(
            *("caption", "--input", IMAGES, "--beams", beams, "--no-repeat-ngram", "3", "--out", files["csv"], *more)
        )
        signatures += re.findall("^engine:.*", said, re.M)[-1:]
        scores = ("--out", files["json"], "--per-image", str(work / f"{name}_scores.csv"))
        said = _engine("score", "--run", files["csv"], "--references", REFERENCES, *scores)
    signatures += re.findall(r"\]  (\S+:\S+)$", said, re.M)
    paths = {"--run": "beams4.csv", "--scores": "beams4_scores.csv", "--n-best": "beams4.jsonl"}
    paths |= {"--against": "greedy.csv", "--against-scores": "greedy_scores.csv", "--out": "report"}
    paths |= {"--columns": "beams4_timings.csv"}
    words = [word for option, name in paths.items() for word in (option, str(work / name))]
    words += [word for signature in signatures for word in ("--signature", signature)]
    _engine("report", "--images", IMAGES, "--references", REFERENCES, *words)
    return work / "report" / "index.html"


def _engine(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "engine", *words], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def take_shots(browser: Any, page: Path, out: Path) -> list[Path]:
    """Write the pictures: the top of the page, one image beside the list, and a phone, light and dark."""
    wide, phone = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
    shots = []
    for name, size, theme, selector in (
        ("report_light", wide, "light", None),
        ("report_dark", wide, "dark", "#rows .row"),
        ("report_phone_light", phone, "light", ".bar"),
        ("report_phone_dark", phone, "dark", "#rows .row"),
    ):
        context = browser.new_context(viewport=size, color_scheme=theme)
        tab = context.new_page()
        tab.goto(page.resolve().as_uri())
        tab.select_option("#sort", label="Gain in cider")
        if selector:
            tab.evaluate("document.querySelector('.bar').scrollIntoView()")
        if selector and selector != ".bar":
            tab.locator(selector).first.click()
        if name == "report_phone_dark":
            tab.evaluate("document.querySelector('.candidates').scrollIntoView({ block: 'center' })")
        tab.wait_for_load_state("networkidle")
        tab.wait_for_timeout(300)  # plots are drawn in the next frame, pictures decoded aside
        shots.append(_save(tab.screenshot(), out / f"{name}.png"))
        context.close()
    return shots


def _save(content: bytes, path: Path) -> Path:
    """Write a PNG of at most MOST_BYTES: with 256 colours where it needs to be."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    for colours in (None, 256, 128, 64):
        stream = io.BytesIO()
        (picture if colours is None else picture.quantize(colours)).save(stream, "PNG", optimize=True)
        if stream.tell() < MOST_BYTES:
            break
    path.write_bytes(stream.getvalue())
    return path


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/report_shots"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(work: Path, out: Path) -> None:
    """Make a report of the examples and take its pictures."""
    page = make_report(work)
    with open_browser() as browser:
        for path in take_shots(browser, page, out):
            click.echo(f"{path} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

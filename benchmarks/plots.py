"""Plot the records in benchmarks/results/ as PNG files for the README.

python -m benchmarks.plots
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path("benchmarks/results")
NAMES = {
    "engine": "engine",
    "openvino": "engine on OpenVINO",
    "conventional": "usual ONNX loop",
    "generate": "Hugging Face generate",
}
FAULTS = {"kill": "#b3261e", "term": "#c98b2b", "full disk": "#3b5b92"}
COLOURS = {"engine": "#0b6e4f", "openvino": "#7fb69e", "conventional": "#c98b2b", "generate": "#8a8f98"}


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Return every valid record of a benchmark in a directory; other files there, such as estimates, are skipped."""
    records = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return [record for record in records if record.get("benchmark") and record.get("valid", True)]


BLIPS = ("base", "base-384", "large", "demo")
"""Workloads in the plot of beams; the ratios of other families are too different for one scale."""


def plot_beams(records: list[dict[str, Any]]) -> Any:
    """Plot bars for BLIP: speed of each program relative to generate, one group per workload and number of beams."""
    runs = sorted(filter(has_own_lengths, records), key=lambda r: (BLIPS.index(r["workload"]), r["setting"]["beams"]))
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(NAMES)
    for j, program in enumerate(NAMES):
        for i, run in enumerate(runs):
            if program not in run["programs"]:
                continue
            row = run["programs"][program]
            speed = run["programs"]["generate"]["times_engine"] / row["times_engine"]
            bar = axes.bar(i + (j - 1.5) * width, speed, width, color=COLOURS[program])
            label = f"{speed:.1f}\n{row['seconds_per_image']:.2f} s"
            axes.bar_label(bar, [label], fontsize=5.5, padding=1, color="#444")
    axes.set_xticks(range(len(runs)), [f"{r['workload']}\n{_beams(r)}" for r in runs], fontsize=8)
    axes.set_ylabel("times the speed of generate")
    axes.margins(y=0.15)
    axes.legend(
        [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in NAMES], NAMES.values(), fontsize=7, frameon=False
    )
    axes.set_title("Speed relative to Hugging Face generate at its best batch size, and seconds per image", fontsize=9)
    return _finish(figure, axes)


def _beams(record: dict[str, Any]) -> str:
    beams = record["setting"]["beams"]
    return "greedy" if beams == 1 else f"{beams} beams"


def plot_lengths(records: list[dict[str, Any]]) -> Any:
    """Plot lines: seconds per image over the forced length of all captions."""
    runs = sorted(filter(has_one_length, records), key=lambda r: r["setting"]["forced_tokens"])
    figure, axes = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for program, name in NAMES.items():
        points = [
            (r["setting"]["forced_tokens"], r["programs"][program]["seconds_per_image"])
            for r in runs
            if program in r["programs"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS[program], label=name)
    axes.set_xlabel("new tokens in every caption")
    axes.set_ylabel("seconds per image")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("BLIP-base shape, 4 beams", fontsize=9)
    return _finish(figure, axes)


def plot_rows(records: list[dict[str, Any]]) -> Any:
    """Plot lines: speed of the engine over the number of beams in flight."""
    figure, axes = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for record in (r for r in records if r["benchmark"] == "rows"):
        fastest = max(record["images_per_s"].values())
        points = [(int(rows), speed / fastest) for rows, speed in record["images_per_s"].items()]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{record['workload']}, {record['beams']} beams")
    axes.set_xscale("log", base=2)
    ticks = sorted({int(rows) for r in records if r["benchmark"] == "rows" for rows in r["images_per_s"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("rows: beams decoded side by side")
    axes.set_ylabel("speed, share of the fastest")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)
    return _finish(figure, axes)


def plot_soak(records: list[dict[str, Any]]) -> Any:
    """Plot images/s (top) and memory (bottom) over time of the largest soak: undisturbed left, disturbed right."""
    record = max((r for r in records if r["benchmark"] == "soak"), key=lambda r: r["setting"]["images"])
    figure, grid = plt.subplots(2, 2, figsize=(9, 3.8), sharex="col", sharey="row", layout="constrained")
    for column, part in enumerate(("undisturbed", "disturbed")):
        samples = [sample for sample in record[part]["samples"] if sample[1] > 0]
        minutes = [at / 60 for at, _, _ in samples]
        window = max(1, len(samples) // 40)
        speeds = [
            max(0.0, (after[1] - before[1]) / (after[0] - before[0]))
            for before, after in zip(samples, samples[window:], strict=False)
        ]
        grid[0, column].plot(minutes[window:], speeds, color=COLOURS["engine"], linewidth=1)
        grid[1, column].plot(minutes, [size for _, _, size in samples], color=COLOURS["generate"], linewidth=1)
        for at, kind, _ in record[part].get("faults", ()):
            grid[0, column].axvline(at / 60, color=FAULTS[kind], linewidth=0.7, linestyle=":")
        grid[0, column].set_title(f"{part}, {record['setting']['images']:,} images", fontsize=9)
        grid[1, column].set_xlabel("minutes")
        for axes in grid[:, column]:
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=7)
    grid[0, 0].set_ylabel("images/s", fontsize=8)
    grid[1, 0].set_ylabel("memory, GiB", fontsize=8)
    marks = [plt.Line2D([], [], color=colour, linestyle=":", label=kind) for kind, colour in FAULTS.items()]
    grid[0, 1].legend(handles=marks, fontsize=6, frameon=False, loc="lower right", ncols=3)
    return figure


def _finish(figure: Any, axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure


def _is_float32(record: dict[str, Any]) -> bool:
    """Return whether a record compares programs in float32 on BLIP. Records before 30 November have no `fidelity`."""
    return record["benchmark"] == "throughput" and record["workload"] in BLIPS and not record.get("fidelity")


def has_own_lengths(record: dict[str, Any]) -> bool:
    """Return whether a record compares programs in float32 on BLIP, with captions of their own lengths."""
    return _is_float32(record) and not record["setting"]["forced_tokens"]


def has_one_length(record: dict[str, Any]) -> bool:
    """Return whether a record compares programs in float32 on base with 4 beams, with captions of a forced length."""
    is_base = _is_float32(record) and (record["workload"], record["setting"]["beams"]) == ("base", 4)
    return is_base and bool(record["setting"]["forced_tokens"])


PLOTS: dict[str, tuple[Callable[..., Any], Callable[[dict[str, Any]], bool]]] = {
    "beams": (plot_beams, has_own_lengths),
    "lengths": (plot_lengths, has_one_length),
    "rows": (plot_rows, lambda record: record["benchmark"] == "rows"),
    "soak": (plot_soak, lambda record: record["benchmark"] == "soak"),
}
"""Name of a plot -> (function that draws it, predicate of the records that it shows)."""


def digest_of(name: str, records: list[dict[str, Any]]) -> str:
    """Return a checksum of the records that a plot shows. It is stored in the PNG, so that a test finds stale plots."""
    shown = [record for record in records if PLOTS[name][1](record)]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


@click.command()
@click.option(
    "--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="Folder of records."
)
def main(results: Path) -> None:
    """Write beams.png, lengths.png, rows.png and soak.png next to the records, if there are records to show."""
    records = read_records(results)
    for name, (plot, is_shown) in PLOTS.items():
        if not any(map(is_shown, records)):
            click.echo(f"no record for {name}.png", err=True)
            continue
        figure = plot(records)
        figure.savefig(results / f"{name}.png", dpi=130, metadata={"Records": digest_of(name, records)})
        plt.close(figure)
        click.echo(results / f"{name}.png")


if __name__ == "__main__":
    main()

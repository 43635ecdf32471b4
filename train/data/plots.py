"""Draw what a data set is like, from the numbers of inspect.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import OutputError

COLOURS = {"train": "#3b5b92", "valid": "#c98b2b", "test": "#0b6e4f"}
SHOWN = 0.99
"""Share of a split's captions that a plot of lengths shows at least; a longer tail is cut, and the axis says so."""


Stats = dict[str, Any]


def draw_dataset(stats: Stats, out: Path) -> None:
    """Draw caption lengths (words, and tokens where they were counted) and modalities by split into a PNG.

    Shares of each split, so that a small one can be compared with a large one. Raises OutputError when the file cannot
    be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    splits = stats["splits"]
    units = [unit for unit in ("words", "tokens") if any(found[unit] for found in splits.values())]
    has_modalities = any(found["modalities"]["with_concepts"] for found in splits.values())
    panels = max(1, len(units) + has_modalities)
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.4), layout="constrained", squeeze=False)
    try:
        for unit, panel in zip(units, axes[0], strict=False):
            _draw_lengths(panel, {name: found[unit] for name, found in splits.items() if found[unit]}, unit)
        if has_modalities:
            _draw_modalities(axes[0][-1], {name: found["modalities"] for name, found in splits.items()})
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        plt.close(figure)


def _draw_lengths(panel: Any, lengths: dict[str, Stats], unit: str) -> None:
    """Steps: share of the captions of each split that have a length."""
    longest = max(found["max"] for found in lengths.values())
    end = min(longest, max(_enough(found["counts"]) for found in lengths.values()) * 5 // 4)
    width = max(1, -(-end // 60))
    end += width - 1 - end % width  # the last step is a whole one
    beyond = 0
    for name, found in lengths.items():
        counts = {int(length): count for length, count in found["counts"].items()}
        total = sum(counts.values())
        beyond += sum(count for length, count in counts.items() if length > end)
        shares = [0.0] * (end // width + 1 + (longest <= end))  # a last line comes down to zero, a cut one does not
        for length, count in counts.items():
            if length <= end:
                shares[length // width] += 100 * count / total
        centres = [i * width + (width - 1) / 2 for i in range(len(shares))]
        label = f"{name}: {total} captions, median {found['median']:g}"
        panel.plot(centres, shares, drawstyle="steps-mid", linewidth=1.3, color=COLOURS.get(name), label=label)
    whole = sum(sum(found["counts"].values()) for found in lengths.values())
    tail = f"\n({beyond} of {whole} captions are longer, up to {longest}: not shown)" if beyond else ""
    panel.set_xlabel(f"{unit} a caption" + (f", in steps of {width}" if width > 1 else "") + tail)
    panel.set_ylabel("% of the captions of the split")
    panel.set_title(f"Caption length in {unit}")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)


def _enough(counts: dict[str, int]) -> int:
    """Return the length that SHOWN of the captions do not exceed."""
    left = SHOWN * sum(counts.values())
    for length, count in counts.items():
        left -= count
        if left <= 0:
            return int(length)
    return int(max(counts, key=int))


def _draw_modalities(panel: Any, modalities: dict[str, Stats]) -> None:
    """Bars: share of the images of each split that have a modality, with their number."""
    known = next(iter(modalities.values()))["counts"]
    names = [name for name in known if any(found["counts"][name] for found in modalities.values())]
    height = 0.8 / len(modalities)
    for i, (split, found) in enumerate(modalities.items()):
        images = found["images"] or 1
        places = [j + (i - (len(modalities) - 1) / 2) * height for j in range(len(names))]
        counts = [found["counts"][name] for name in names]
        bars = panel.barh(places, [100 * n / images for n in counts], height, color=COLOURS.get(split), label=split)
        panel.bar_label(bars, [str(count) for count in counts], fontsize=6.5, padding=2, color="#444")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xlabel("% of the images of the split, and their number")
    panel.set_title("Modality, from the concepts")
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)

"""Write down a tuning as Markdown. Knows nothing of how captions and scores are made."""

from __future__ import annotations

from typing import Any

from train.sweep.table1 import TITLES, markdown_rows

VERDICTS = {"gain": "a gain", "loss": "a loss", "none": "no gain is shown"}


def verdict(shown: dict[str, Any]) -> str:
    """Return `gain` or `loss` where the interval of a difference lies on that side of zero, else `none`."""
    return "gain" if shown["low"] > 0 else "loss" if shown["high"] < 0 else "none"


def as_markdown(result: dict[str, Any]) -> str:
    """Return what tuned.json holds for people: what is shown on the images held back first, then how it came about."""
    name, images = result["checkpoint"].get("name", "a bundle"), result["images"]
    title = TITLES.get(result["metric"], result["metric"])
    lines = [
        f"# {name}, split {result['split']}: decoding settings chosen by {title}",
        "",
        f"Chosen on {images['tuning']} images, compared on {images['held_back']} others that the search has not seen.",
        "",
        *_settings(result),
        "",
        f"## The {images['held_back']} images held back",
        "",
        _statement(result, title),
        "",
        *_differences(result),
        "",
        "The difference is chosen minus own, with its 95 % interval (paired bootstrap over images).",
        "",
        "To caption with the chosen settings:",
        "",
        f"```sh\n{result['command']}\n```",
        "",
        f"## The {images['tuning']} images of the tuning half",
        "",
        *_trials(result, title),
        "",
        "The chosen settings look better here than they are, for they were chosen by these scores.",
        "",
        *_notes(result),
    ]
    return "\n".join(lines) + "\n"


def _settings(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"`{name}`",
            _cell(value),
            _cell(result["chosen"][name]),
            ", ".join(map(_cell, result["grids"].get(name, ()))) or "given, not tuned",
        ]
        for name, value in result["own"].items()
    ]
    return markdown_rows(["setting", "the checkpoint's own", "chosen", "values tried"], rows)


def _cell(value: Any) -> str:
    return "its min_length" if value is None else f"{value:g}"


def _statement(result: dict[str, Any], title: str) -> str:
    """Return in a sentence what the images held back show of the metric that chose."""
    if result["own"] == result["chosen"]:
        return "No gain is shown: no other settings were better on the tuning half, so the checkpoint keeps its own."
    shown = result["held_back"][result["metric"]]
    if "unavailable" in shown:
        return f"{title} is unavailable here, so no gain is shown."
    return {
        "gain": f"A gain is shown: the interval of {title} lies above zero.",
        "loss": f"A loss is shown: the interval of {title} lies below zero. Keep the checkpoint's own settings.",
        "none": f"No gain is shown: the interval of {title} includes zero.",
    }[verdict(shown)]


def _differences(result: dict[str, Any]) -> list[str]:
    rows = []
    for metric, shown in result["held_back"].items():
        title = TITLES.get(metric, metric)
        if "unavailable" in shown:
            rows.append([title, "unavailable", "unavailable", "-", "-", "-"])
            continue
        rows.append(
            [
                title,
                f"{shown['own']:.4f}",
                f"{shown['chosen']:.4f}",
                f"{shown['difference']:+.4f} [{shown['low']:+.4f}, {shown['high']:+.4f}]",
                f"{shown['wins']}, {shown['losses']}, {shown['ties']}",
                VERDICTS[verdict(shown)],
            ]
        )
    header = ["metric", "own", "chosen", "difference", "images better, worse, equal", "shown"]
    return markdown_rows(header, rows)


def _trials(result: dict[str, Any], title: str) -> list[str]:
    rows = []
    for trial in result["trials"]:
        marks = [word for word in ("own", "chosen") if trial["settings"] == result[word]]
        rows.append([*map(_cell, trial["settings"].values()), f"{trial['value']:.4f}", ", ".join(marks)])
    return markdown_rows([*(f"`{name}`" for name in result["own"]), title, ""], rows)


def _notes(result: dict[str, Any]) -> list[str]:
    """Return with what it was made."""
    halves, (height, width) = result["halves"], result["image_size"]
    end = "the last changed nothing" if result["settled"] else "more rounds might find better ones"
    grouped = f", ids grouped by `{halves['group']}`" if halves["group"] else ""
    lines = [
        f"* search: one setting after the other, runs: {len(result['trials'])}, rounds: {result['rounds']}; {end}",
        f"* data: {result['data']}, split {result['split']}, resized to {height} x {width} px; halves by id, seed "
        f"{halves['seed']}{grouped}",
        f"* checkpoint: {result['checkpoint'].get('name', 'a bundle')}, sha256 "
        f"{result['checkpoint'].get('sha256', 'unknown')}",
    ]
    if result["fixed"]:
        lines.append(f"* given, for both: `{' '.join(result['fixed'])}`")
    lines += [f"* not tried: `{name}` {', '.join(map(_cell, some))}" for name, some in result["left_out"].items()]
    for metric, shown in result["held_back"].items():
        how = f"unavailable: {shown['unavailable']}" if "unavailable" in shown else f"`{shown['signature']}`"
        lines.append(f"* {TITLES.get(metric, metric)}: {how}")
    return lines

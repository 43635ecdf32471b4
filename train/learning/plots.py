"""Draw how a run went, from the Trainer's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_curves(history: list[dict[str, Any]], out: Path) -> None:
    """Draw losses, validation metrics and the learning rate over epochs into a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    def series(name: str) -> tuple[list[float], list[float]]:
        found = [(entry["epoch"], entry[name]) for entry in history if name in entry and "epoch" in entry]
        return [x for x, _ in found], [y for _, y in found]

    metrics = sorted({name for entry in history for name in entry if name.startswith("eval_")} - {"eval_loss"})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    axes[0].plot(*series("loss"), label="training (mean since the last point)")
    axes[0].plot(*series("eval_loss"), "o-", label="validation")
    rewards = sorted({name for entry in history for name in entry if name.startswith("reward_")})
    if rewards:
        axes[0].set(title="loss: training self-critical, validation in nats a token", xlabel="epoch")
    else:
        axes[0].set(title="loss: cross entropy a token, nats", xlabel="epoch", ylim=(0, None))
    axes[0].legend(frameon=False)
    for name in metrics:
        axes[1].plot(*series(name), "o-", label=name.removeprefix("eval_"))
    for name in rewards:
        axes[1].plot(*series(name), linewidth=1, label=f"{name.replace('_', ' ')} (training)")
    axes[1].set(title="validation captions", xlabel="epoch")
    if metrics or rewards:
        axes[1].legend(frameon=False)
    axes[2].plot(*series("learning_rate"))
    axes[2].set(title="learning rate", xlabel="epoch", ylim=(0, None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)
    plt.close(figure)

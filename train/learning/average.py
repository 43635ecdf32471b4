"""Average the weights of a run's epochs: a plain mean, written as a checkpoint like theirs.

Knows nothing of how models are trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.errors import DataError, OutputError, UsageError
from export.bundle import checkpoint_sha256
from export.reference.huggingface import Reference
from train.learning.evaluate import LOSS
from train.learning.run_dir import BestModels, save_checkpoint
from train.recipe import Recipe

AVERAGE = "average.json"
"""What a checkpoint is the mean of."""


@dataclass(frozen=True)
class Choice:
    """Which epochs of a run: the `last` so many, the `best` so many, or those named; all that are kept without any."""

    last: int | None = None
    best: int | None = None
    epochs: tuple[int, ...] = ()


def average(run: Path, choice: Choice, out: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Write the mean of the chosen epochs' weights into the new directory `out`; return what average.json says.

    Each weight is summed in float64 in the order of the epochs, divided by their number and rounded to float32 once.
    Configuration, tokenizer and image processor are those of the first of them. Raises UsageError, DataError where the
    models have not the same shapes, CheckpointError, or OutputError.
    """
    chosen = choose_epochs(run, choice)
    if out.exists():
        raise UsageError(f"--out {out} exists: name a new directory")
    log(f"averaging the epochs {', '.join(map(str, chosen))}")
    reference = mean_of(list(chosen.values()))
    report = {
        "run": run.resolve().name,
        "epochs": list(chosen),
        "checkpoints": {path.name: checkpoint_sha256(path) for path in chosen.values()},
    }
    half = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        save_checkpoint(reference, half)
        (half / AVERAGE).write_text(json.dumps(report, indent=1) + "\n")
        half.rename(out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    return report | {"checkpoint": str(out)}


def choose_epochs(run: Path, choice: Choice) -> dict[int, Path]:
    """Return the directories of the chosen epochs in the order of the epochs. Raises UsageError."""
    if sum(map(bool, (choice.last, choice.best, choice.epochs))) > 1:
        raise UsageError("--last, --best and numbers of epochs exclude each other: give one of them")
    ranked = BestModels(run / "models", replace(Recipe(), metric=_metric(run))).ranked()
    kept = {epoch: path for epoch, path, _ in ranked}
    if choice.last:
        chosen = _last(run, kept, choice.last)
    elif choice.best:
        chosen = list(kept)[: choice.best]
        if len(chosen) < choice.best:
            raise UsageError(f"{run} {_keeps(kept)}, not {choice.best} epochs: train with a larger keep")
    else:
        chosen = list(choice.epochs or kept)
    missing = [epoch for epoch in chosen if epoch not in kept]
    if missing:
        raise UsageError(f"{run} {_keeps(kept)}, not {', '.join(map(str, missing))}")
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        named = ", ".join(map(str, chosen)) or "none"
        raise UsageError(f"{run}: a mean is of two epochs or more, each once, not of {named}")
    return {epoch: kept[epoch] for epoch in sorted(chosen)}


def _last(run: Path, kept: dict[int, Path], count: int) -> list[int]:
    """Return the last `count` epochs of a run; raise UsageError where it goes on, or they were not all kept."""
    try:
        entries = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        last = max(round(entry["epoch"]) for entry in entries if f"eval_{LOSS}" in entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run} has not come to its end, so that none of its epochs is the last: name them") from error
    wanted = list(range(last - count + 1, last + 1))
    if any(epoch not in kept for epoch in wanted):
        raise UsageError(
            f"{run} {_keeps(kept)}, and its last epoch is {last}: train with keep={count} or more, or name epochs"
        )
    return wanted


def _keeps(kept: dict[int, Path]) -> str:
    return f"keeps the epochs {', '.join(map(str, sorted(kept)))}" if kept else "keeps no epoch"


def _metric(run: Path) -> str:
    """Return what the best epochs of a run are chosen by. Raises UsageError where it is no run directory."""
    try:
        return str(json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"]["metric"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run} is no run directory of `train finetune`: its run.json cannot be read") from error


def mean_of(checkpoints: Sequence[Path]) -> Reference:
    """Return the first checkpoint with the mean of all weights; a tensor that two layers share is averaged once.

    Raises DataError where shapes differ: position tables of other image sizes are not of the same places.
    """
    first = Reference.load(checkpoints[0])
    sums = {name: tensor.detach().double() for name, tensor in first.model.named_parameters()}
    for path in checkpoints[1:]:
        others = dict(Reference.load(path).model.named_parameters())
        differing = [name for name, total in sums.items() if name not in others or others[name].shape != total.shape]
        if differing or len(others) > len(sums):
            named = ", ".join(differing[:3]) or "the number of its tensors"
            raise DataError(f"{path} has other shapes than {checkpoints[0]} ({named}): only equal models have a mean")
        for name, total in sums.items():
            total += others[name].detach().double()
    with torch.no_grad():
        for name, parameter in first.model.named_parameters():
            parameter.copy_(sums[name] / len(checkpoints))
    return first

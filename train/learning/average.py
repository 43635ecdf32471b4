"""Average the weights of several epochs of a run and write the mean as a checkpoint of the same format."""

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
from train.learning.run_dir import BestModels, save_checkpoint
from train.learning.trainer import LOSS
from train.recipe import Recipe

AVERAGE = "average.json"
"""File in the averaged checkpoint that names the run and the epochs."""


@dataclass(frozen=True)
class Choice:
    """Which epochs to average: the `last` N, the `best` N, or those in `epochs`; by default all that the run kept."""

    last: int | None = None
    best: int | None = None
    epochs: tuple[int, ...] = ()


def average(run: Path, choice: Choice, out: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Write the mean of the chosen epochs' weights into the new directory `out`; return the content of average.json.

    Each weight is summed in float64 in the order of the epochs, divided by their number and rounded to float32 once.
    Configuration, tokenizer and image processor are those of the earliest chosen epoch. Raises UsageError,
    CheckpointError, OutputError, or DataError if the models do not have the same shapes.
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
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_checkpoint(reference, partial)
        (partial / AVERAGE).write_text(json.dumps(report, indent=1) + "\n")
        partial.rename(out)  # `out` appears only when it is complete
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    return report | {"checkpoint": str(out)}


def choose_epochs(run: Path, choice: Choice) -> dict[int, Path]:
    """Return {epoch: directory} of the chosen epochs, earliest first. Raises UsageError."""
    if sum(map(bool, (choice.last, choice.best, choice.epochs))) > 1:
        raise UsageError("--last, --best and epoch numbers exclude each other: give only one of them")
    try:
        metric = str(json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"]["metric"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run} is not a run directory of `train finetune`: its run.json cannot be read") from error
    ranked = BestModels(run / "models", replace(Recipe(), metric=metric)).ranked()
    kept = {epoch: path for epoch, path, _ in ranked}
    keeps = f"{run} keeps " + (f"the epochs {', '.join(map(str, sorted(kept)))}" if kept else "no epoch")
    if choice.last:
        try:
            entries = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            last = max(round(entry["epoch"]) for entry in entries if f"eval_{LOSS}" in entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{run} has not ended, so that --last is not defined: give epoch numbers") from error
        if last < max(kept, default=0):  # of a run that was extended since
            raise UsageError(f"{run} has not ended, so that --last is not defined: give epoch numbers")
        chosen = list(range(last - choice.last + 1, last + 1))
        if any(epoch not in kept for epoch in chosen):
            raise UsageError(f"{keeps}, and its last epoch is {last}: train with a larger keep, or give epoch numbers")
    elif choice.best:
        chosen = list(kept)[: choice.best]
        if len(chosen) < choice.best:
            raise UsageError(f"{keeps}, fewer than {choice.best}: train with keep={choice.best} or more")
    else:
        chosen = list(choice.epochs or kept)
    missing = [epoch for epoch in chosen if epoch not in kept]
    if missing:
        raise UsageError(f"{keeps}, not {', '.join(map(str, missing))}")
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        named = ", ".join(map(str, chosen)) or "none"
        raise UsageError(f"{run}: an average needs at least two different epochs, not {named}")
    return {epoch: kept[epoch] for epoch in sorted(chosen)}


def mean_of(checkpoints: Sequence[Path]) -> Reference:
    """Return the first checkpoint with the mean of all weights.

    Raises DataError if shapes differ, as the position tables of different image sizes do.
    """
    first = Reference.load(checkpoints[0])
    # named_parameters lists a tensor that two layers share only once, so that it is averaged once
    sums = {name: tensor.detach().double() for name, tensor in first.model.named_parameters()}
    for path in checkpoints[1:]:
        others = dict(Reference.load(path).model.named_parameters())
        differing = [name for name, total in sums.items() if name not in others or others[name].shape != total.shape]
        if differing or len(others) > len(sums):
            named = ", ".join(differing[:3]) or "the number of its tensors"
            raise DataError(
                f"{path} has other shapes than {checkpoints[0]} ({named}): only equal shapes can be averaged"
            )
        for name, total in sums.items():
            total += others[name].detach().double()
    with torch.no_grad():
        for name, parameter in first.model.named_parameters():
            parameter.copy_(sums[name] / len(checkpoints))
    return first

"""Draw how a run went, from the Trainer's log."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import DataError, UsageError
from engine.files.atomic import write_atomically
from engine.files.lock import OutputLock
from engine.options import GENERATION_SETTINGS, DecodeOptions
from engine.run.outputs import write_run
from export.bundle import generation_defaults
from export.checkpoints.settings import DEFAULTS
from export.reference.huggingface import Reference
from train.learning.evaluate import LOSS
from train.recipe import Recipe


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


EVALUATION = "evaluation.json"
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "pillow")
EXTENSIBLE = ("step", "constant")
"""Schedules whose learning rates do not depend on the number of epochs: a run may be given more of them."""
WITHOUT_EFFECT = ("device_batch", "workers")
"""Settings that change how the work is shared and no result, so that a run may go on with others."""


@dataclass(frozen=True)
class BestModels:
    """The best epochs' models in `directory`, judged by the recipe's metric; everything is read from disk, so that a
    resumed run knows of those before. With `decoding` they caption so by themselves, see save_checkpoint.
    """

    directory: Path
    recipe: Recipe
    decoding: DecodeOptions | None = None

    def add(
        self, epoch: int, metrics: dict[str, float], captions: Sequence[tuple[str, str]], reference: Reference
    ) -> None:
        """Keep a model as epoch_NN and point `best` to the best one; drop what is no longer among the best."""
        target, half = self.directory / f"epoch_{epoch:02d}", self.directory / f".epoch_{epoch:02d}.tmp"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        save_checkpoint(reference, half, self.decoding)
        write_run(half / "valid.csv", captions)
        (half / EVALUATION).write_text(json.dumps({"epoch": epoch, "metrics": metrics}) + "\n")
        _remove(target)
        half.replace(target)
        ranked = self.ranked()
        _point_to(self.directory.parent / "best", ranked[0][1])
        for _, directory, _ in ranked[self.recipe.keep :]:
            _remove(directory)

    def ranked(self) -> list[tuple[int, Path, dict[str, float]]]:
        """Return (epoch, directory, metrics), the best first; among equals the lower loss counts, then the earlier."""
        found = []
        for path in sorted(self.directory.glob("epoch_*")):
            try:
                content = json.loads((path / EVALUATION).read_text())
                found.append((content["epoch"], path, content["metrics"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a power cut left it half written
        metric = self.recipe.metric
        sign = 1 if metric == LOSS else -1
        return sorted(found, key=lambda entry: (sign * entry[2][metric], entry[2][LOSS], entry[0]))

    def tie(self) -> str:
        """Return that the metric cannot choose among the kept epochs, so that the loss did; empty where it can."""
        ranked, metric = self.ranked(), self.recipe.metric
        values = {metrics[metric] for _, _, metrics in ranked}
        if metric == LOSS or len(ranked) < 2 or len(values) > 1:
            return ""
        return f"{metric} is {values.pop():.4f} in all kept epochs: the best is epoch {ranked[0][0]}, by its loss"


def save_checkpoint(reference: Reference, directory: Path, decoding: DecodeOptions | None = None) -> None:
    """Write a plain Hugging Face directory: weights, configuration, tokenizer and image processor.

    With `decoding` its generation settings are these and no others, in the text_config that BLIP's generate reads and
    in generation_config.json for readers; without, they are those of the checkpoint that was loaded.

    Saving the decoder alone, as the Trainer does with cached features, moves generation settings out of the
    configuration into the decoder's generation_config, which BLIP loses on the way to disk: they are put back.
    """
    text = reference.model.config.text_config
    if decoding is None:
        for name, value in generation_defaults(reference).items():
            setattr(text, name, value)
        reference.model.save_pretrained(directory, safe_serialization=True)
    else:
        settings = generation_settings(decoding, text.max_position_embeddings)
        with _set(text, settings), _set(reference.model.generation_config, settings):
            reference.model.save_pretrained(directory, safe_serialization=True)
    reference.tokenizer.save_pretrained(directory)
    reference.image_processor.save_pretrained(directory)


def generation_settings(decoding: DecodeOptions, positions: int) -> dict[str, Any]:
    """Return every generation setting that a bundle carries, by Hugging Face's name: what is not given is at its
    default there. Captions end where the model's `positions` do, as those of the validation.
    """
    settings = {name: DEFAULTS[name] for name in GENERATION_SETTINGS} | decoding.values()
    settings = {name: settings[name] for name in GENERATION_SETTINGS}
    if settings["max_new_tokens"] is not None:
        settings["max_new_tokens"] = min(settings["max_new_tokens"], positions - 1)
    settings["min_new_tokens"] = settings["min_new_tokens"] or None
    if settings["num_beams"] == 1:
        settings["length_penalty"] = DEFAULTS["length_penalty"]  # Hugging Face saves none that has no effect
    return settings


@contextmanager
def _set(config: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Give a configuration other settings for a while."""
    before = {name: vars(config)[name] for name in settings if name in vars(config)}
    changed = {name: value for name, value in settings.items() if value is not None or name in before}
    try:
        vars(config).update(changed)
        yield
    finally:
        for name in changed.keys() - before.keys():
            del vars(config)[name]
        vars(config).update(before)


def _remove(directory: Path) -> None:
    """Delete a directory; cut off in the middle, nothing of it is left under its name."""
    if directory.exists():
        doomed = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.replace(doomed)
        shutil.rmtree(doomed)


def _point_to(link: Path, target: Path) -> None:
    new = link.with_name(f".{link.name}.tmp")
    new.unlink(missing_ok=True)
    new.symlink_to(target.relative_to(link.parent))
    new.replace(link)


def write_log(out: Path, history: list[dict[str, Any]]) -> None:
    """Write the Trainer's log and draw it."""

    write_atomically(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
    draw_curves(history, out / "curves.png")


@contextmanager
def locked(out: Path, rank: int) -> Iterator[None]:
    """Let one run at a time work on a directory."""
    if rank:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with OutputLock(out / "run.json"):
        yield


def write_or_compare_record(
    out: Path, recipe: Recipe, record: dict[str, Any], log: Callable[[str], None], *, is_begun: bool
) -> None:
    """Write run.json, or compare with the one that is there: a directory holds one run.

    `record` says what the run is made of besides the recipe. The record of a start that left no state of training and
    no model (`is_begun` False) is replaced. More epochs are accepted where the schedule does not depend on them.
    Raises UsageError naming what differs, DataError for a damaged record of a run that was begun.
    """
    settings = {name: value for name, value in recipe.settings().items() if name not in WITHOUT_EFFECT}
    record = {"recipe": settings} | record
    path = out / "run.json"
    found = _read_record(path)
    if path.exists():
        if found is None and is_begun:
            raise DataError(f"{path} is damaged: restore it, or delete {out} to start afresh")
        earlier = Recipe().settings() | (found or {}).get("recipe", {})  # a setting that came later was at its default
        changed = [name for name in record if name != "recipe" and (found or {}).get(name) != record[name]]
        changed += [name for name, value in settings.items() if earlier.get(name) != value]
        if not changed:
            return
        if not is_begun:
            log(f"{out} holds a start without a finished state of training: its record is replaced")
        elif changed == ["epochs"] and recipe.epochs > earlier["epochs"] and recipe.schedule in EXTENSIBLE:
            log(f"{out} is a run with epochs={earlier['epochs']}: it resumes up to epoch {recipe.epochs}")
        else:
            raise UsageError(_refusal(out, recipe, changed))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    shared = {name: value for name, value in recipe.settings().items() if name in WITHOUT_EFFECT}
    write_atomically(path, json.dumps(record | shared | {"versions": versions}, indent=1) + "\n")


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return what run.json holds, None where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_record = isinstance(found, dict) and isinstance(found.get("recipe"), dict)
    return found if is_record else None


def _refusal(out: Path, recipe: Recipe, changed: Sequence[str]) -> str:
    """Return why a run cannot resume in a directory, and what to do."""
    text, best = f"{out} holds another run, with another {', '.join(changed)}", out / "best"
    if list(changed) == ["epochs"] and recipe.schedule not in EXTENSIBLE and best.exists():
        return (
            f"{text}: learning rates of the schedule {recipe.schedule} depend on the number of epochs. To train "
            f"further, take --model {best} and another --out"
        )
    return f"{text}: choose another --out, or delete it to start afresh"

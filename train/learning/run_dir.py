"""The files of a run directory: record, best models, log and curves."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.rules import DEFAULTS
from engine.errors import DataError, UsageError
from engine.files.atomic import write_atomically
from engine.options import GENERATION_SETTINGS, DecodeOptions
from engine.run.outputs import write_run
from export.bundle import generation_defaults
from export.reference.huggingface import Reference
from train.learning.trainer import LOSS
from train.recipe import Recipe


def write_log(out: Path, history: list[dict[str, Any]]) -> None:
    """Write the Trainer's log to log.jsonl; plot losses, metrics and learning rate over epochs into curves.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    def series(name: str) -> tuple[list[float], list[float]]:
        points = [(entry["epoch"], entry[name]) for entry in history if name in entry and "epoch" in entry]
        return [x for x, _ in points], [y for _, y in points]

    write_atomically(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
    metrics = sorted({name for entry in history for name in entry if name.startswith("eval_")} - {"eval_loss"})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    axes[0].plot(*series("loss"), label="training (mean since the last point)")
    axes[0].plot(*series("eval_loss"), "o-", label="validation")
    rewards = sorted({name for entry in history for name in entry if name.startswith("reward_")})
    if rewards:
        axes[0].set(title="loss: training self-critical, validation in nats per token", xlabel="epoch")
    else:
        axes[0].set(title="loss: cross entropy per token, nats", xlabel="epoch", ylim=(0, None))
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
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)


EVALUATION = "evaluation.json"
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "pillow")
EXTENSIBLE = ("step", "constant")
"""Schedules whose learning rates do not depend on the number of epochs, so that a run can be given more epochs."""
WITHOUT_EFFECT = ("device_batch", "workers")
"""Settings that change how the work is divided but no result. They may change when a run is resumed."""


@dataclass(frozen=True)
class BestModels:
    """The models of the best epochs in `directory`, ranked by the recipe's metric.

    The ranking is read from disk each time, so that a resumed run includes the epochs before. With `decoding` the
    models are saved with these generation settings, see save_checkpoint.
    """

    directory: Path
    recipe: Recipe
    decoding: DecodeOptions | None = None

    def add(
        self, epoch: int, metrics: dict[str, float], captions: Sequence[tuple[str, str]], reference: Reference
    ) -> None:
        """Save a model as epoch_NN, point `best` to the best one, and delete those that are no longer kept."""
        target, partial = self.directory / f"epoch_{epoch:02d}", self.directory / f".epoch_{epoch:02d}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_checkpoint(reference, partial, self.decoding)
        write_run(partial / "valid.csv", captions)
        (partial / EVALUATION).write_text(json.dumps({"epoch": epoch, "metrics": metrics}) + "\n")
        _remove(target)
        partial.replace(target)  # a directory named epoch_NN is always complete
        ranked = self.ranked()
        link = self.directory.parent / "best"
        new = link.with_name(f".{link.name}.tmp")
        new.unlink(missing_ok=True)
        new.symlink_to(ranked[0][1].relative_to(link.parent))
        new.replace(link)
        for _, directory, _ in ranked[self.recipe.keep :]:
            _remove(directory)

    def ranked(self) -> list[tuple[int, Path, dict[str, float]]]:
        """Return (epoch, directory, metrics), best first. The lower loss breaks ties, then the earlier epoch."""
        entries = []
        for path in sorted(self.directory.glob("epoch_*")):
            try:
                content = json.loads((path / EVALUATION).read_text())
                entries.append((content["epoch"], path, content["metrics"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # half written when the power failed
        metric = self.recipe.metric
        sign = 1 if metric == LOSS else -1
        return sorted(entries, key=lambda entry: (sign * entry[2][metric], entry[2][LOSS], entry[0]))

    def tie(self) -> str:
        """Return a note if the metric is equal in all kept epochs, so that the loss chose the best; empty otherwise."""
        ranked, metric = self.ranked(), self.recipe.metric
        values = {metrics[metric] for _, _, metrics in ranked}
        if metric == LOSS or len(ranked) < 2 or len(values) > 1:
            return ""
        return f"{metric} is {values.pop():.4f} in all kept epochs: the best is epoch {ranked[0][0]}, by its loss"


def save_checkpoint(reference: Reference, directory: Path, decoding: DecodeOptions | None = None) -> None:
    """Write a plain Hugging Face directory: weights, configuration, tokenizer and image processor.

    With `decoding`, its generation settings are exactly these, in the text_config, which BLIP's generate reads, and in
    generation_config.json for readers. Without, they are those of the loaded checkpoint.
    """
    text = reference.model.config.text_config
    if decoding is None:
        # When the Trainer saves the decoder alone (cached features), transformers moves generation settings from the
        # configuration into the decoder's generation_config, which BLIP does not write to disk: put them back.
        for name, value in generation_defaults(reference).items():
            setattr(text, name, value)
        reference.model.save_pretrained(directory, safe_serialization=True)
    else:
        settings = generation_settings(decoding, reference.sizes.max_positions)
        with _set(text, settings), _set(reference.model.generation_config, settings):
            reference.model.save_pretrained(directory, safe_serialization=True)
    reference.tokenizer.save_pretrained(directory)
    reference.image_processor.save_pretrained(directory)


def generation_settings(decoding: DecodeOptions, positions: int) -> dict[str, Any]:
    """Return every generation setting that a bundle stores, by Hugging Face's name.

    Settings that `decoding` does not give have Hugging Face's defaults. max_new_tokens is limited by the model's
    `positions`, as in the validation.
    """
    settings = {name: DEFAULTS[name] for name in GENERATION_SETTINGS} | decoding.values()
    settings = {name: settings[name] for name in GENERATION_SETTINGS}
    if settings["max_new_tokens"] is not None:
        settings["max_new_tokens"] = min(settings["max_new_tokens"], positions - 1)
    settings["min_new_tokens"] = settings["min_new_tokens"] or None
    if settings["num_beams"] == 1:
        settings["length_penalty"] = DEFAULTS["length_penalty"]  # Hugging Face does not save one without effect
    return settings


@contextmanager
def _set(config: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Change settings of a configuration while the context is open."""
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
    """Delete a directory. It is renamed first, so that an interruption leaves no incomplete one under its name."""
    if directory.exists():
        doomed = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.replace(doomed)
        shutil.rmtree(doomed)


def write_or_compare_record(
    out: Path, recipe: Recipe, record: dict[str, Any], log: Callable[[str], None], *, is_begun: bool
) -> None:
    """Write run.json, or compare it with the existing one: a directory holds one run.

    `record` identifies the run in addition to the recipe, such as by the hashes of its data. If the earlier run saved
    neither training state nor model (`is_begun` False), its record is replaced. More epochs are accepted if the
    schedule does not depend on their number. Raises UsageError that names what differs, and DataError if the record of
    a run that has begun is damaged.
    """
    path, settings = out / "run.json", recipe.settings()
    shared = {name: settings[name] for name in WITHOUT_EFFECT}
    record = {"recipe": {name: settings[name] for name in settings if name not in shared}} | record
    if path.exists():
        # A run that is older than a setting has its default.
        existing, earlier = {}, Recipe().settings()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            earlier = earlier | content["recipe"]
            existing = content
        except (OSError, ValueError, KeyError, TypeError):
            if is_begun:
                raise DataError(f"{path} is damaged: restore it, or delete {out} to start again") from None
        changed = [name for name in record if name != "recipe" and existing.get(name) != record[name]]
        changed += [name for name, value in record["recipe"].items() if earlier.get(name) != value]
        # A setting that was removed since counts unless it was off.
        changed += [name for name, value in earlier.items() if value and name not in settings]
        if not changed:
            return
        only_epochs = changed == ["epochs"]
        if not is_begun:
            log(f"{out} holds a start that saved no training state: its record is replaced")
        elif only_epochs and recipe.epochs > earlier["epochs"] and recipe.schedule in EXTENSIBLE:
            log(f"{out} is a run with epochs={earlier['epochs']}: it resumes up to epoch {recipe.epochs}")
        else:
            remedy = "choose another --out, or delete it to start again"
            if only_epochs and recipe.schedule not in EXTENSIBLE and (out / "best").exists():
                remedy = (
                    f"the learning rates of the schedule {recipe.schedule} depend on the number of epochs. To train "
                    f"further, use --model {out / 'best'} and another --out"
                )
            raise UsageError(f"{out} holds another run, which differs in {', '.join(changed)}: {remedy}")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    write_atomically(path, json.dumps(record | shared | {"versions": versions}, indent=1) + "\n")

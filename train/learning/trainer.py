"""Hugging Face's Trainer with BLIP's loss, an order that a resumed run repeats, and checkpoints known to be whole.

Knows nothing of where images and recipes come from.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from engine.errors import EngineError, OutOfMemoryError
from train.data.batches import EpochOrder
from train.learning.ema import MovingAverage
from train.learning.evaluate import LOSS, sum_of_losses
from train.recipe import Recipe

WHOLE = "whole.json"
"""Written last into a checkpoint: one without it was cut off while it was being saved."""

KEPT_STATES = 2
"""States of training that are kept: the newest, and the one before it."""

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")
MORE_SHARED_MEMORY = "docker run --shm-size=1g, or --set workers=0 to read images in the training process"

Judge = Callable[[int], dict[str, float]]
"""Evaluates the model as it is after `epoch` epochs and keeps what is worth keeping; returns metrics by name."""


class LogPrinter(TrainerCallback):
    """Tells the user what the Trainer logs, one line each, on stderr where its own printer would use stdout."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """See TrainerCallback."""
        if logs and "loss" in logs:
            rewards = "".join(
                f", {name.replace('_', ' ')} {logs[name]:.4f}" for name in sorted(logs) if "reward" in name
            )
            at = f"step {state.global_step} of {state.max_steps}, epoch {logs['epoch']:.2f}"
            self._log(f"{at}: loss {logs['loss']:.4f}{rewards}, learning rate {logs['learning_rate']:.3g}")


class SaveAfterEvaluation(TrainerCallback):
    """Saves and logs at the end of every epoch; saves only after the evaluation, which a resumed run would not make up
    for.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        self._steps = steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """See TrainerCallback."""
        if state.global_step % self._steps == 0:
            control.should_save, control.should_log = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """See TrainerCallback."""
        control.should_save = args.save_strategy != SaveStrategy.NO


class AverageAfterStep(TrainerCallback):
    """Takes the weights of every step into their moving average, before they are evaluated or saved."""

    def __init__(self, moving_average: MovingAverage) -> None:
        self._average = moving_average

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """See TrainerCallback."""
        self._average.update()


class CaptionTrainer(Trainer):
    """Trains a BlipForConditionalGeneration, or its text decoder alone on features; see Recipe for the settings."""

    moving_average: MovingAverage | None = None

    def __init__(
        self, *, recipe: Recipe, order: EpochOrder, judge: Judge, log: Callable[[str], None], **given: Any
    ) -> None:
        super().__init__(**given)
        self.remove_callback(PrinterCallback)
        self.add_callback(LogPrinter(log))
        self.recipe, self.order, self._judge, self._log = recipe, order, judge, log
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the targets of a whole step for us
        self.steps_per_epoch = order.padded // recipe.batch_size
        self.add_callback(SaveAfterEvaluation(self.steps_per_epoch))
        if recipe.ema:
            self.moving_average = MovingAverage(self.model, recipe.ema)
            self.add_callback(AverageAfterStep(self.moving_average))

    def _inner_training_loop(self, batch_size: int | None = None, **given: Any) -> Any:  # noqa: ARG002
        """Take the batch size of this call: the Trainer would take that of the checkpoint it goes on from."""
        return super()._inner_training_loop(batch_size=self.args.train_batch_size, **given)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:  # noqa: ARG002
        return self.order

    def create_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over everything that is trained; unlike the Trainer's own it decays biases too, as the paper's does."""
        if self.optimizer is None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(
                trained, lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002
        """The recipe's schedule; it knows its own length, so a run cut short by max_steps has the same rates."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: self.recipe.learning_rate_factor(step, self.steps_per_epoch),
            )
        return self.lr_scheduler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the part of a step's mean loss over tokens that this batch brings.

        `num_items_in_batch` counts the targets of all batches and processes of the step. Processes average their
        gradients, hence the factor.
        """
        labels = inputs.pop("labels")
        if "pixels" in inputs:
            inputs["pixel_values"] = self.train_dataset.spec.normalise(inputs.pop("pixels"))
        outputs = model(**inputs)
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != -100).sum()
        total = sum_of_losses(outputs.logits, labels, label_smoothing=self.recipe.label_smoothing)
        loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Judge the model as it is, or its moving average where the recipe has one, and tell the callbacks."""
        averaged = self.moving_average.applied() if self.moving_average is not None else nullcontext()
        with self._explained(), averaged:
            metrics = self._judge(round(self.state.epoch or 0))
        logged = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(logged)
        if not math.isfinite(metrics[LOSS]):
            raise EngineError(f"the validation loss is {metrics[LOSS]}: start again with a lower learning_rate")
        if self.has_converged():
            self.control.should_training_stop = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        return logged

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002
        """The Trainer's guess knows no images."""
        return 0

    def has_converged(self) -> bool:
        """Return whether the validation loss stopped falling; those of before a resume count."""
        losses = [entry[f"eval_{LOSS}"] for entry in self.state.log_history if f"eval_{LOSS}" in entry]
        return bool(self.recipe.patience) and stopped_falling(losses, self.recipe.patience)

    def train(self, *args: Any, **given: Any) -> Any:
        """See Trainer.train. Raises EngineError for failures of torch that a user can do something about."""
        with self._explained():
            return super().train(*args, **given)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            known = explain(error, f"step {self.state.global_step + 1}")
            if known is None:
                raise
            raise known from error

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from the start, or from a checkpoint unless the run had come to its end there."""
        if checkpoint is not None:
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if self.has_converged():
                self._log(
                    f"the validation loss has stopped falling (patience {self.recipe.patience}): the run has ended"
                )
                return
            if self.moving_average is not None:
                self.moving_average.load(checkpoint)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.accelerator.num_processes > 1:
            torch.distributed.barrier()
        if self.args.should_save:
            directory = Path(self.args.output_dir)
            newest = directory / f"checkpoint-{self.state.global_step}"
            if self.moving_average is not None:
                self.moving_average.save(newest)
            seal(newest)
            for old in in_order(directory)[:-KEPT_STATES]:  # only now that the new one is whole
                shutil.rmtree(old)


def explain(error: Exception, where: str) -> EngineError | None:
    """Return the error in one line with its remedy, None for one that is not known here."""
    text = str(error).strip()
    if isinstance(error, EngineError) and "Traceback (most recent call last)" not in text:
        return None  # it is in one line already
    last = text.splitlines()[-1] if text else type(error).__name__
    if "unable to allocate shared memory" in text or "killed by signal: Bus error" in text:
        return EngineError(f"{where}: no room in shared memory (/dev/shm) for the next images: {MORE_SHARED_MEMORY}")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return OutOfMemoryError(
            f"{where}: out of memory: halve --device-batch (the batch stays the same, in more passes), or --set "
            "gradient_checkpointing=true"
        )
    if text.startswith("Caught ") or "Traceback (most recent call last)" in text:
        return EngineError(re.sub(r"^[\w.]+(Error|Exception): ", "", last))  # raised in a reading process
    if text.startswith("DataLoader worker"):
        return EngineError(
            f"{where}: a process that reads images ended ({text.splitlines()[0].rstrip('. ')}): is memory short? "
            "--set workers=0 reads images in the training process"
        )
    return None


def stopped_falling(losses: list[float], patience: int) -> bool:
    """Return whether the last `patience` losses are all no lower than the lowest before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def seal(checkpoint: Path) -> None:
    """Bring a checkpoint's files to disk and mark it as whole."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != WHOLE)
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    mark = checkpoint / f"{WHOLE}.tmp"
    mark.write_text(json.dumps({path.name: path.stat().st_size for path in files}))
    mark.replace(checkpoint / WHOLE)


def in_order(checkpoints: Path) -> list[Path]:
    """Return the states of training in a directory, the oldest first; other names there are the user's."""
    states = [path for path in checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(states, key=lambda path: int(path.name.rpartition("-")[2]))


def has_whole(checkpoints: Path) -> bool:
    """Return whether a run could resume from a state of training there; nothing is removed."""
    return any(map(_is_whole, in_order(checkpoints)))


def newest_whole(checkpoints: Path, log: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that was saved to its end, or None; those cut off are removed, and named."""
    for path in reversed(in_order(checkpoints)):
        if _is_whole(path):
            return path
        log(f"{path} was cut off while it was being saved: removed")
        shutil.rmtree(path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / WHOLE).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False

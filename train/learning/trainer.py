"""Hugging Face's Trainer with BLIP's loss, an order that a resumed run repeats, and complete checkpoints.

Also the evaluation after an epoch, and the communication between the processes of a distributed run; with one process
nothing is sent.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from engine.bundle.tokenizer import detokenise
from engine.errors import EngineError, OutOfMemoryError, OutputError
from engine.options import CLIP, DecodeOptions
from engine.scoring.base import Items, MetricInputs
from engine.scoring.profiles import make_metric
from export.reference.huggingface import Reference
from export.reference.torch_backend import caption_live, captioning
from train.data.batches import IGNORED, Collator, EpochOrder, PixelSpec, prompt_ids, texts_of
from train.data.examples import Example, references_by_id
from train.recipe import Recipe

T = TypeVar("T")
LOSS = "loss"

COMPLETE = "whole.json"
"""Written last into a checkpoint: a checkpoint without this file was interrupted while it was saved."""

KEPT_STATES = 2
"""Number of training states that are kept: the newest and the one before it."""

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")
MORE_SHARED_MEMORY = "docker run --shm-size=1g, or --set workers=0 to read images in the training process"

PATIENCE = timedelta(hours=6)
"""How long processes wait for the first one, which unpacks and decodes all images before training starts. The default
of torch is 10 minutes for NCCL and 30 for gloo.
"""

Judge = Callable[[int], dict[str, float]]
"""Evaluates the model after `epoch` epochs, keeps it if it is among the best, and returns {metric: value}."""


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, number of processes) from the environment variables that torchrun sets."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def on_first_process(work: Callable[[], T]) -> T:
    """Call `work` in the first process only and return its result in all processes.

    An error is raised in the first process only; torchrun then stops the others.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return work()
    _connect()
    shared: list[T | None] = [work() if rank == 0 else None]
    torch.distributed.broadcast_object_list(shared, device=_device())
    return shared[0]  # type: ignore[return-value]


def gather(values: list[T]) -> list[T]:
    """Return the `values` of all processes, concatenated in the order of ranks."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return values
    _connect()
    by_rank: list[list[T]] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(by_rank, values)
    return [value for part in by_rank for value in part]


def _connect() -> None:
    """Initialise torch.distributed unless it is initialised already."""
    # The Trainer does this too, but later: the first process unpacks and checks the data before there is a Trainer. Its
    # own default timeout would end the run of the waiting processes.
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(_device())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)


def _device() -> torch.device:
    """Return the device that messages are sent from and received on."""
    # Objects travel through the process group of the gradients, and NCCL takes only tensors on a GPU.
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the summed cross entropy f32[] of logits f32[B,L,V] with the labels i64[B,L].

    Labels are in the positions of the input ids: logits[:, i] predict labels[:, i + 1]. As
    BlipTextLMHeadModel.forward computes it (transformers 4.57), but summed, so that the mean over several batches can
    be taken over their tokens.
    """
    # In float32 even under autocast: a sum over thousands of tokens would lose its last digits in half precision.
    predicted, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return F.cross_entropy(predicted, targets, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum")


class LogPrinter(TrainerCallback):
    """Log the Trainer's values as one line each. The Trainer's own printer writes to stdout, which holds results."""

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
    """Log at the last step of every epoch, and save only after the epoch's evaluation.

    With `save_steps` the Trainer may save at that step, before it evaluates. A run killed between the two would resume
    with the next epoch and never evaluate this one.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        self._steps = steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """See TrainerCallback."""
        if state.global_step % self._steps == 0:  # the last step of an epoch: on_epoch_end saves instead
            control.should_save, control.should_log = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """See TrainerCallback."""
        # after this event the Trainer evaluates first and saves then
        control.should_save = args.save_strategy != SaveStrategy.NO


class CaptionTrainer(Trainer):
    """Train a BlipForConditionalGeneration, or only its text decoder on cached features.

    `recipe` holds the settings, `order` the order of the examples, `judge` evaluates an epoch, `log` takes a line for
    the user. Other keywords are those of Trainer.
    """

    def __init__(
        self, *, recipe: Recipe, order: EpochOrder, judge: Judge, log: Callable[[str], None], **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.remove_callback(PrinterCallback)
        self.add_callback(LogPrinter(log))
        self.recipe, self.order, self._judge, self._log_line = recipe, order, judge, log
        # The Trainer then counts the targets of a step over all micro-batches and processes before the first forward
        # pass, and does not divide our loss by the number of micro-batches once more.
        self.model_accepts_loss_kwargs = True
        self.steps_per_epoch = order.padded // recipe.batch_size
        self.add_callback(SaveAfterEvaluation(self.steps_per_epoch))

    def _inner_training_loop(self, batch_size: int | None = None, **settings: Any) -> Any:  # noqa: ARG002
        """Train with the batch size of this call."""
        # The Trainer would use the checkpoint's batch size, but `device_batch` may change between two starts of a run.
        return super()._inner_training_loop(batch_size=self.args.train_batch_size, **settings)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:  # noqa: ARG002
        # The Trainer's own sampler draws from torch's global generator. This order follows from seed and epoch alone:
        # a resumed run skips exactly the batches that it has seen, whatever else drew random numbers.
        return self.order

    def create_optimizer(self) -> torch.optim.Optimizer:
        """Create AdamW over all trained parameters."""
        # The Trainer's own optimiser excludes biases and LayerNorms from weight decay; the paper's AdamW does not.
        if self.optimizer is None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(
                trained, lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002
        """Create the recipe's learning rate schedule."""
        # `num_training_steps` is ignored: the length follows from the recipe, so that a run limited by max_steps
        # (--dry-run) has the rates of the full run.
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
        """Return this batch's contribution to the mean loss per token of its optimiser step, f32[].

        `num_items_in_batch` is the number of targets in all batches and processes of the step.
        """
        # Without labels the model computes no loss of its own, which would be the mean over this micro-batch alone.
        labels = inputs.pop("labels")
        if "pixels" in inputs:  # normalised here, after the copy to the GPU: until then a batch is bytes, not floats
            inputs["pixel_values"] = self.train_dataset.spec.normalise(inputs.pop("pixels"))
        outputs = model(**inputs)
        if num_items_in_batch is None:  # outside the training loop
            num_items_in_batch = (labels[:, 1:] != IGNORED).sum()
        total = sum_of_losses(outputs.logits, labels, label_smoothing=self.recipe.label_smoothing)
        # A mean per batch would weigh the words of short batches more. DDP averages gradients over processes, hence the
        # factor: together they amount to the sum over the step divided by its number of targets.
        loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate the model, log the metrics and stop the training if the loss stopped falling.

        Raises EngineError if the validation loss is not finite.
        """
        with self._explained():
            # The Trainer adds up fractions of steps: the third epoch may end at 2.9999.
            metrics = self._judge(round(self.state.epoch or 0))
        logged = {f"eval_{name}": value for name, value in metrics.items()}
        # Logged before the check, so that a diverged run shows its last value, and before the state is saved: a resumed
        # run finds the losses of all earlier epochs in the log history.
        self.log(logged)
        if not math.isfinite(metrics[LOSS]):
            raise EngineError(f"the validation loss is {metrics[LOSS]}: train again with a lower learning_rate")
        if self.has_converged():
            self.control.should_training_stop = True
        # Trainer.evaluate, which this replaces, ends with this event; TensorBoard and others listen for it.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        return logged

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002
        """Return 0: the Trainer's estimate does not include images."""
        return 0

    def has_converged(self) -> bool:
        """Return whether the validation loss stopped falling for `patience` epochs, including those before a resume."""
        losses = [entry[f"eval_{LOSS}"] for entry in self.state.log_history if f"eval_{LOSS}" in entry]
        return bool(self.recipe.patience) and stopped_falling(losses, self.recipe.patience)

    def train(self, *args: Any, **settings: Any) -> Any:
        """See Trainer.train. Raises EngineError for failures of torch that a user can fix."""
        with self._explained():
            return super().train(*args, **settings)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn known failures into EngineErrors that name the step and a remedy."""
        try:
            yield
        except Exception as error:
            known = explain(error, f"step {self.state.global_step + 1}")
            if known is None:
                raise
            raise known from error

    def start_or_resume(self, checkpoint: Path | None) -> None:
        """Train from the start if `checkpoint` is None, else resume from it unless the run had already ended."""
        if checkpoint is not None:
            # Else the Trainer would train another epoch before `evaluate` stops it again, and the weights would depend
            # on how often the command was repeated.
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if self.has_converged():
                self._log_line(
                    f"the validation loss has stopped falling (patience {self.recipe.patience}): the run has ended"
                )
                return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._explained():
            super()._save_checkpoint(model, trial)
        if self.accelerator.num_processes > 1:
            # Every process writes its random state. The first one must not list the files before all are there.
            torch.distributed.barrier()
        if self.args.should_save:
            directory = Path(self.args.output_dir)
            seal(directory / f"checkpoint-{self.state.global_step}")
            for old in sorted_checkpoints(directory)[:-KEPT_STATES]:  # only now that the new one is complete
                shutil.rmtree(old)


def _on_cpu(storage: Any, location: str) -> Any:
    return storage if re.fullmatch(r"cpu:\d+", location) else None


# Accelerate calls the device of one of several processes on a CPU "cpu:0", which torch.load does not know.
torch.serialization.register_package(5, lambda _: None, _on_cpu)


DISK_FULL = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos")
"""Parts of the messages of safetensors and torch.save on a full disk."""


def explain(error: Exception, where: str) -> EngineError | None:
    """Return a one-line error with its remedy, or None if `error` is not one of the known failures of torch.

    `where` is the step, such as "step 7".
    """
    text = str(error).strip()
    if isinstance(error, EngineError) and "Traceback (most recent call last)" not in text:
        return None  # already one line
    last = text.splitlines()[-1] if text else type(error).__name__
    if "unable to allocate shared memory" in text or "killed by signal: Bus error" in text:
        return EngineError(f"{where}: shared memory (/dev/shm) is full: {MORE_SHARED_MEMORY}")
    if any(words in text for words in DISK_FULL):
        return OutputError(f"{where}: no space is left in the run directory: make room, the same command resumes")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return OutOfMemoryError(
            f"{where}: out of memory: halve --device-batch (--batch-size stays the same, in more passes), or use "
            "--set gradient_checkpointing=true"
        )
    if text.startswith("Caught ") or "Traceback (most recent call last)" in text:
        # raised in a DataLoader worker: torch puts the worker's whole traceback into the message
        return EngineError(re.sub(r"^[\w.]+(Error|Exception): ", "", last))
    if text.startswith("DataLoader worker"):
        return EngineError(
            f"{where}: a process that reads images ended ({text.splitlines()[0].rstrip('. ')}), perhaps for lack of "
            "memory: --set workers=0 reads images in the training process"
        )
    return None


def stopped_falling(losses: list[float], patience: int) -> bool:
    """Return whether none of the last `patience` losses is lower than the lowest loss before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint's files to disk and mark it as complete: whole.json holds the size of every file."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != COMPLETE)
    for path in files:  # the mark must never reach the disk before the files that it vouches for
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    mark = checkpoint / f"{COMPLETE}.tmp"
    mark.write_text(json.dumps({path.name: path.stat().st_size for path in files}))
    mark.replace(checkpoint / COMPLETE)  # atomic


def sorted_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the training states in a directory, oldest first."""
    # glob alone would also match names that a user made, such as checkpoint-8-copy, which must never be removed
    states = [path for path in checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(states, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_complete_checkpoint(checkpoints: Path, log: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint, or None. Newer, incomplete ones are removed and logged."""
    for path in reversed(sorted_checkpoints(checkpoints)):
        if is_complete(path):
            return path
        log(f"{path} was interrupted while it was saved: removed")
        shutil.rmtree(path)
    return None


def is_complete(checkpoint: Path) -> bool:
    """Return whether all files of a training state have the sizes that `seal` recorded."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


Evaluation = tuple[dict[str, float], list[tuple[str, str]]]
"""{loss and metrics by name}, [(id, caption), ...]"""


@dataclass(frozen=True)
class Evaluator:
    """Evaluate a model on `examples`.

    `metrics` are names of `engine score`, `setting` holds what they need. Captions are decoded with `options`;
    `high_bit_depth` is how images of more than 8 bits are read.
    """

    reference: Reference
    examples: Sequence[Example]
    metrics: tuple[str, ...]
    options: DecodeOptions
    max_tokens: int
    batch_size: int
    setting: MetricInputs = field(default_factory=MetricInputs)
    high_bit_depth: str = CLIP

    def evaluate(self) -> Evaluation:
        """Return loss and metrics, and the captions, over the shares of all processes.

        The loss is the mean per token in nats, without label smoothing. If an image has several captions, each counts
        for the loss, and all of them are its references.
        """
        loss, captions = self.observe()
        return {LOSS: loss} | self.scores(captions), captions

    def observe(self) -> tuple[float, list[tuple[str, str]]]:
        """Return the loss and the (id, caption) pairs of `evaluate` without scoring the captions."""
        model, (rank, world_size) = self.reference.model, rank_and_world_size()
        with captioning(model):
            sums = np.sum([*self._losses(model, self.examples[rank::world_size]), (0.0, 0)], axis=0)
        loss, tokens = np.sum(gather([tuple(sums.tolist())]), axis=0)
        by_id = {example.id: example for example in self.examples}
        captions = dict(gather(list(self._captions(model, list(by_id.values())[rank::world_size]))))
        return float(loss / max(1, tokens)), [(image_id, captions[image_id]) for image_id in by_id]

    def scores(self, captions: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Return {metric: value} of (id, caption) pairs."""
        references = references_by_id(self.examples)
        ids, texts = [image_id for image_id, _ in captions], [text for _, text in captions]
        items = Items(ids, texts, [references[image_id] for image_id in ids])
        return {name: make_metric(name, self.setting, {}).measure(items).value for name in self.metrics}

    def _losses(self, model: PreTrainedModel, mine: Sequence[Example]) -> Iterator[tuple[float, int]]:
        """Yield (summed loss, number of targets) of each batch."""
        spec = PixelSpec.of(self.reference.image_processor, self.high_bit_depth)
        collator = Collator(self.reference.tokenizer, self.reference.sizes.tokens.bos, self.max_tokens)
        with torch.inference_mode():
            for start in range(0, len(mine), self.batch_size):
                chunk = mine[start : start + self.batch_size]
                items = [{"pixels": torch.tensor(spec.read(e.image))} | texts_of(e) for e in chunk]
                batch = {name: tensor.to(model.device) for name, tensor in collator(items).items()}
                labels, pixels = batch.pop("labels"), spec.normalise(batch.pop("pixels"))
                logits = model(pixel_values=pixels, **batch).logits
                yield sum_of_losses(logits, labels).item(), int((labels != IGNORED).sum())

    def _captions(self, model: PreTrainedModel, examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
        """Yield (id, caption) of images; a caption does not include the image's prompt."""
        spec, tokenizer = PixelSpec.of(self.reference.image_processor, self.high_bit_depth), self.reference.tokenizer
        pixels: Iterator[tuple[str, NDArray[np.uint8]]] = (
            (example.id, spec.read(example.image)) for example in examples
        )
        prompts = {example.id: prompt_ids(tokenizer, example.prompt) for example in examples}
        for image_id, hypotheses in caption_live(model, self.reference.image_processor, pixels, self.options, prompts):
            yield image_id, text_after_prompt(tokenizer, hypotheses[0].ids, prompts[image_id])


def text_after_prompt(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt: Sequence[int]) -> str:
    """Return the text of a caption without its prompt, which references do not contain and metrics must not count.

    `ids` start with [DEC] and the ids of `prompt`.
    """
    return detokenise(tokenizer.decode(ids[1 + len(prompt) :], skip_special_tokens=True))

"""Build the model in training shape, the Trainer and its arguments from a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments

from engine.checkpoints.files import rules_at
from engine.errors import CheckpointError, UsageError, counted
from engine.scoring.base import MetricInputs
from export.families.modules import IS_5
from export.reference.huggingface import Reference
from train.data.batches import Collator, EpochOrder, Features, Pictures, PixelSpec
from train.data.examples import Example, Split, references_by_id
from train.learning.reward import Reward, RewardedPictures, RewardTrainer
from train.learning.trainer import MORE_SHARED_MEMORY, CaptionTrainer, Judge
from train.recipe import Recipe

Log = Callable[[str], None]
SHARED_MEMORY, MIB = Path("/dev/shm"), 1 << 20
PREFETCHED = 2
"""Batches that a worker of torch's DataLoader prepares in advance (its default prefetch_factor)."""
TRAINED = "blip"
"""`model_type` of the models that can be trained: losses and frozen parts use their names."""
WORDS = ("word_embeddings", "position_embeddings", "embeddings.LayerNorm")


def load_reference(checkpoint: Path, recipe: Recipe) -> Reference:
    """Load a checkpoint, resize its position table to the recipe's image size and freeze the recipe's parts."""
    rules = rules_at(checkpoint)
    if rules.model_type != TRAINED:
        raise CheckpointError(
            f"{checkpoint} is a {rules.name} checkpoint, but `train` fine-tunes BLIP only: fine-tune it with Hugging "
            "Face's Trainer, then export it"
        )
    reference = Reference.load(checkpoint, recipe.image_size)
    model = reference.model
    if recipe.image_size is None:
        reference.family.resize(model, reference.sizes.image_size)  # raises an error if they do not agree
    for name, parameter in model.named_parameters():
        is_vision = name.startswith("vision_model.")
        is_frozen = (
            ("vision" in recipe.freeze and is_vision)
            or ("words" in recipe.freeze and not is_vision and any(part in name for part in WORDS))
            or ("all-but-cross" in recipe.freeze and "crossattention" not in name)
        )
        parameter.requires_grad_(not is_frozen)
    return reference


@dataclass(frozen=True)
class Run:
    """A run with everything resolved: the loaded model and the checked splits `train` and `valid`.

    `metrics` holds what the metrics of the evaluation and the reward need, `signatures` is {metric: how it measures}.
    `batches` is (captions per process and forward pass, forward passes per step), as Recipe.micro_batches returns it.
    `out` is the run directory.
    """

    recipe: Recipe
    reference: Reference
    splits: dict[str, Split]
    metrics: MetricInputs
    signatures: dict[str, str]
    batches: tuple[int, int]
    out: Path
    log: Log

    @property
    def order(self) -> EpochOrder:
        """The order of the training examples."""
        return EpochOrder(len(self.splits["train"].examples), self.recipe.batch_size, self.recipe.seed)

    @property
    def spec(self) -> PixelSpec:
        """How images are preprocessed."""
        return PixelSpec.of(self.reference.image_processor, self.recipe.high_bit_depth)


def make_trainer(run: Run, judge: Judge, *, max_steps: int | None = None) -> CaptionTrainer:
    """Build the Trainer of a run. With `max_steps` it is for a trial and saves nothing."""
    recipe, reference, spec, order = run.recipe, run.reference, run.spec, run.order
    model = reference.model
    examples = run.splits["train"].examples
    args = training_arguments(run, max_steps)
    model.to(args.device)  # also the vision tower if only the decoder is trained: it encodes images
    trained: PreTrainedModel = model
    dataset: Pictures | Features | RewardedPictures
    kind: Callable[..., CaptionTrainer] = CaptionTrainer
    if recipe.cache_features:
        trained = model.text_decoder  # the frozen vision tower has no work left once the features are cached
        dataset = Features(encode_images(reference, examples, spec, run.log), examples)
    elif recipe.reward:
        dataset = RewardedPictures(examples, spec, augmentation=recipe.augmentation, seed=recipe.seed)
        # CIDEr takes its document frequencies from all training captions.
        reward = Reward(recipe.rewards(), run.metrics, list(references_by_id(examples).values()))
        kind = partial(RewardTrainer, reference=reference, reward=reward, greedy=recipe.eval_options())
    else:
        dataset = Pictures(examples, spec, augmentation=recipe.augmentation, seed=recipe.seed)
    collator = Collator(reference.tokenizer, reference.sizes.tokens.bos, recipe.max_tokens)
    if recipe.workers:
        sample = collator([dataset[(0, 0)]])
        require_shared_memory(sum(tensor.nbytes for tensor in sample.values()) * run.batches[0], recipe.workers)
    return kind(
        recipe=recipe,
        order=order,
        judge=judge,
        log=run.log,
        model=trained,
        args=args,
        train_dataset=dataset,
        eval_dataset=Pictures(run.splits["valid"].examples, spec),
        data_collator=collator,
    )


def require_shared_memory(batch_bytes: int, workers: int) -> None:
    """Raise UsageError if the DataLoader workers would fill the shared memory; Docker gives a container 64 MiB.

    Each process of the run has `workers` of them, and each worker prepares PREFETCHED batches of `batch_bytes`.
    """
    if not SHARED_MEMORY.is_dir():  # not Linux
        return
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    processes = workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = batch_bytes * PREFETCHED * processes
    if free < needed:
        raise UsageError(
            f"{SHARED_MEMORY} has {free // MIB} MiB free, but {processes} processes that read images need "
            f"{-(-needed // MIB)} MiB: {MORE_SHARED_MEMORY}"
        )


def training_arguments(run: Run, max_steps: int | None) -> TrainingArguments:
    """Translate a recipe into TrainingArguments. Raises UsageError if this machine does not support the precision."""
    recipe, out = run.recipe, run.out
    device_batch, accumulated = run.batches
    steps_per_epoch = run.order.padded // recipe.batch_size
    every = {"save_strategy": "steps", "save_steps": recipe.save_steps} if recipe.save_steps else {}
    is_trial = max_steps is not None
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    if recipe.precision == "bf16" and not has_bf16:
        raise UsageError("precision bf16 needs an NVIDIA GPU of Ampere or later: use fp16")
    logs = {} if IS_5 else {"logging_dir": str(out / "tensorboard")}
    if IS_5:  # transformers 5 has no such argument and reads this variable instead
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard")
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=device_batch,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=recipe.epochs,
        max_steps=max_steps or -1,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        eval_strategy="no" if is_trial else "epoch",
        **({"save_strategy": "no"} if is_trial else every or {"save_strategy": "epoch"}),
        disable_tqdm=True,
        logging_strategy="steps",
        logging_steps=max(1, steps_per_epoch // 20),
        logging_nan_inf_filter=False,
        report_to=[] if is_trial else ["tensorboard"],
        **logs,
        seed=recipe.seed,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # buffers never change, and a process may call its model more often than others
        use_cpu=not torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:  # else the Trainer would use DataParallel and multiply the batch size
        count = arguments.n_gpu
        run.log(f"one of {count} GPUs is used: start with torchrun --nproc_per_node {count} to use all")
        arguments._n_gpu = 1
    return arguments


def encode_images(
    reference: Reference, examples: Sequence[Example], spec: PixelSpec, log: Log, *, batch_size: int = 16
) -> torch.Tensor:
    """Run the frozen vision tower on the images; return features f16[N,S,D]."""
    features = None
    start = time.perf_counter()
    with torch.inference_mode():
        for i in range(0, len(examples), batch_size):
            pixels = torch.stack([torch.tensor(spec.read(example.image)) for example in examples[i : i + batch_size]])
            normal = spec.normalise(pixels.to(reference.model.device))
            encoded = reference.model.vision_model(pixel_values=normal)[0]
            if features is None:  # one allocation: at full size two copies would not fit
                features = torch.empty(len(examples), *encoded.shape[1:], dtype=torch.float16)
            features[i : i + len(encoded)] = encoded.cpu()
    assert features is not None
    log(f"encoded {counted(len(examples), 'image')} in {time.perf_counter() - start:.0f} s")
    return features.clone() if features.is_inference() else features

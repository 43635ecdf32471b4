"""Fine-tune a checkpoint on captioned images: from a recipe and a data directory to a run directory. Start here.

OUT/run.json          recipe, data (hashes, counts, problems), checkpoint hash, versions
OUT/checkpoints/      the last two states of training, for going on after a kill
OUT/models/epoch_NN/  the best epochs as plain Hugging Face directories, with their scores and captions
OUT/best              a link to the best of them: `python -m export --checkpoint OUT/best`
OUT/log.jsonl, curves.png, tensorboard/
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed

from engine.errors import DataError, UsageError
from engine.options import DecodeOptions
from engine.scoring.base import MetricInputs
from engine.scoring.profiles import make_metric
from export.checkpoints.load import resize_position_table
from export.manifest import checkpoint_sha256
from export.reference.huggingface import Reference
from train.data.batches import Collator, EpochOrder, Features, Pictures, PixelSpec
from train.data.check import check_split, drop_unusable, fingerprint
from train.data.dataset import Example, Split, hold_out, read_dataset
from train.learning.evaluate import LOSS, Evaluator
from train.learning.processes import on_first_process, rank_and_world_size
from train.learning.reward import RewardedPictures, RewardTrainer, make_reward
from train.learning.run_dir import BestModels, locked, write_log, write_or_compare_record
from train.learning.trainer import CaptionTrainer, newest_whole
from train.recipe import Recipe

Say = Callable[[str], None]
WORDS = ("word_embeddings", "position_embeddings", "embeddings.LayerNorm")
SPLITS = ("train", "valid")
NGRAM = 3
"""The paper's n-gram ban."""


@dataclass(frozen=True)
class Job:
    """A run as it was asked for. `weights` are folders for neural metrics; `max_steps` is for trials."""

    checkpoint: Path
    data: Path
    out: Path
    recipe: Recipe
    allow_missing: bool = False
    decode_images: bool = True
    unpack_into: Path | None = None
    max_steps: int | None = None
    weights: dict[str, Path] | None = None


def finetune(job: Job, say: Say) -> dict[str, Any]:
    """Fine-tune, going on where the same job was cut off; return a summary.

    Raises UsageError, DataError (bad images without allow_missing), CheckpointError, or ImageError when a file
    vanishes during training.
    """
    rank, world_size = rank_and_world_size()
    say = say if rank == 0 else (lambda _: None)
    recipe = job.recipe
    device_batch, accumulated = recipe.micro_batches(world_size)
    set_seed(recipe.seed)
    measured_by = signatures(job)
    reference = load_reference(job.checkpoint, recipe)
    splits = on_first_process(lambda: prepare_data(job, reference, say))
    with locked(job.out, rank):
        resume_from = on_first_process(lambda: _begin(job, splits, measured_by, say))
        kept = BestModels(job.out / "models", recipe)
        evaluator = make_evaluator(job, reference, splits["valid"].examples)

        def judge(epoch: int) -> dict[str, float]:
            metrics, captions = evaluator.evaluate()
            if rank == 0:
                kept.add(epoch, metrics, captions, reference)
                say(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            return metrics

        start = time.perf_counter()
        trainer = make_trainer(job, reference, splits, judge, (device_batch, accumulated), say)
        trainer.go_on(resume_from)
        if rank:
            return {}
        write_log(job.out, trainer.state.log_history)
        return _summary(job, kept, trainer, time.perf_counter() - start)


def load_reference(checkpoint: Path, recipe: Recipe) -> Reference:
    """Load a checkpoint in training shape: position table resized, parts frozen as the recipe says."""
    reference = Reference.load(checkpoint, recipe.image_size)
    model = reference.model
    if recipe.image_size is None:
        resize_position_table(model, model.config.vision_config.image_size)  # checks that they agree
    for name, parameter in model.named_parameters():
        is_vision = name.startswith("vision_model.")
        is_frozen = (
            ("vision" in recipe.freeze and is_vision)
            or ("words" in recipe.freeze and not is_vision and any(part in name for part in WORDS))
            or ("all-but-cross" in recipe.freeze and "crossattention" not in name)
        )
        parameter.requires_grad_(not is_frozen)
    return reference


def prepare_data(job: Job, reference: Reference, say: Say) -> dict[str, Split]:
    """Read and check the splits `train` and `valid`; bad images stop the run, or are left out if that is allowed."""
    recipe = job.recipe
    splits = read_dataset(job.data, unpack_into=job.unpack_into)
    if "train" not in splits:
        raise DataError(f"{job.data} has no training split, only {', '.join(splits)}")
    if "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], recipe.valid_share, recipe.seed)
        say(f"no validation split: {len(splits['valid'].examples)} captions held out of training")
    bad = []
    for name in SPLITS:
        problems = check_split(
            splits[name],
            decode=job.decode_images,
            count_tokens=lambda text: len(reference.tokenizer(text)["input_ids"]),
            max_tokens=recipe.max_tokens,
        )
        for line in problems.lines():
            say(f"{name}: {line}")
        bad += [f"{name}: {line}" for line in problems.fatal.lines()]
        splits[name] = drop_unusable(splits[name], problems)
    if bad and not job.allow_missing:
        raise DataError(f"{job.data}: {'; '.join(bad)}: mend the files, or leave these out with --allow-missing")
    return splits


def signatures(job: Job) -> dict[str, str]:
    """Return how each metric of the evaluation and the reward is measured; raise EngineError where one cannot be."""
    names = [*evaluation_metrics(job.recipe), *job.recipe.rewards()]
    return {name: make_metric(name, MetricInputs(weights=job.weights or {}), {}).signature() for name in names}


def _begin(job: Job, splits: dict[str, Split], measured_by: dict[str, str], say: Say) -> Path | None:
    """Claim the run directory; return the state of training to go on from, or None."""
    write_or_compare_record(job.out, job.recipe, run_identity(job, splits) | {"metrics": measured_by})
    (job.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    newest = newest_whole(job.out / "checkpoints", say)
    if newest is not None:
        say(f"going on from {newest}")
    return newest


def run_identity(job: Job, splits: dict[str, Split]) -> dict[str, Any]:
    """Return what decides a run besides its recipe."""
    data = {name: {"captions": len(splits[name].examples), "sha256": fingerprint(splits[name])} for name in SPLITS}
    return {"checkpoint": checkpoint_sha256(job.checkpoint), "data": data}


def make_evaluator(job: Job, reference: Reference, examples: Sequence[Example]) -> Evaluator:
    """Judge epochs on up to `eval_images` validation images, evenly spaced."""
    recipe = job.recipe
    ids = list(dict.fromkeys(example.id for example in examples))
    if recipe.eval_images is not None and len(ids) > recipe.eval_images:
        step = len(ids) / recipe.eval_images
        chosen = {ids[int(i * step)] for i in range(recipe.eval_images)}
        examples = [example for example in examples if example.id in chosen]
    setting, options = MetricInputs(weights=job.weights or {}), evaluation_options(recipe)
    metrics = evaluation_metrics(recipe)
    return Evaluator(reference, examples, metrics, options, recipe.max_tokens, recipe.device_batch, setting)


def evaluation_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Return the metrics an epoch is judged by, besides the loss."""
    return tuple(dict.fromkeys(["rouge1", *([recipe.metric] if recipe.metric != LOSS else [])]))


def evaluation_options(recipe: Recipe) -> DecodeOptions:
    """Return how validation images are captioned, and the baseline of a reward."""
    return DecodeOptions(
        num_beams=recipe.eval_beams,
        max_new_tokens=recipe.eval_max_new_tokens,
        no_repeat_ngram_size=NGRAM,
    )


def make_trainer(
    job: Job,
    reference: Reference,
    splits: dict[str, Split],
    judge: Callable[[int], dict[str, float]],
    batches: tuple[int, int],
    say: Say,
) -> CaptionTrainer:
    """Put model, data and the recipe into a Trainer."""
    recipe, model = job.recipe, reference.model
    examples = splits["train"].examples
    spec = PixelSpec.of(reference.image_processor)
    order = EpochOrder(len(examples), recipe.batch_size, recipe.seed)
    args = training_arguments(job, batches, order.padded // recipe.batch_size, say)
    model.to(args.device)  # all of it, also where only the decoder is trained
    trained: PreTrainedModel = model
    dataset: Pictures | Features | RewardedPictures
    kind: Callable[..., CaptionTrainer] = CaptionTrainer
    if recipe.cache_features:
        trained = model.text_decoder  # the only part that learns, and all that its inputs need
        dataset = Features(encode_images(reference, examples, say), [example.caption for example in examples])
    elif recipe.reward:
        dataset = RewardedPictures(examples, spec, augmentation=recipe.augmentation, seed=recipe.seed)
        reward = make_reward(recipe.rewards(), MetricInputs(weights=job.weights or {}), examples)
        kind = partial(RewardTrainer, reference=reference, reward=reward, greedy=evaluation_options(recipe))
    else:
        dataset = Pictures(examples, spec, augmentation=recipe.augmentation, seed=recipe.seed)
    return kind(
        recipe=recipe,
        order=order,
        judge=judge,
        say=say,
        model=trained,
        args=args,
        train_dataset=dataset,
        eval_dataset=Pictures(splits["valid"].examples, spec),
        data_collator=Collator(reference.tokenizer, model.config.text_config.bos_token_id, recipe.max_tokens),
    )


def training_arguments(job: Job, batches: tuple[int, int], steps_per_epoch: int, say: Say) -> TrainingArguments:
    """Translate a recipe for Hugging Face's Trainer. Raises UsageError for a precision this machine has not."""
    recipe, (device_batch, accumulated) = job.recipe, batches
    every = {"save_strategy": "steps", "save_steps": recipe.save_steps} if recipe.save_steps else {}
    is_trial = job.max_steps is not None
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("precision fp16 needs a GPU: take bf16 or fp32 on a CPU")
    if recipe.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UsageError("precision bf16 needs an NVIDIA GPU of Ampere or later: take fp16")
    arguments = TrainingArguments(
        output_dir=str(job.out / "checkpoints"),
        per_device_train_batch_size=device_batch,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=recipe.epochs,
        max_steps=job.max_steps or -1,
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
        logging_dir=str(job.out / "tensorboard"),
        seed=recipe.seed,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they never change, and a process may call its model more often than another
        use_cpu=not torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:  # else one process would share every batch among them and take a larger one
        say(f"one of {arguments.n_gpu} GPUs is used: start with torchrun --nproc_per_node {arguments.n_gpu} for all")
        arguments._n_gpu = 1
    return arguments


def encode_images(reference: Reference, examples: Sequence[Example], say: Say, *, batch_size: int = 16) -> torch.Tensor:
    """Run the frozen vision tower over images; return features f16[N,S,D]."""
    spec, features = PixelSpec.of(reference.image_processor), None
    start = time.perf_counter()
    with torch.inference_mode():
        for i in range(0, len(examples), batch_size):
            pixels = torch.stack([spec.normalise(spec.read(one.image)) for one in examples[i : i + batch_size]])
            encoded = reference.model.vision_model(pixel_values=pixels.to(reference.model.device))[0]
            if features is None:  # one allocation: at full size two copies would not fit
                features = torch.empty(len(examples), *encoded.shape[1:], dtype=torch.float16)
            features[i : i + len(encoded)] = encoded.cpu()
    assert features is not None
    say(f"encoded {len(examples)} images in {time.perf_counter() - start:.0f} s")
    return features.clone() if features.is_inference() else features


def _summary(job: Job, kept: BestModels, trainer: CaptionTrainer, seconds: float) -> dict[str, Any]:
    ranked = kept.ranked()
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 3),
        "seconds": round(seconds, 1),
        "train_loss": next((e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e), None),
        "best": None if not ranked else {"epoch": ranked[0][0]} | ranked[0][2],
        "kept": [str(directory) for _, directory, _ in ranked],
        "checkpoint": str(job.out / "best") if ranked else None,
    }

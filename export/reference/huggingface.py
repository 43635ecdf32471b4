"""The reference that the engine must match: Hugging Face's generate, scores and pixels, also for an ensemble."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from engine.bundle.open import shares
from engine.bundle.tokenizer import spellings
from engine.checkpoints.rules import Sizes, task_ids
from engine.checkpoints.settings import read_processor
from engine.decoding.backend import BatchSizes, StepInputs
from engine.decoding.processors import process
from engine.errors import CheckpointError
from engine.options import DecodeOptions
from export.checkpoints.load import load_checkpoint
from export.checkpoints.settings import read_tokenizer
from export.families import family_of
from export.families.modules import Family, ImageProcessor, Normalisation


@dataclass
class PrefixCache:
    """A cache of tokens, not keys and values: the image of each slot, and the token at each position, i64[B,W]."""

    images: list[NDArray[np.uint8] | None]
    tokens: NDArray[np.int64]

    @classmethod
    def allocate(cls, num_slots: int) -> PrefixCache:
        """See Backend.allocate."""
        return cls([None] * num_slots, np.zeros((num_slots, 0), np.int64))

    def feed(self, inputs: StepInputs) -> list[list[tuple[int, ...]]]:
        """Append the step's tokens; return the tokens of each row's past and its own, as B lists of T prefixes."""
        self.tokens = np.concatenate([self.tokens, inputs.input_ids], 1)
        return [
            [tuple(tokens[past].tolist()) for past in rows]
            for tokens, rows in zip(self.tokens, inputs.ancestry, strict=True)
        ]

    def regroup(self, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        self.images = [self.images[slot] for slot in slots]
        self.tokens = np.take_along_axis(self.tokens[slots], columns, 1)


class PrefixBackend(ABC):
    """A Backend without keys and values: subclasses implement `log_probs` of whole prefixes."""

    name = "prefix"
    batch_sizes = BatchSizes(rows=32, encode_batch=4)

    def logits(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.floating]:
        """Return raw logits f32[len(prefixes),V]. The default returns log-probabilities."""
        return self.log_probs(image, prefixes)

    @abstractmethod
    def log_probs(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.floating]:
        """Return f32[len(prefixes),V], the log-probabilities of the next id after each prefix."""

    @property
    def in_float64(self) -> PrefixBackend:
        """The same model in float64, to measure how far float32 rounds. By default this backend itself."""
        return self

    def encode(self, pixel_values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See Backend.encode."""
        return pixel_values

    def allocate(self, num_slots: int) -> PrefixCache:
        """See Backend.allocate."""
        return PrefixCache.allocate(num_slots)

    def admit(self, cache: PrefixCache, slot: int, encoded: NDArray[np.uint8], image: int) -> None:
        """See Backend.admit."""
        cache.images[slot] = encoded[image]

    def step(self, cache: PrefixCache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step. This is the simplest implementation: no selection per row, one stable sort per slot."""
        prefixes = cache.feed(inputs)
        all_scores = np.full((len(prefixes), inputs.num_candidates), -np.inf, np.float32)
        all_ids = np.zeros(all_scores.shape, np.int64)
        for slot in np.flatnonzero(np.isfinite(inputs.scores).any(1)):
            image = cache.images[slot]
            assert image is not None
            log_probs = self.log_probs(image, prefixes[slot])
            on_logits = inputs.penalties[0] != 1
            logits = self.logits(image, prefixes[slot]) if on_logits else log_probs
            log_probs = process(log_probs, logits, inputs.marked_ids[slot], inputs.penalties)
            totals = (log_probs + inputs.scores[slot][:, None]).ravel()
            best = np.argsort(-totals, kind="stable")[: inputs.num_candidates]
            all_scores[slot, : len(best)], all_ids[slot, : len(best)] = totals[best], best
        return all_scores, all_ids

    def regroup(self, cache: PrefixCache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        cache.regroup(slots, columns)


@dataclass(frozen=True)
class ReferenceCaption:
    """A sequence that `generate` returned: ids up to the first end token, and its score (None if greedy)."""

    ids: tuple[int, ...]
    score: float | None


@dataclass(frozen=True)
class Reference:
    """A checkpoint in Hugging Face: model (eval mode, float32), slow image processor and fast tokenizer.

    `task` is that of a model with tasks, by name.
    """

    model: PreTrainedModel
    image_processor: ImageProcessor
    tokenizer: PreTrainedTokenizerFast
    task: str | None = None

    @classmethod
    def load(cls, checkpoint: Path, image_size: int | None = None) -> Reference:
        """Load a checkpoint directory, for the first task of a model with tasks.

        Raises CheckpointError as load_checkpoint does, or if there is no tokenizer.
        """
        model = load_checkpoint(checkpoint, image_size)
        family = family_of(model)
        sizes = family.sizes(model.config)
        processor = family.make_processor(read_processor(checkpoint).for_size(sizes.image_size))
        task = next(iter(family.rules.tasks), None)
        return cls(model, processor, read_tokenizer(checkpoint, sizes.vocab_size), task)

    @property
    def tasks(self) -> dict[str, tuple[int, ...]]:
        """The tasks of the model by name, with their token ids; empty for most models."""
        backend = self.tokenizer.backend_tokenizer
        return task_ids(self.family.rules, lambda text: backend.encode(text, add_special_tokens=False).ids)

    @property
    def task_ids(self) -> tuple[int, ...]:
        """The ids of `task`; none without tasks."""
        return () if self.task is None else self.tasks[self.task]

    @functools.cached_property
    def in_float64(self) -> Reference:
        """The same model in float64, a second copy of the weights. (GPT-2's reorder_and_upcast_attn stays float32.)"""
        return replace(self, model=copy.deepcopy(self.model).double())

    @property
    def family(self) -> Family:
        """The family of the model."""
        return family_of(self.model)

    @property
    def sizes(self) -> Sizes:
        """Sizes and special tokens of the model."""
        return self.family.sizes(self.model.config)

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """Return the pixel values of RGB images by the image processor: f32[B,3,height,width]."""
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def normalised(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """Return the pixel values f32[B,3,height,width] of images u8[B,height,width,3] that need no resizing."""
        steps = [name for name in ("do_resize", "do_center_crop") if getattr(self.image_processor, name, False)]
        skipped = dict.fromkeys(steps, False)
        return self.image_processor(list(pixels), return_tensors="pt", **skipped)["pixel_values"]

    def bad_words_ids(self, options: DecodeOptions) -> list[list[int]] | None:
        """Return generate's argument `bad_words_ids`: the ids of the option bad_words, or the option bad_words_ids."""
        if options.bad_words:
            ids = [ids for word in options.bad_words for ids in self.spellings(word)]
            return list(map(list, dict.fromkeys(map(tuple, ids))))
        return [list(ids) for ids in options.bad_words_ids or ()] or None

    def spellings(self, word: str) -> list[list[int]]:
        """Return the ids of all spellings of a banned word."""
        is_byte_level = isinstance(self.tokenizer.backend_tokenizer.decoder, ByteLevel)
        texts = list(spellings(word, is_byte_level=is_byte_level))
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def generate(
        self, pixel_values: torch.Tensor, options: DecodeOptions, *, with_scores: bool = True
    ) -> list[list[ReferenceCaption]]:
        """Caption f32[B,3,height,width] and return num_return_sequences captions per image, best first.

        With `with_scores` False, generate does not copy its scores, and ReferenceCaption.score is None.
        """
        images, count = len(pixel_values), options.num_return_sequences
        with_scores = with_scores and options.num_beams > 1
        first = options.forced_bos_token_id
        prompt, prompt_length = self.family.prompt_arguments(self.tokenizer, options.prompt, images, first)
        with torch.inference_mode():
            output = self.model.generate(
                pixel_values=pixel_values,
                **prompt,
                **self.family.task_arguments(self.model, self.task_ids, images),
                return_dict_in_generate=True,
                output_scores=with_scores,
                **generate_arguments(options),
                bad_words_ids=self.bad_words_ids(options),
            )
        scores = output.sequences_scores.tolist() if with_scores else [None] * (images * count)
        captions = [
            ReferenceCaption(_cut(ids, self.sizes.tokens.eos, prompt_length), score)
            for ids, score in zip(output.sequences.tolist(), scores, strict=True)
        ]
        return [captions[i * count : (i + 1) * count] for i in range(images)]

    def caption_log_prob(self, pixel_values: torch.Tensor, ids: tuple[int, ...], prompt_length: int) -> float:
        """Return the summed log-probability of a caption's ids after the prompt, in one pass over f32[1,3,h,w]."""
        sequence = torch.tensor([ids])
        with torch.inference_mode():
            encoded = self.family.encode(self.model, pixel_values, self.task_ids)
            rows = torch.log_softmax(self.family.logits(self.model, sequence, encoded)[0].float(), -1)
        return sum(rows[i - 1, ids[i]].item() for i in range(prompt_length, len(ids)))


def normalisation(processor: ImageProcessor) -> Normalisation:
    """Return (rescale, mean, std) of (x * rescale - mean) / std: 1, 0 and 1 for a step that the processor skips."""
    rescale = processor.rescale_factor if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return rescale, [0.0] * 3, [1.0] * 3
    return rescale, list(processor.image_mean), list(processor.image_std)


def generate_arguments(options: DecodeOptions) -> dict:
    """Return generate's keyword arguments. Without a maximum length none is passed: generate's default applies."""
    arguments = {
        "do_sample": False,
        "num_beams": options.num_beams,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "num_return_sequences": options.num_return_sequences,
        "repetition_penalty": options.repetition_penalty,
        "suppress_tokens": list(options.suppress_tokens or ()) or None,
        "begin_suppress_tokens": list(options.begin_suppress_tokens or ()) or None,
        "forced_bos_token_id": options.forced_bos_token_id,
        "forced_eos_token_id": options.forced_eos_token_id,
    }
    if options.num_beams > 1:
        arguments |= {"length_penalty": options.length_penalty, "early_stopping": options.early_stopping}
    if options.max_new_tokens is not None:
        arguments["max_new_tokens"] = options.max_new_tokens
    elif options.max_length is not None:
        arguments |= {
            "max_length": options.max_length,
            "max_new_tokens": None,
        }  # a checkpoint's max_new_tokens would override max_length
    if options.min_new_tokens is not None:
        arguments["min_new_tokens"] = options.min_new_tokens
    else:
        arguments |= {"min_length": options.min_length, "min_new_tokens": None}
    return arguments


def _cut(ids: list[int], eos: int, prompt_length: int) -> tuple[int, ...]:
    """Return ids up to the first end token. The rest is padding (eos after beam search, pad after greedy search)."""
    for i in range(prompt_length, len(ids)):
        if ids[i] == eos:
            return tuple(ids[: i + 1])
    return tuple(ids)


class UncachedBackend(PrefixBackend):
    """A Backend that runs Hugging Face's forward pass without KV caches, to trace a mismatch.

    The results of an image are cached until the next image, because a trace and the scores of its captions need the
    same prefixes many times.
    """

    name = "torch"

    def __init__(self, reference: Reference) -> None:
        self._reference, self._family = reference, reference.family
        self._image = b""
        self._hidden = torch.empty(0)
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    @functools.cached_property
    def in_float64(self) -> UncachedBackend:
        """The same model in float64: its logits and log-probabilities are f64."""
        return UncachedBackend(self._reference.in_float64)

    def log_probs(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.floating]:
        """Return log-probabilities f32[len(prefixes),V] by forward passes over whole prefixes."""
        log_probs: NDArray[np.floating] = torch.log_softmax(torch.tensor(self.logits(image, prefixes)), -1).numpy()
        return log_probs

    def logits(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.floating]:
        """Return logits f32[len(prefixes),V]. One forward pass serves a prefix and all prefixes that it starts with."""
        missing = set(prefixes) - self._rows.keys() if self._is_cached(image) else set(prefixes)
        with torch.inference_mode():
            for prefix in sorted(missing, key=len, reverse=True):
                if prefix in self._rows:
                    continue
                logits = self._family.logits(self._reference.model, torch.tensor([prefix]), self._hidden)[0]
                ends = (end for end in range(1, len(prefix) + 1) if prefix[:end] in missing)
                self._rows |= {prefix[:end]: logits[end - 1].clone() for end in ends}
        return np.stack([self._rows[prefix].numpy() for prefix in prefixes])

    def _is_cached(self, image: NDArray[np.uint8]) -> bool:
        """Return whether this is the last image again. If not, encode it and clear the cached rows."""
        if (content := image.tobytes()) == self._image:
            return True
        with torch.inference_mode():
            pixel_values = self._reference.normalised(image[None]).to(self._reference.model.dtype)
            self._hidden = self._family.encode(self._reference.model, pixel_values, self._reference.task_ids)
        self._image, self._rows = content, {}
        return False


def ensemble(references: Sequence[Reference], weights: Sequence[float]) -> Reference:
    """Combine several references into one, with weights as in engine.bundle.open.

    Tokenizer and settings are those of the first. Raises CheckpointError if their image processors differ, because all
    models get the same batch of pixels, or if their families differ.
    """
    first = references[0]
    for other in references[1:]:
        if other.family is not first.family:
            names = f"{first.family.rules.name} and {other.family.rules.name}"
            raise CheckpointError(f"the checkpoints are {names}: parity of several checkpoints needs one family")
        if other.image_processor.to_dict() != first.image_processor.to_dict():
            raise CheckpointError(
                "the checkpoints have different image processors: parity of several checkpoints needs equal ones"
            )
    model = first.family.ensemble([reference.model for reference in references], shares(weights))
    return Reference(model, first.image_processor, first.tokenizer)

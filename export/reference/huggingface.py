"""The reference: Hugging Face's generate, scores and pixels, also for the mean of several models."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, BlipTextLMHeadModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from engine.bundle.open import shares
from engine.decoding.backend import BatchSizes, StepInputs
from engine.decoding.processors import process
from engine.errors import CheckpointError
from engine.options import DecodeOptions
from export.checkpoints.files import BlipImageProcessor
from export.checkpoints.load import load_checkpoint
from export.checkpoints.settings import read_processor, read_tokenizer


@dataclass
class PrefixCache:
    """The image in every slot, and the token at every cached position, i64[B,W]."""

    images: list[NDArray[np.uint8] | None]
    tokens: NDArray[np.int64]

    @classmethod
    def allocate(cls, num_slots: int) -> PrefixCache:
        """See Backend.allocate."""
        return cls([None] * num_slots, np.zeros((num_slots, 0), np.int64))

    def feed(self, inputs: StepInputs) -> list[list[tuple[int, ...]]]:
        """Append the step's tokens; return the past of each row, itself included, as B lists of T prefixes."""
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
    """Implements Backend on top of `log_probs`, which subclasses provide."""

    name = "prefix"
    batch_sizes = BatchSizes(rows=32, encode_batch=4)

    def logits(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.float32]:
        """Return raw logits f32[len(prefixes),V]; a backend without them returns log-probabilities."""
        return self.log_probs(image, prefixes)

    @abstractmethod
    def log_probs(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.float32]:
        """Return f32[len(prefixes),V], the log-probabilities of the next id after each prefix."""

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
        """See Backend.step: log-probabilities, marks, plus running scores, best C, written in the simplest way."""
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
    """One sequence `generate` returned: ids cut after the first end token, and its score (None when greedy)."""

    ids: tuple[int, ...]
    score: float | None


@dataclass(frozen=True)
class Reference:
    """A checkpoint as Hugging Face runs it: model (eval, float32), slow image processor and fast tokenizer."""

    model: BlipForConditionalGeneration
    image_processor: BlipImageProcessor
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, checkpoint: Path, image_size: int | None = None) -> Reference:
        """Load a checkpoint directory; raise CheckpointError where load_checkpoint would, or without a tokenizer."""
        model = load_checkpoint(checkpoint, image_size)
        processor = read_processor(checkpoint).build()
        size = model.config.vision_config.image_size
        processor.size = {"height": size, "width": size}
        return cls(model, processor, read_tokenizer(checkpoint, model.config.text_config.vocab_size))

    def pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Return what the processor makes of RGB pictures: f32[B,3,height,width]."""
        return self.image_processor(pictures, return_tensors="pt")["pixel_values"]

    def prompt_ids(self, prompt: str | None) -> torch.Tensor | None:
        """Return the processor's ids of a prompt, i64[1,P+1] with [CLS] and [SEP], or None without one."""
        if not prompt:
            return None
        return self.tokenizer(prompt, padding=False, truncation=False, return_tensors="pt")["input_ids"]

    def bad_words_ids(self, options: DecodeOptions) -> list[list[int]] | None:
        """Return generate's argument of that name: the tokenizer's ids of bad_words, or those given as ids."""
        if options.bad_words:
            return self.tokenizer(list(options.bad_words), add_special_tokens=False)["input_ids"]
        return [list(ids) for ids in options.bad_words_ids or ()] or None

    def generate(
        self, pixel_values: torch.Tensor, options: DecodeOptions, *, with_scores: bool = True
    ) -> list[list[ReferenceCaption]]:
        """Caption f32[B,3,height,width]: num_return_sequences captions an image, best first.

        `with_scores` False spares generate the copies that scores cost; ReferenceCaption.score is None then.
        """
        images, count = len(pixel_values), options.num_return_sequences
        with_scores = with_scores and options.num_beams > 1
        prompt = self.prompt_ids(options.prompt)
        with torch.inference_mode():
            output = self.model.generate(
                pixel_values=pixel_values,
                # generate writes into the ids it is given
                input_ids=None if prompt is None else prompt.repeat(images, 1).clone(),
                return_dict_in_generate=True,
                output_scores=with_scores,
                **generate_arguments(options),
                bad_words_ids=self.bad_words_ids(options),
            )
        prompt_length = 1 if prompt is None else prompt.shape[1] - 1
        eos = self.model.config.text_config.sep_token_id
        scores = output.sequences_scores.tolist() if with_scores else [None] * (images * count)
        captions = [
            ReferenceCaption(_cut(ids, eos, prompt_length), score)
            for ids, score in zip(output.sequences.tolist(), scores, strict=True)
        ]
        return [captions[i * count : (i + 1) * count] for i in range(images)]

    def caption_log_prob(self, pixel_values: torch.Tensor, ids: tuple[int, ...], prompt_length: int) -> float:
        """Return the summed log-probability of a caption's ids behind the prompt, in one pass over f32[1,3,h,w]."""
        sequence = torch.tensor([ids])
        with torch.inference_mode():
            output = self.model.text_decoder(
                input_ids=sequence,
                attention_mask=torch.ones_like(sequence),
                encoder_hidden_states=self.model.vision_model(pixel_values)[0],
                use_cache=False,
            )
            rows = torch.log_softmax(output.logits[0].float(), -1)
        return sum(rows[i - 1, ids[i]].item() for i in range(prompt_length, len(ids)))


def normalisation(processor: BlipImageProcessor) -> tuple[float, list[float], list[float]]:
    """Return (rescale, mean, std) for (x * rescale - mean) / std; 1, 0 and 1 where the processor leaves a part out."""
    rescale = processor.rescale_factor if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return rescale, [0.0] * 3, [1.0] * 3
    return rescale, list(processor.image_mean), list(processor.image_std)


def generate_arguments(options: DecodeOptions) -> dict:
    """Return generate's keyword arguments; without a longest length none is passed, so generate's default applies."""
    arguments = {
        "do_sample": False,
        "num_beams": options.num_beams,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "num_return_sequences": options.num_return_sequences,
        "repetition_penalty": options.repetition_penalty,
        "suppress_tokens": list(options.suppress_tokens or ()) or None,
        "begin_suppress_tokens": list(options.begin_suppress_tokens or ()) or None,
    }
    if options.num_beams > 1:
        arguments |= {"length_penalty": options.length_penalty, "early_stopping": options.early_stopping}
    if options.max_new_tokens is not None:
        arguments["max_new_tokens"] = options.max_new_tokens
    elif options.max_length is not None:
        arguments |= {"max_length": options.max_length, "max_new_tokens": None}  # a checkpoint's own would win
    if options.min_new_tokens is not None:
        arguments["min_new_tokens"] = options.min_new_tokens
    else:
        arguments |= {"min_length": options.min_length, "min_new_tokens": None}
    return arguments


def _cut(ids: list[int], eos: int, prompt_length: int) -> tuple[int, ...]:
    """Cut after the first end token: what follows is padding (with eos after beam search, with pad after greedy)."""
    for i in range(prompt_length, len(ids)):
        if ids[i] == eos:
            return tuple(ids[: i + 1])
    return tuple(ids)


class UncachedBackend(PrefixBackend):
    """The decoding core's Backend on Hugging Face's own forward pass, without its caches: for tracing a mismatch.

    What was computed for an image is kept until the next image comes: a trace and the scores of its captions ask for
    the same prefixes again and again.
    """

    name = "torch"

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._image = b""
        self._hidden = torch.empty(0)
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    def log_probs(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.float32]:
        """Return f32[len(prefixes),V] from passes over whole prefixes."""
        log_probs: NDArray[np.float32] = torch.log_softmax(torch.tensor(self.logits(image, prefixes)), -1).numpy()
        return log_probs

    def logits(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.float32]:
        """Return f32[len(prefixes),V] from passes over whole prefixes, one for those that begin each other."""
        missing = set(prefixes) - self._rows.keys() if self._is_kept(image) else set(prefixes)
        with torch.inference_mode():
            for prefix in sorted(missing, key=len, reverse=True):
                if prefix in self._rows:
                    continue
                ids = torch.tensor([prefix])
                logits = self._reference.model.text_decoder(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    encoder_hidden_states=self._hidden,
                    use_cache=False,
                ).logits[0]
                ends = (end for end in range(1, len(prefix) + 1) if prefix[:end] in missing)
                self._rows |= {prefix[:end]: logits[end - 1].float().clone() for end in ends}
        return np.stack([self._rows[prefix].numpy() for prefix in prefixes])

    def _is_kept(self, image: NDArray[np.uint8]) -> bool:
        """Return whether the image is the last one; encode it and forget the last one's rows if it is not."""
        if (content := image.tobytes()) == self._image:
            return True
        with torch.inference_mode():
            pixel_values = self._reference.pixels([Image.fromarray(image)])
            self._hidden = self._reference.model.vision_model(pixel_values)[0]
        self._image, self._rows = content, {}
        return False


class MeanVision(nn.Module):
    """The vision towers side by side: hidden states f32[B,S,D1+D2+...]."""

    def __init__(self, models: Sequence[BlipForConditionalGeneration]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(model.vision_model for model in models)

    def forward(self, pixel_values: Tensor, **_: object) -> tuple[Tensor]:
        """pixel_values f32[B,3,height,width]."""
        return (torch.cat([tower(pixel_values)[0] for tower in self.towers], -1),)


class MeanDecoder(BlipTextLMHeadModel):
    """The text decoders, each on its own part of the hidden states; keeps no keys and values."""

    def __init__(self, models: Sequence[BlipForConditionalGeneration], weights: Sequence[float]) -> None:
        super().__init__(copy.deepcopy(models[0].config.text_config))
        del self.bert, self.cls
        self.decoders = nn.ModuleList(model.text_decoder for model in models)
        self.widths = [model.config.vision_config.hidden_size for model in models]
        self.weights = list(weights)
        self.generation_config = copy.deepcopy(models[0].text_decoder.generation_config)
        self.generation_config.use_cache = False

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **_: object,
    ) -> CausalLMOutputWithCrossAttentions:
        """Return logits f32[B,T,V]: the sum of weight * log_softmax of the decoders, in their order."""
        parts = encoder_hidden_states.split(self.widths, -1)
        mean: Tensor | float = 0.0
        for decoder, hidden, weight in zip(self.decoders, parts, self.weights, strict=True):
            output = decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                encoder_hidden_states=hidden,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=False,
            )
            mean = mean + weight * torch.log_softmax(output.logits.float(), -1)
        return CausalLMOutputWithCrossAttentions(logits=mean)


def ensemble(references: Sequence[Reference], weights: Sequence[float]) -> Reference:
    """Return several references as one, with weights as in engine.bundle.open; the first gives tokenizer and
    settings.

    Raises CheckpointError where their pictures are not prepared alike, which a batch of pixels has to be.
    """
    first = references[0]
    for other in references[1:]:
        if other.image_processor.to_dict() != first.image_processor.to_dict():
            raise CheckpointError(
                "the checkpoints prepare pictures in different ways: parity is shown for such that do it alike"
            )
    models = [reference.model for reference in references]
    model = copy.copy(first.model)
    model._modules = dict(first.model._modules)
    model.vision_model, model.text_decoder = MeanVision(models), MeanDecoder(models, shares(weights)).eval()
    return Reference(model, first.image_processor, first.tokenizer)

"""What a model is worth after an epoch: its loss, and the scores of captions it generates, by the engine's own code.

Shared among the processes of a distributed run. Knows nothing of optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerBase

from engine.bundle.tokenizer import detokenise
from engine.inputs.pixels import CLIP
from engine.options import DecodeOptions
from engine.scoring.base import Items, MetricInputs
from engine.scoring.profiles import make_metric
from export.reference.huggingface import Reference
from export.reference.torch_backend import caption_live, captioning
from train.data.batches import IGNORED, Collator, PixelSpec, prompt_ids, texts_of
from train.data.dataset import Example
from train.learning.processes import gather, rank_and_world_size, share_of

LOSS = "loss"


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the summed cross entropy of logits f32[B,L,V] and the labels i64[B,L] that come after each, f32[].

    As BlipTextLMHeadModel.forward computes it (transformers 4.57), but summed, so that a mean over several batches
    can be taken over their tokens.
    """
    predicted, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return F.cross_entropy(predicted, targets, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum")


@dataclass(frozen=True)
class Evaluator:
    """Judges a model on `examples`. `metrics` are names of `engine score`; captions are decoded by `options`, pictures
    read as `high_bit_depth` says.
    """

    reference: Reference
    examples: Sequence[Example]
    metrics: tuple[str, ...]
    options: DecodeOptions
    max_tokens: int
    batch_size: int
    setting: MetricInputs = field(default_factory=MetricInputs)
    high_bit_depth: str = CLIP

    def evaluate(self) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Return (loss and metrics by name, (id, caption) pairs) over all processes' shares.

        The loss is the mean over tokens, without label smoothing. Of an image with several captions each counts for the
        loss, and all are its references.
        """
        loss, captions = self.observe()
        return {LOSS: loss} | self.scores(captions), captions

    def observe(self) -> tuple[float, list[tuple[str, str]]]:
        """Return the loss and the (id, caption) pairs that `evaluate` returns, without scoring them."""
        model, (rank, world_size) = self.reference.model, rank_and_world_size()
        mine = [self.examples[i] for i in share_of(len(self.examples), rank, world_size)]
        with captioning(model):
            sums = np.sum([*self._losses(model, mine), (0.0, 0)], axis=0)
        loss, tokens = np.sum(gather([tuple(sums.tolist())]), axis=0)
        by_id = {example.id: example for example in self.examples}
        my_ids = [list(by_id)[i] for i in share_of(len(by_id), rank, world_size)]
        captions = dict(gather(list(self._captions(model, [by_id[one] for one in my_ids]))))
        return float(loss / max(1, tokens)), [(one, captions[one]) for one in by_id]

    def scores(self, captions: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Return the metrics of (id, caption) pairs by name."""
        references = references_by_id(self.examples)
        items = Items(
            [one for one, _ in captions], [text for _, text in captions], [references[one] for one, _ in captions]
        )
        return {name: make_metric(name, self.setting, {}).measure(items).value for name in self.metrics}

    def _losses(self, model: BlipForConditionalGeneration, mine: Sequence[Example]) -> Iterator[tuple[float, int]]:
        """Yield (summed loss, tokens) of batches."""
        spec = PixelSpec.of(self.reference.image_processor, self.high_bit_depth)
        collator = Collator(self.reference.tokenizer, model.config.text_config.bos_token_id, self.max_tokens)
        with torch.inference_mode():
            for start in range(0, len(mine), self.batch_size):
                part = mine[start : start + self.batch_size]
                items = [{"pixels": torch.tensor(spec.read(e.image))} | texts_of(e) for e in part]
                batch = {name: tensor.to(model.device) for name, tensor in collator(items).items()}
                labels, pixels = batch.pop("labels"), spec.normalise(batch.pop("pixels"))
                logits = model(pixel_values=pixels, **batch).logits
                yield sum_of_losses(logits, labels).item(), int((labels != IGNORED).sum())

    def _captions(self, model: BlipForConditionalGeneration, examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
        """Yield (id, caption) of images, each caption as what follows the image's prompt."""
        spec, tokenizer = PixelSpec.of(self.reference.image_processor, self.high_bit_depth), self.reference.tokenizer
        pixels: Iterator[tuple[str, NDArray[np.uint8]]] = ((one.id, spec.read(one.image)) for one in examples)
        prompts = {one.id: prompt_ids(tokenizer, one.prompt) for one in examples}
        for one, hypotheses in caption_live(model, self.reference.image_processor, pixels, self.options, prompts):
            yield one, text_behind(tokenizer, hypotheses[0].ids, prompts[one])


def text_behind(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt: Sequence[int]) -> str:
    """Return a caption's text from its ids, [DEC] and the ids of its prompt included: what follows the prompt, which
    no reference holds and no metric may count.
    """
    return detokenise(tokenizer.decode(ids[1 + len(prompt) :], skip_special_tokens=True))


def references_by_id(examples: Sequence[Example]) -> dict[str, tuple[str, ...]]:
    """Return the captions of each image, in the order of first appearance."""
    references: dict[str, tuple[str, ...]] = {}
    for example in examples:
        references[example.id] = (*references.get(example.id, ()), example.caption)
    return references

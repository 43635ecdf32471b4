"""Evaluate a model after an epoch: its loss, and metrics of generated captions by the code of `engine score`.

The work is divided among the processes of a distributed run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.bundle.tokenizer import detokenise
from engine.options import CLIP, DecodeOptions
from engine.scoring.base import Items, MetricInputs
from engine.scoring.profiles import make_metric
from export.reference.huggingface import Reference
from export.reference.torch_backend import caption_live, captioning
from train.data.batches import IGNORED, Collator, PixelSpec, prompt_ids, texts_of
from train.data.examples import Example, references_by_id
from train.learning.trainer import LOSS, gather, rank_and_world_size, sum_of_losses

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

"""Reward training: self-critical sequence training (Rennie et al. 2017, https://arxiv.org/abs/1612.00563).

Captions are sampled through the engine's decoding core and rewarded by the metrics of `engine score`. The gradient
makes samples more likely whose reward is above a baseline, and others less likely. The baseline is the reward of the
greedy caption, as in that paper, or for each sample the mean reward of the other samples of its image (Luo 2020,
https://arxiv.org/abs/2003.09971).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.decoding.beam import Hypothesis
from engine.options import DecodeOptions
from engine.scoring.base import Items, Measured, MetricInputs
from engine.scoring.profiles import make_metric
from export.reference.huggingface import Reference
from export.reference.torch_backend import caption_live
from train.data.batches import EpochIndex, Item, Pictures, PixelSpec, prompt_ids
from train.data.examples import Example, references_by_id
from train.learning.trainer import CaptionTrainer, sum_of_losses, text_after_prompt

SAMPLED_WORDS = 100
"""Top-k of the sampling. The other tokens have next to no probability, and sorting all 30,000 costs time."""
NOTHING = 1e-9
"""Advantages below this size are rounding errors."""
PADDING = -1
"""Fills up the ids of shorter sequences; not a token id."""
BLANK_INDEX = -1
"""Index of a blank, which fills up the last batch of an epoch."""


class Reward:
    """A weighted sum of per-caption metrics, each as `engine score` computes it.

    CIDEr takes the document frequencies from the training references, not from the batch.
    """

    def __init__(
        self, weights: Mapping[str, float], setting: MetricInputs, references: Sequence[tuple[str, ...]]
    ) -> None:
        self._parts = [
            (weight, CorpusCider(references) if name == "cider" else make_metric(name, setting, {}))
            for name, weight in weights.items()
        ]

    def __call__(self, candidates: Sequence[str], references: Sequence[tuple[str, ...]]) -> NDArray[np.float64]:
        """Return the rewards f64[N]. Raises UnavailableError if a metric needs something that is missing."""
        items = Items([str(i) for i in range(len(candidates))], candidates, references)
        return np.sum([weight * metric.measure(items).per_image for weight, metric in self._parts], axis=0)


class CorpusCider:
    """CIDEr-D of a few captions at a time with the document frequencies of a whole corpus; values from 0 to 10."""

    name = "cider"

    def __init__(self, references: Sequence[tuple[str, ...]]) -> None:
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        self._make = lambda: CiderScorer(n=4, sigma=6.0)
        self._corpus = self._make()
        text = Items([""] * len(references), [""] * len(references), references).preprocessed()
        for captions in text.references:
            self._corpus += ("", list(captions))
        self._corpus.compute_doc_freq()

    def measure(self, items: Items) -> Measured:
        """See engine.scoring.base.Metric."""
        text, scorer = items.preprocessed(), self._make()
        for candidate, references in zip(text.candidates, text.references, strict=True):
            scorer += (candidate, list(references))
        # The scorer takes the number of documents from the length of this list, so it must be that of the corpus. It
        # scores only as many entries as there are captions.
        scorer.crefs += self._corpus.crefs[len(items) :]
        scorer.document_frequency = self._corpus.document_frequency
        scores = np.array(scorer.compute_cider(), np.float64)
        return Measured(scores, float(scores.mean()))


class RewardedPictures(Pictures):
    """Images for the decoding core, u8[size,size,3], with the captions for the cross entropy part of the loss."""

    def __getitem__(self, place: EpochIndex) -> Item:
        """Return pixels, place i64[2] (epoch and index; BLANK_INDEX for a blank), caption and prompt."""
        epoch, index = place
        known = (epoch, BLANK_INDEX) if index >= len(self.examples) else place
        return super().__getitem__(place) | {"place": torch.tensor(known)}


class RewardTrainer(CaptionTrainer):
    """CaptionTrainer with the self-critical loss, of which the recipe's `likelihood_share` is cross entropy."""

    def __init__(self, *, reference: Reference, reward: Reward, greedy: DecodeOptions, **settings: Any) -> None:
        super().__init__(**settings)
        self._reference, self._reward, self._greedy = reference, reward, greedy
        self._examples: Sequence[Example] = self.train_dataset.examples
        self._references = references_by_id(self._examples)
        self._spec: PixelSpec = self.train_dataset.spec
        self._seen: list[tuple[float, float]] = []  # mean reward of the samples and reward of the greedy caption

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the loss of one batch: the negative log-probability of the samples, weighted by their advantage.

        It is summed over the tokens of a caption after its prompt, and averaged over the samples of a full step. Blanks
        add nothing.
        """
        places = inputs["place"].tolist()
        filled = [i for i, (_, index) in enumerate(places) if index != BLANK_INDEX]
        pixels = inputs["pixels"].cpu().numpy()
        drawn = self._roll_out([(tuple(places[i]), pixels[i]) for i in filled])
        if not any(drawn):  # nothing to learn, but DDP waits until every process has called its model
            start = self._reference.sizes.tokens.bos
            drawn = [{(start, start): 0.0}, *drawn[1:]]
        normal = self._spec.normalise(inputs["pixels"][filled or [0]])
        ids = pad([sample for samples in drawn for sample in samples], self.args.device)
        advantages = [advantage for samples in drawn for advantage in samples.values()]
        weights = torch.tensor(advantages, device=self.args.device, dtype=torch.float32)
        with_index = zip(filled or [0], drawn, strict=True)
        given = [1 + len(self._prompt(places[i][1])) for i, samples in with_index for _ in samples]
        with repeating(self._reference.model.vision_model, [len(samples) for samples in drawn]):
            mask = (ids != PADDING).long()
            logits = model(pixel_values=normal, input_ids=ids.clamp(min=0), attention_mask=mask).logits
        loss = -(weights * log_probs(logits, ids, given)).sum() / (self.recipe.batch_size * self.recipe.samples)
        share = self.recipe.likelihood_share
        if share and num_items_in_batch is not None and filled:
            texts = {name: inputs[name][filled] for name in ("input_ids", "attention_mask")}
            total = sum_of_losses(model(pixel_values=normal, **texts).logits, inputs["labels"][filled])
            loss = (1 - share) * loss + share * total / num_items_in_batch
        loss = loss * self.accelerator.num_processes  # DDP averages the gradients over processes
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean rewards since the last log: `reward_drawn` of samples, `reward_greedy` of greedy captions."""
        if self._seen and "loss" in logs:
            drawn, greedy = np.mean(self._seen, axis=0)
            logs |= {"reward_drawn": float(drawn), "reward_greedy": float(greedy)}
            self._seen.clear()
        super().log(logs, start_time)

    def _prompt(self, index: int) -> tuple[int, ...]:
        """Return the ids of an example's prompt; empty for a blank."""
        return () if index == BLANK_INDEX else prompt_ids(self._reference.tokenizer, self._examples[index].prompt)

    def _roll_out(self, images: list[tuple[tuple[int, int], NDArray[np.uint8]]]) -> list[dict[tuple[int, ...], float]]:
        """Sample captions of ((epoch, index), pixels) pairs; return {ids: advantage} for each image.

        Equal samples are merged and their advantages added. Samples without an advantage are omitted, so that an image
        whose samples are all equal costs no backward pass.
        """
        if not images:
            return []
        sampling = DecodeOptions(
            do_sample=True,
            num_return_sequences=self.recipe.samples,
            top_k=SAMPLED_WORDS,
            seed=self.recipe.seed,
            max_new_tokens=self._greedy.max_new_tokens,
        )
        decode = (self._reference.model, self._reference.image_processor, images)
        prompts = {place: self._prompt(place[1]) for place, _ in images}
        greedy: dict[Any, list[Hypothesis]] = dict(caption_live(*decode, self._greedy, prompts))
        sampled: dict[Any, list[Hypothesis]] = dict(caption_live(*decode, sampling, prompts))
        candidates, references = [], []
        for place, _ in images:
            hypotheses = [*sampled[place], greedy[place][0]]
            candidates += [text_after_prompt(self._reference.tokenizer, h.ids, prompts[place]) for h in hypotheses]
            references += [self._references[self._examples[place[1]].id]] * len(hypotheses)
        rewards = self._reward(candidates, references).reshape(len(images), -1)
        self._seen += list(zip(rewards[:, :-1].mean(1).tolist(), rewards[:, -1].tolist(), strict=True))
        advantages = BASELINES[self.recipe.baseline](rewards)
        return [
            merge_equal([hypothesis.ids for hypothesis in sampled[place]], row)
            for (place, _), row in zip(images, advantages.tolist(), strict=True)
        ]


def advantage_over_greedy(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the advantages f64[N,S] of S samples over the greedy caption, the last of the rewards f64[N,S+1]."""
    return rewards[:, :-1] - rewards[:, -1:]


def advantage_over_others(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the advantages f64[N,S] of S samples, each over the mean of the other samples of its image.

    Rewards f64[N,S+1] end with that of the greedy caption, which is ignored.
    """
    drawn = rewards[:, :-1]
    return drawn - (drawn.sum(1, keepdims=True) - drawn) / (drawn.shape[1] - 1)


BASELINES = {"greedy": advantage_over_greedy, "others": advantage_over_others}
"""The recipe's `baseline` -> function that returns the advantages over it."""


def merge_equal(drawn: Sequence[tuple[int, ...]], advantages: Sequence[float]) -> dict[tuple[int, ...], float]:
    """Return {ids: sum of the advantages of equal captions} without the sums that are zero."""
    sums: dict[tuple[int, ...], float] = {}
    for ids, advantage in zip(drawn, advantages, strict=True):
        sums[ids] = sums.get(ids, 0.0) + advantage
    return {ids: advantage for ids, advantage in sums.items() if abs(advantage) > NOTHING}


@contextmanager
def repeating(vision_model: torch.nn.Module, counts: Sequence[int]) -> Iterator[None]:
    """Encode every image once and repeat its features for its `counts[i]` captions, while the context is open.

    A forward hook does that, so that the model is still called through its DDP wrapper.
    """

    def repeat(_: torch.nn.Module, __: Any, output: Any) -> Any:
        times = torch.tensor(counts, device=output.last_hidden_state.device)
        output.last_hidden_state = output.last_hidden_state.repeat_interleave(times, 0)
        return output

    handle = vision_model.register_forward_hook(repeat)
    try:
        yield
    finally:
        handle.remove()


def pad(sequences: Sequence[tuple[int, ...]], device: torch.device | str) -> torch.Tensor:
    """Return id sequences as i64[N,L], filled up with PADDING at the end."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[PADDING] * (longest - len(ids))] for ids in sequences], device=device)


def log_probs(logits: torch.Tensor, ids: torch.Tensor, given: Sequence[int] | None = None) -> torch.Tensor:
    """Return the summed log-probability f32[N] of each sequence i64[N,L], by logits f32[N,L,V].

    The first `given` ids of a sequence, [DEC] and its prompt, are not counted; None means [DEC] only.
    """
    logits, targets = logits[:, :-1].float(), ids[:, 1:]
    if logits.shape[2] > SAMPLED_WORDS:
        # Use the distribution that was sampled from, the SAMPLED_WORDS most likely tokens. With the full softmax,
        # advantages of one sign would move probability to tokens that are never drawn. The scatter keeps the drawn
        # token itself.
        least = logits.detach().topk(SAMPLED_WORDS).values[:, :, -1:]
        keep = (logits >= least).scatter(2, targets.clamp(min=0)[:, :, None], True)
        logits = logits.masked_fill(~keep, float("-inf"))
    rows = torch.log_softmax(logits, -1)
    counted = targets != PADDING
    if given is not None:
        positions = torch.arange(1, ids.shape[1], device=ids.device)
        counted &= positions >= torch.tensor(given, device=ids.device)[:, None]
    return torch.where(counted, rows.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0], 0.0).sum(1)

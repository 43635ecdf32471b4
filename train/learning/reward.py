"""Reward training: self-critical sequence training (Rennie et al. 2017, https://arxiv.org/abs/1612.00563).

Captions are drawn through the engine's decoding core, rewarded by the metrics that will judge them, and compared with
a baseline; the gradient makes drawn captions that beat it likelier. The baseline is what the model says greedily, as in
that paper, or for each drawn caption the mean reward of the others of its image (Luo 2020,
https://arxiv.org/abs/2003.09971). Knows nothing of run directories.
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
from train.data.dataset import Example
from train.learning.evaluate import references_by_id, sum_of_losses, text_behind
from train.learning.trainer import CaptionTrainer

SAMPLED_WORDS = 100
"""Words a rollout draws from: what is left out has next to no probability, and sorting 30,000 words costs."""
NOTHING = 1e-9
"""An advantage below it is rounding."""
PADDING = -1
"""Stands behind the ids of shorter sequences."""
BLANK_INDEX = -1
"""Stands where an epoch is filled up and has no example."""


class Reward:
    """A weighted sum of metrics of single captions, each as `engine score` computes it.

    CIDEr weighs words by their frequency in the training references, not by that in a batch.
    """

    def __init__(
        self, weights: Mapping[str, float], setting: MetricInputs, references: Sequence[tuple[str, ...]]
    ) -> None:
        self._parts = [
            (weight, CorpusCider(references) if name == "cider" else make_metric(name, setting, {}))
            for name, weight in weights.items()
        ]

    def __call__(self, candidates: Sequence[str], references: Sequence[tuple[str, ...]]) -> NDArray[np.float64]:
        """Return f64[N]. Raises UnavailableError when a metric lacks something."""
        items = Items([str(i) for i in range(len(candidates))], candidates, references)
        return np.sum([weight * metric.measure(items).per_image for weight, metric in self._parts], axis=0)


class CorpusCider:
    """CIDEr-D with the document frequencies of a corpus, for a few captions at a time; values lie between 0 and 10."""

    name = "cider"

    def __init__(self, references: Sequence[tuple[str, ...]]) -> None:
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        self._make = lambda: CiderScorer(n=4, sigma=6.0)
        self._corpus = self._make()
        text = Items([""] * len(references), [""] * len(references), references).preprocessed()
        for several in text.references:
            self._corpus += ("", list(several))
        self._corpus.compute_doc_freq()

    def measure(self, items: Items) -> Measured:
        """See engine.scoring.base.Metric."""
        text, scorer = items.preprocessed(), self._make()
        for candidate, references in zip(text.candidates, text.references, strict=True):
            scorer += (candidate, list(references))
        # as many documents as the corpus has: the scorer takes their number from this list, and stops with the captions
        scorer.crefs += self._corpus.crefs[len(items) :]
        scorer.document_frequency = self._corpus.document_frequency
        scores = np.array(scorer.compute_cider(), np.float64)
        return Measured(scores, float(scores.mean()))


class RewardedPictures(Pictures):
    """Images as the decoding core takes them, u8[size,size,3], with the captions that the likelihood is kept for."""

    def __getitem__(self, place: EpochIndex) -> Item:
        """Return pixels, place i64[2] (epoch and index, BLANK_INDEX for a blank), caption and prompt."""
        epoch, index = place
        known = (epoch, BLANK_INDEX) if index >= len(self.examples) else place
        return super().__getitem__(place) | {"place": torch.tensor(known)}


class RewardTrainer(CaptionTrainer):
    """CaptionTrainer whose loss is the self-critical one, with `likelihood_share` of cross entropy."""

    def __init__(self, *, reference: Reference, reward: Reward, greedy: DecodeOptions, **given: Any) -> None:
        super().__init__(**given)
        self._reference, self._reward, self._greedy = reference, reward, greedy
        self._examples: Sequence[Example] = self.train_dataset.examples
        self._references = references_by_id(self._examples)
        self._spec: PixelSpec = self.train_dataset.spec
        self._seen: list[tuple[float, float]] = []

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the loss of one batch: minus the log-probability of drawn captions, weighted by their advantage.

        Summed over a caption's tokens behind its prompt, averaged over the drawn captions of a full step: blanks weigh
        nothing.
        """
        places = inputs["place"].tolist()
        filled = [i for i, (_, index) in enumerate(places) if index != BLANK_INDEX]
        pixels = inputs["pixels"].cpu().numpy()
        drawn = self._roll_out([(tuple(places[i]), pixels[i]) for i in filled])
        if not any(drawn):  # nothing to learn, but every process calls its model
            drawn = [{(self._greedy_start(),) * 2: 0.0}, *drawn[1:]]
        normal = self._spec.normalise(inputs["pixels"][filled or [0]])
        ids = pad([one for several in drawn for one in several], self.args.device)
        advantages = [advantage for several in drawn for advantage in several.values()]
        weights = torch.tensor(advantages, device=self.args.device, dtype=torch.float32)
        started = zip(filled or [0], drawn, strict=True)
        told = [1 + len(self._prompt(places[i][1])) for i, several in started for _ in several]
        with repeating(self._reference.model.vision_model, [len(several) for several in drawn]):
            logits = model(pixel_values=normal, **_without_padding(ids)).logits
        loss = -(weights * log_probs(logits, ids, told)).sum() / (self.recipe.batch_size * self.recipe.samples)
        share = self.recipe.likelihood_share
        if share and num_items_in_batch is not None and filled:
            kept = {name: inputs[name][filled] for name in ("input_ids", "attention_mask")}
            total = sum_of_losses(model(pixel_values=normal, **kept).logits, inputs["labels"][filled])
            loss = (1 - share) * loss + share * total / num_items_in_batch
        loss = loss * self.accelerator.num_processes  # which average their gradients
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean rewards since the last log: of drawn captions, and of the greedy ones."""
        if self._seen and "loss" in logs:
            drawn, greedy = np.mean(self._seen, axis=0)
            logs |= {"reward_drawn": float(drawn), "reward_greedy": float(greedy)}
            self._seen.clear()
        super().log(logs, start_time)

    def _greedy_start(self) -> int:
        return int(self._reference.model.config.text_config.bos_token_id)

    def _prompt(self, index: int) -> tuple[int, ...]:
        """Return the ids of an example's prompt, none for a blank."""
        return () if index == BLANK_INDEX else prompt_ids(self._reference.tokenizer, self._examples[index].prompt)

    def _roll_out(self, images: list[tuple[tuple[int, int], NDArray[np.uint8]]]) -> list[dict[tuple[int, ...], float]]:
        """Return of each image the ids of its drawn captions with their advantages; equal ones are one with the sum of
        theirs, and those without any are left out: what a model is sure of costs nothing.
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
        several: dict[Any, list[Hypothesis]] = dict(caption_live(*decode, sampling, prompts))
        candidates, references = [], []
        for place, _ in images:
            one = [*several[place], greedy[place][0]]
            candidates += [text_behind(self._reference.tokenizer, hypothesis.ids, prompts[place]) for hypothesis in one]
            references += [self._references[self._examples[place[1]].id]] * len(one)
        rewards = self._reward(candidates, references).reshape(len(images), -1)
        self._seen += list(zip(rewards[:, :-1].mean(1).tolist(), rewards[:, -1].tolist(), strict=True))
        advantages = BASELINES[self.recipe.baseline](rewards)
        return [
            merge_equal([hypothesis.ids for hypothesis in several[place]], row)
            for (place, _), row in zip(images, advantages.tolist(), strict=True)
        ]


def advantage_over_greedy(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the advantages f64[N,S] of S drawn captions over the greedy one, the last of rewards f64[N,S+1]."""
    return rewards[:, :-1] - rewards[:, -1:]


def advantage_over_others(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the advantages f64[N,S] of each of S drawn captions over the mean of the other drawn ones of its image."""
    drawn = rewards[:, :-1]
    return drawn - (drawn.sum(1, keepdims=True) - drawn) / (drawn.shape[1] - 1)


BASELINES = {"greedy": advantage_over_greedy, "others": advantage_over_others}
"""What a reward is compared with, by the recipe's name for it."""


def merge_equal(drawn: Sequence[tuple[int, ...]], advantages: Sequence[float]) -> dict[tuple[int, ...], float]:
    """Add up the advantages of equal captions, and leave out those that come to nothing."""
    sums: dict[tuple[int, ...], float] = {}
    for ids, advantage in zip(drawn, advantages, strict=True):
        sums[ids] = sums.get(ids, 0.0) + advantage
    return {ids: advantage for ids, advantage in sums.items() if abs(advantage) > NOTHING}


@contextmanager
def repeating(vision_model: torch.nn.Module, counts: Sequence[int]) -> Iterator[None]:
    """Let every image be encoded once for the captions drawn of it, `counts` of each: features are repeated alone.

    A hook, so that the call goes through whatever wraps the model for several processes.
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
    """Return id sequences as i64[N,L], PADDING behind the shorter ones."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[PADDING] * (longest - len(ids))] for ids in sequences], device=device)


def _without_padding(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids.clamp(min=0), "attention_mask": (ids != PADDING).long()}


def log_probs(logits: torch.Tensor, ids: torch.Tensor, told: Sequence[int] | None = None) -> torch.Tensor:
    """Return the summed log-probability of each sequence i64[N,L] behind its first `told` ids ([DEC] and the prompt;
    [DEC] alone when None), f32[N], of logits f32[N,L,V].

    Of the distribution that was drawn from: the likeliest SAMPLED_WORDS alone. Only then do advantages of one sign pull
    nothing towards words that are never drawn.
    """
    logits, targets = logits[:, :-1].float(), ids[:, 1:]
    if logits.shape[2] > SAMPLED_WORDS:
        least = logits.detach().topk(SAMPLED_WORDS).values[:, :, -1:]
        keep = (logits >= least).scatter(2, targets.clamp(min=0)[:, :, None], True)
        logits = logits.masked_fill(~keep, float("-inf"))
    rows = torch.log_softmax(logits, -1)
    counted = targets != PADDING
    if told is not None:
        places = torch.arange(1, ids.shape[1], device=ids.device)
        counted &= places >= torch.tensor(told, device=ids.device)[:, None]
    return torch.where(counted, rows.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0], 0.0).sum(1)


def make_reward(weights: Mapping[str, float], setting: MetricInputs, examples: Sequence[Example]) -> Reward:
    """Return the reward of a recipe, its CIDEr fitted to the training captions."""
    return Reward(weights, setting, list(references_by_id(examples).values()))

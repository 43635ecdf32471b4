"""Run a live torch model as a backend of the decoding core, to caption during training on the model's device.

It runs the modules that are exported as the graphs of a bundle (export/families/modules.py), so its captions are those
that the bundle will give. This module does not depend on training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from engine.bundle.manifest import STEP_INPUTS
from engine.decoding.backend import BatchSizes, StepInputs
from engine.decoding.beam import Hypothesis, Search, resolve_search
from engine.decoding.scheduler import Key, Request, Scheduler
from engine.errors import UsageError
from engine.options import DecodeOptions
from export.families import family_of
from export.families.modules import ImageProcessor
from export.reference.huggingface import normalisation

CPU_APPETITE = BatchSizes(rows=96, encode_batch=4)
GPU_APPETITE = BatchSizes(rows=128, encode_batch=32)
"""An estimate that was never measured, because no GPU was available. Greedy search takes 5 GiB for BLIP at 384 px."""


@dataclass
class TorchCache:
    """Keys and values of B slots: cross [B,H,S,d], settled [B,H,F,d] and recent [B,H,R,d].

    Each list holds keys and values alternately, layer by layer.
    """

    cross: list[Tensor]
    settled: list[Tensor]
    recent: list[Tensor]


class TorchBackend:
    """Implements engine.decoding.backend.Backend with a checkpoint's live weights.

    The weights may change between captions. The model must be in eval mode while it captions (see `captioning`).
    `task_ids` are those of a model with tasks.
    """

    name = "torch"

    def __init__(self, model: PreTrainedModel, processor: ImageProcessor, task_ids: Sequence[int] = ()) -> None:
        family, self._device = family_of(model), model.device
        self._task = [torch.tensor(task_ids, device=self._device)] if task_ids else []
        self._encoder = family.encoder(model, normalisation(processor)).to(self._device)
        self._decoder = family.step(model)
        self.batch_sizes = CPU_APPETITE if self._device.type == "cpu" else GPU_APPETITE

    def encode(self, pixel_values: NDArray[np.uint8]) -> list[Tensor]:
        """See Backend.encode."""
        with torch.inference_mode():
            return list(self._encoder(torch.from_numpy(pixel_values).to(self._device), *self._task))

    def allocate(self, num_slots: int) -> TorchCache:
        """See Backend.allocate."""
        sizes = self._decoder.sizes

        def zeros(length: int) -> list[Tensor]:
            shape, dtype = (num_slots, sizes.num_heads, length, sizes.head_width), self._decoder.weights_type
            return [torch.zeros(shape, device=self._device, dtype=dtype) for _ in range(2 * sizes.num_layers)]

        positions = sizes.encoder_positions + sum(len(ids) for ids in self._task)
        return TorchCache(zeros(positions), zeros(0), zeros(0))

    def admit(self, cache: TorchCache, slot: int, encoded: list[Tensor], image: int) -> None:
        """See Backend.admit."""
        with torch.inference_mode():
            for cached, new in zip(cache.cross, encoded, strict=True):
                cached[slot] = new[image]

    def step(self, cache: TorchCache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step."""
        fed = (getattr(inputs, name) for name in STEP_INPUTS)
        with torch.inference_mode():
            scores, ids, *cache.recent = self._decoder(
                *(torch.from_numpy(array).to(self._device) for array in fed),
                torch.tensor(inputs.num_candidates),  # 0-dimensional: only such CPU tensors combine with CUDA tensors
                cache.cross,
                cache.settled,
                cache.recent,
            )
        return scores.cpu().numpy(), ids.cpu().numpy()

    def regroup(self, cache: TorchCache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        rows, positions = (torch.from_numpy(array).to(self._device) for array in (slots, columns))
        with torch.inference_mode():
            if not np.array_equal(slots, np.arange(len(cache.cross[0]))):
                for i, pair in enumerate(cache.cross):  # one at a time: copies of all of them may not fit on a GPU
                    cache.cross[i] = pair[rows]
            cache.settled = [
                torch.cat([old, new], 2)[rows].take_along_dim(positions[:, None, :, None], 2)
                for old, new in zip(cache.settled, cache.recent, strict=True)
            ]
            cache.recent = [old[rows, :, :0] for old in cache.recent]


def search_of(model: PreTrainedModel, options: DecodeOptions, prompt: tuple[int, ...] = ()) -> Search:
    """Resolve options for a model without a bundle. Captions start with the start token and the ids
    `prompt`.

    The length limit is reduced to the number of the model's positions. Raises UsageError for bad_words, because there
    is no tokenizer here.
    """
    if options.bad_words:
        raise UsageError("bad_words needs a tokenizer, which is not available here: pass bad_words_ids")
    sizes = family_of(model).sizes(model.config)
    longest = sizes.max_positions
    if options.max_total_length(1 + len(prompt)) > longest > 1 + len(prompt):
        options = replace(options, max_new_tokens=longest - 1 - len(prompt))
    return resolve_search(
        options,
        prompt=(sizes.tokens.bos, *prompt),
        eos=sizes.tokens.eos,
        vocab_size=sizes.vocab_size,
        max_positions=longest,
    )


@contextmanager
def captioning(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into eval mode, and restore its previous mode at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def caption_live(
    model: PreTrainedModel,
    processor: ImageProcessor,
    images: Iterable[tuple[Key, NDArray[np.uint8]]],
    options: DecodeOptions,
    prompts: Mapping[Key, tuple[int, ...]] | None = None,
    task_ids: Sequence[int] = (),
) -> Iterator[tuple[Key, list[Hypothesis]]]:
    """Caption (key, pixels u8[height,width,3]) with the current weights; yield (key, hypotheses) as Scheduler.run does.

    `prompts` are the ids that follow the start token in some images' captions; the hypotheses include them. Consume the
    iterator to its end before the weights change, because the model stays in eval mode until then.
    """
    backend, search = TorchBackend(model, processor, task_ids), search_of(model, options)
    starts = {prompt: search_of(model, options, prompt).start for prompt in {(), *(prompts or {}).values()}}
    search = replace(search, max_length=max(start.max_length for start in starts.values()))
    slots = max(1, backend.batch_sizes.rows // search.num_beams)
    scheduler = Scheduler(backend, search, num_slots=slots, encode_batch=backend.batch_sizes.encode_batch)
    queue = (Request(key, pixels, starts[(prompts or {}).get(key, ())]) for key, pixels in images)
    with captioning(model):
        for closed in scheduler.steps(queue):
            yield from closed

"""Image-caption batches for BLIP, with the targets generation needs, in an order that a resumed run repeats.

Knows nothing of optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from engine.inputs.depth import CLIP
from engine.inputs.pixels import read_image
from export.checkpoints.releases import BlipImageProcessor
from train.data.augment import AUGMENTATIONS
from train.data.dataset import Example

IGNORED = -100
"""Label that torch's cross entropy skips (torch.nn.CrossEntropyLoss, ignore_index)."""

EpochIndex = tuple[int, int]
"""An epoch and an index into the data set; an index past its end is a blank, which no loss sees."""


@dataclass(frozen=True)
class PixelSpec:
    """What an image becomes: its size in px, Pillow's filter by name, the processor's normalisation, and how more than
    8 bits a channel are read (engine/inputs/depth.py).
    """

    size: int
    resample: str
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    depth: str = CLIP

    @classmethod
    def of(cls, processor: BlipImageProcessor, depth: str = CLIP) -> PixelSpec:
        """Take over a slow image processor's settings."""
        resample = Image.Resampling(processor.resample).name.lower()
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        return cls(processor.size["height"], resample, processor.rescale_factor, mean, std, depth)

    def read(self, source: object) -> NDArray[np.uint8]:
        """Return u8[size,size,3]; see engine.inputs.pixels.read_image."""
        return read_image(source, self.size, self.size, self.resample, depth=self.depth)  # type: ignore[arg-type]

    def normalise(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """Return f32[3,size,size] of u8[size,size,3], as BlipImageProcessor computes it."""
        scaled = pixels.astype(np.float64) * self.rescale
        normal = (scaled.astype(np.float32) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))


Item = dict[str, torch.Tensor | str | None]


class Pictures(Dataset[Item]):
    """Image-caption pairs read from disk; `augmentation` draws from a generator of its own for every place."""

    def __init__(self, examples: Sequence[Example], spec: PixelSpec, *, augmentation: str = "none", seed: int = 0):
        self.examples, self.spec, self.seed = examples, spec, seed
        self._augment = AUGMENTATIONS[augmentation]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: EpochIndex) -> Item:
        """Return pixel_values f32[3,size,size] and the caption, None for a blank. Raises ImageError."""
        pixels, caption = self.pixels(place)
        if caption is None:
            return {"pixel_values": torch.zeros(3, self.spec.size, self.spec.size), "caption": None}
        return {"pixel_values": self.spec.normalise(pixels), "caption": caption}

    def pixels(self, place: EpochIndex) -> tuple[NDArray[np.uint8], str | None]:
        """Return u8[size,size,3] and the caption; zeros and None for a blank. Raises ImageError."""
        epoch, index = place
        if index >= len(self.examples):
            return np.zeros((self.spec.size, self.spec.size, 3), np.uint8), None
        example = self.examples[index]
        pixels = self.spec.read(example.image)
        if self._augment is not None:
            pixels = self._augment(pixels, np.random.default_rng([self.seed, epoch, index]))
        return pixels, example.caption


class Features(Dataset[Item]):
    """Pairs of a frozen encoder's output f16[N,S,D], kept in memory, and captions."""

    def __init__(self, features: torch.Tensor, captions: Sequence[str]) -> None:
        self.features, self.captions = features, captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, place: EpochIndex) -> Item:
        """Return encoder_hidden_states f32[S,D] and the caption, None for a blank."""
        _, index = place
        if index >= len(self.captions):
            return {"encoder_hidden_states": torch.zeros_like(self.features[0]).float(), "caption": None}
        return {"encoder_hidden_states": self.features[index].float(), "caption": self.captions[index]}


class EpochOrder(Sampler[EpochIndex]):
    """Every index once an epoch, in an order that only the seed and the epoch decide; blanks fill the last batch.

    So a resumed run sees the same batches, and processes that share a batch need neither drop nor repeat an image to
    get equal parts.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self.padded = -(-count // batch_size) * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.padded

    def __iter__(self) -> Iterator[EpochIndex]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        yield from ((self.epoch, int(index)) for index in order)
        yield from ((self.epoch, index) for index in range(self.count, self.padded))


def collate_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str | None], bos_token_id: int, max_tokens: int = 200
) -> dict[str, torch.Tensor]:
    """Tokenise captions into input_ids, attention_mask and labels, each i64[B,L]; None is a blank without targets.

    Two traps of Hugging Face's BLIP are avoided here: sequences from the processor start with [CLS] while
    generation starts with [DEC] (`bos_token_id`), and its loss does not mask padding; so the first id is [DEC], and
    padded labels are IGNORED. BlipTextLMHeadModel shifts the labels itself, so the first one is never a target: it is
    IGNORED, too, which makes the labels that count as many as the terms of the loss.
    """
    texts = [caption or "" for caption in captions]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    input_ids[:, 0] = bos_token_id
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, 0] = IGNORED
    labels[[caption is None for caption in captions]] = IGNORED
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class Collator:
    """Makes a batch of what Pictures or Features hold."""

    tokenizer: PreTrainedTokenizerBase
    bos_token_id: int
    max_tokens: int

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Return the stacked tensors with input_ids, attention_mask and labels."""
        stacked = {
            name: torch.stack([item[name] for item in items])  # type: ignore[misc]
            for name in items[0]
            if name != "caption"
        }
        captions = [item["caption"] for item in items]
        return stacked | collate_captions(self.tokenizer, captions, self.bos_token_id, self.max_tokens)  # type: ignore[arg-type]

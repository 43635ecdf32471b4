"""Datasets, augmentation, sampler and collator: turn captioned images into training batches.

The augmentation must keep a radiology caption true. It does not flip, because captions name left and right. It does not
shift colours, and it does not crop, because a crop could cut off what the caption names.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch.utils.data import Dataset, Sampler, get_worker_info
from transformers import PreTrainedTokenizerBase

from engine.errors import DataError, ImageError, UsageError
from engine.inputs.ids import join_some, shown
from engine.inputs.pixels import read_image
from engine.options import CLIP
from export.families.modules import ImageProcessor
from export.reference.huggingface import normalisation
from train.data.examples import ACCENTS, WORDS, Example

MAX_DEGREES, MAX_SHIFT, MAX_ZOOM = 7.0, 0.04, 0.06
"""Largest rotation in degrees, shift (fraction of width and height) and zoom about the centre. They imitate the
differences between patients and scanners.
"""
GAMMA, CONTRAST, MAX_BLUR_PX = (0.8, 1.25), (0.9, 1.1), 0.8
"""Ranges of gamma and of contrast about the mean, and the largest Gaussian blur in px. They imitate different window
settings and displays.
"""


def radiology(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a copy of u8[h,w,3] with a small random rotation, shift, zoom, blur and change of gamma and contrast."""
    height, width = pixels.shape[:2]
    angle = np.deg2rad(rng.uniform(-MAX_DEGREES, MAX_DEGREES))
    scale = 1 / (1 + rng.uniform(-MAX_ZOOM, MAX_ZOOM))
    shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * (width, height)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.array([width, height]) / 2
    offset = centre - turn @ (centre + shift)
    matrix = (*turn[0], offset[0], *turn[1], offset[1])
    # The corner pixel is background in radiology images, black or white: fill the uncovered border with it.
    corner = tuple(int(value) for value in pixels[0, 0])
    image = Image.fromarray(pixels).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=corner
    )
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, MAX_BLUR_PX)))
    values = np.asarray(image, np.float32) / 255
    values = values ** rng.uniform(*GAMMA)
    values = (values - values.mean()) * rng.uniform(*CONTRAST) + values.mean()
    return np.asarray(np.clip(values * 255 + 0.5, 0, 255), np.uint8)


Augmentation = Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]
AUGMENTATIONS: dict[str, Augmentation | None] = {"none": None, "radiology": radiology}


AROUND = 3
"""Tokens that need room in addition to the prompt: [DEC], one word and [SEP]."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Return the token ids that follow [DEC] for a prompt, () if it is empty, as CaptionTokenizer.prompt_ids does."""
    return tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else ()


def lost_in_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return what a text loses when it is tokenized: WORDS, ACCENTS or "" (nothing).

    WORDS: the vocabulary cannot spell a part of the text. ACCENTS: decoding returns other letters than the text has.
    Case and white space are ignored.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        return WORDS
    if text.isascii():
        return ""
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return "" if _letters(text) == _letters(decoded) else ACCENTS


def _letters(text: str) -> str:
    """Return the letters of a text and their combining marks, case-folded and in NFC."""
    folded = unicodedata.normalize("NFC", text.casefold())
    return "".join(char for char in folded if unicodedata.category(char)[0] in "LM")


def check_fit(
    examples: Iterable[Example], captions_file: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    """Check that every prompt can be trained with.

    Raises DataError if a prompt contains a special token of the tokenizer, and UsageError if a prompt leaves no room
    for a caption within `max_tokens` tokens, [DEC] and [SEP] included.
    """
    special = {tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    too_long: dict[str, int] = {}
    for example in examples:
        ids = prompt_ids(tokenizer, example.prompt)
        if special.intersection(ids):
            raise DataError(
                f"{captions_file}: the prompt of {shown(example.id)} contains a special token of the tokenizer: "
                f"{example.prompt}"
            )
        if len(ids) + AROUND > max_tokens:
            too_long[example.id] = len(ids)
    if too_long:
        raise UsageError(
            f"{captions_file}: prompts of up to {max(too_long.values())} tokens leave no room for a caption within "
            f"{max_tokens} ({join_some(too_long, 3)}): shorten them, or raise max_tokens if the checkpoint allows it"
        )


IGNORED = -100
"""Label that torch's cross entropy skips (`ignore_index` of torch.nn.CrossEntropyLoss)."""

EpochIndex = tuple[int, int]
"""An epoch and an index into the data set. An index past the end is a blank: it pads the batch and adds no loss."""


@dataclass(frozen=True)
class PixelSpec:
    """How images are preprocessed.

    `size` in px (square), `resample` as the name of a Pillow filter, the image processor's normalisation (`rescale`,
    `mean`, `std`), and `depth`: how images with more than 8 bits per channel are read (engine/inputs/pixels.py).
    """

    size: int
    resample: str
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    depth: str = CLIP

    @classmethod
    def of(cls, processor: ImageProcessor, depth: str = CLIP) -> PixelSpec:
        """Return the settings of a slow image processor. Uses the same function as the exported graphs."""
        resample = Image.Resampling(processor.resample).name.lower()
        rescale, mean, std = normalisation(processor)
        return cls(processor.size["height"], resample, rescale, tuple(mean), tuple(std), depth)

    def read(self, source: object) -> NDArray[np.uint8]:
        """Return u8[size,size,3]; see engine.inputs.pixels.read_image.

        Raises ImageError, also if the image needs more memory than is free.
        """
        try:
            return read_image(source, self.size, self.size, self.resample, depth=self.depth)  # type: ignore[arg-type]
        except MemoryError as error:
            raise ImageError(str(source), "needs more memory than is free: remove this image or shrink it") from error

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Convert u8[B,size,size,3] to f32[B,3,size,size] on the same device, as BlipImageProcessor does."""
        scaled = (pixels.double() * self.rescale).float()
        mean, std = (torch.tensor(values, device=pixels.device) for values in (self.mean, self.std))
        return ((scaled - mean) / std).permute(0, 3, 1, 2).contiguous()


Item = dict[str, torch.Tensor | str | None]
TEXTS = ("caption", "prompt")
"""Keys of an item that are not tensors: the caption (None for a blank) and the prompt before it (may be empty)."""


class Pictures(Dataset[Item]):
    """Image-caption pairs read from disk.

    `augmentation` is a key of AUGMENTATIONS. Every (epoch, index) seeds a separate generator, so an item does not
    depend on the order in which items are read.
    """

    def __init__(self, examples: Sequence[Example], spec: PixelSpec, *, augmentation: str = "none", seed: int = 0):
        self.examples, self.spec, self.seed = examples, spec, seed
        self._augment = AUGMENTATIONS[augmentation]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: EpochIndex) -> Item:
        """Return pixels u8[size,size,3], caption and prompt (TEXTS). Raises ImageError.

        The pixels are normalised later, on the model's device. As u8, a batch takes a quarter of the shared memory, and
        containers have little of it.
        """
        epoch, index = position
        if index >= len(self.examples):
            return {"pixels": torch.zeros(self.spec.size, self.spec.size, 3, dtype=torch.uint8)} | texts_of(None)
        example = self.examples[index]
        pixels = self.spec.read(example.image)
        if self._augment is not None:
            pixels = self._augment(pixels, np.random.default_rng([self.seed, epoch, index]))
        return {"pixels": torch.tensor(pixels)} | texts_of(example)


class Features(Dataset[Item]):
    """The output f16[N,S,D] of a frozen encoder, kept in memory, and the N examples it was computed from."""

    def __init__(self, features: torch.Tensor, examples: Sequence[Example]) -> None:
        self.features, self.examples = features, examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: EpochIndex) -> Item:
        """Return encoder_hidden_states f32[S,D], caption and prompt (TEXTS)."""
        _, index = position
        if index >= len(self.examples):
            return {"encoder_hidden_states": torch.zeros_like(self.features[0]).float()} | texts_of(None)
        return {"encoder_hidden_states": self.features[index].float()} | texts_of(self.examples[index])


def texts_of(example: Example | None) -> Item:
    """Return the caption and prompt (TEXTS) of an example; None stands for padding."""
    caption, prompt = (None, "") if example is None else (example.caption, example.prompt)
    return {"caption": caption, "prompt": prompt}


class EpochOrder(Sampler[EpochIndex]):
    """Sampler that yields every index once per epoch and pads the last batch with empty examples.

    The order depends only on the seed and the epoch, so a resumed run sees the same batches. Because of the padding,
    processes that share a batch get equal parts without dropping or repeating an image.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self.padded = -(-count // batch_size) * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The Trainer calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.padded

    def __iter__(self) -> Iterator[EpochIndex]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        yield from ((self.epoch, int(index)) for index in order)
        yield from ((self.epoch, index) for index in range(self.count, self.padded))


def collate_captions(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str | None],
    bos_token_id: int,
    max_tokens: int = 200,
    prompts: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Tokenize captions into input_ids, attention_mask and labels, each i64[B,L].

    A caption of None is a blank, which has no targets. `prompts` holds one prompt per caption, '' for no prompt. A row
    is then [DEC] prompt caption [SEP], the order in which captions are generated after prompts. If a row is longer than
    `max_tokens`, its caption is cut. The prompt is given to the model and not learned: its labels are IGNORED.

    This avoids two traps of Hugging Face's BLIP. Sequences from the processor start with [CLS], while generation starts
    with [DEC] (`bos_token_id`): here the first id is [DEC]. And its loss does not mask padding: here padded labels are
    IGNORED. BlipTextLMHeadModel shifts the labels itself, so the first label is never a target. It is IGNORED as well,
    so that the number of labels other than IGNORED is the number of terms in the loss.
    """
    texts = [caption or "" for caption in captions]
    prefixes = [prompt_ids(tokenizer, prompt) for prompt in prompts] or [()] * len(texts)
    rows = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    # row[1:-1] drops the tokenizer's [CLS] and [SEP]; row[-1] is [SEP].
    rows = [
        [bos_token_id, *ids, *row[1:-1][: max_tokens - 2 - len(ids)], row[-1]]
        for ids, row in zip(prefixes, rows, strict=True)
    ]
    input_ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, (ids, row, caption) in enumerate(zip(prefixes, rows, captions, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
        if caption is not None:
            start = 1 + len(ids)  # after [DEC] and the prompt
            labels[i, start : len(row)] = input_ids[i, start : len(row)]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class Collator:
    """Collate function of a DataLoader over Pictures or Features."""

    tokenizer: PreTrainedTokenizerBase
    bos_token_id: int
    max_tokens: int

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Return the stacked tensors with input_ids, attention_mask and labels.

        In a DataLoader worker the tensors are moved to shared memory here, where an error reaches the trainer. torch
        would move them in a thread whose errors are only printed, and the trainer would wait forever.
        """
        stacked = {
            name: torch.stack([item[name] for item in items])  # type: ignore[misc]
            for name in items[0]
            if name not in TEXTS
        }
        captions, prompts = ([item[name] for item in items] for name in TEXTS)
        batch = stacked | collate_captions(self.tokenizer, captions, self.bos_token_id, self.max_tokens, prompts)  # type: ignore[arg-type]
        if get_worker_info() is not None:
            for tensor in batch.values():
                tensor.share_memory_()
        return batch

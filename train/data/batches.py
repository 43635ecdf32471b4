"""Augmentation that keeps a radiology caption true; knows nothing of models.

No flips: left and right are in the captions. No colour shifts, no crops that could cut off what a caption names.
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
from engine.inputs.pixels import CLIP, read_image
from export.checkpoints.files import BlipImageProcessor
from export.reference.huggingface import normalisation
from train.data.dataset import Example
from train.data.problems import ACCENTS, WORDS

MAX_DEGREES, MAX_SHIFT, MAX_ZOOM = 7.0, 0.04, 0.06
"""Rotation, shift (share of the width) and zoom about the centre: how patients and scanners differ."""
GAMMA, CONTRAST, MAX_BLUR_PX = (0.8, 1.25), (0.9, 1.1), 0.8
"""Window and display differ: gamma, contrast about the mean, and a Gaussian blur in px."""


def radiology(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return u8[h,w,3] a little turned, shifted, zoomed, blurred and windowed differently."""
    height, width = pixels.shape[:2]
    angle = np.deg2rad(rng.uniform(-MAX_DEGREES, MAX_DEGREES))
    scale = 1 / (1 + rng.uniform(-MAX_ZOOM, MAX_ZOOM))
    shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * (width, height)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.array([width, height]) / 2
    offset = centre - turn @ (centre + shift)
    matrix = (*turn[0], offset[0], *turn[1], offset[1])
    corner = tuple(int(value) for value in pixels[0, 0])  # the background, black or white
    picture = Image.fromarray(pixels).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=corner
    )
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, MAX_BLUR_PX)))
    values = np.asarray(picture, np.float32) / 255
    values = values ** rng.uniform(*GAMMA)
    values = (values - values.mean()) * rng.uniform(*CONTRAST) + values.mean()
    return np.asarray(np.clip(values * 255 + 0.5, 0, 255), np.uint8)


Augmentation = Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]
AUGMENTATIONS: dict[str, Augmentation | None] = {"none": None, "radiology": radiology}


AROUND = 3
"""Tokens that need room beside a prompt: [DEC], one word and [SEP]."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Return the ids of a prompt behind [DEC], none for an empty one; as CaptionTokenizer.prompt_ids has them."""
    return tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else ()


def lost_in_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return what a text loses in the tokenizer: WORDS where the vocabulary cannot spell some of it, else ACCENTS where
    letters come back as others, else nothing. Case and white space do not count.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        return WORDS
    if text.isascii():
        return ""
    kept = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return "" if _letters(text) == _letters(kept) else ACCENTS


def _letters(text: str) -> str:
    """Return the letters of a text and their marks, in lower case."""
    folded = unicodedata.normalize("NFC", text.casefold())
    return "".join(one for one in folded if unicodedata.category(one)[0] in "LM")


def check_fit(
    examples: Iterable[Example], captions_file: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    """Refuse what the model could not be told: prompts that spell a special token of the tokenizer (DataError), or
    that leave no room for a caption within `max_tokens` tokens, [DEC] and [SEP] included (UsageError).
    """
    special = {tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    long: dict[str, int] = {}
    for example in examples:
        ids = prompt_ids(tokenizer, example.prompt)
        if special.intersection(ids):
            raise DataError(
                f"{captions_file}: the prompt of {shown(example.id)} spells a special token of the tokenizer: "
                f"{example.prompt}"
            )
        if len(ids) + AROUND > max_tokens:
            long[example.id] = len(ids)
    if long:
        raise UsageError(
            f"{captions_file}: prompts of up to {max(long.values())} tokens leave no room for a caption within "
            f"{max_tokens} ({join_some(long, 3)}): shorten them, or raise max_tokens if the checkpoint allows it"
        )


IGNORED = -100
"""Label that torch's cross entropy skips (torch.nn.CrossEntropyLoss, ignore_index)."""

EpochIndex = tuple[int, int]
"""An epoch and an index into the data set; an index past its end is a blank, which no loss sees."""


@dataclass(frozen=True)
class PixelSpec:
    """What an image becomes: its size in px, Pillow's filter by name, the processor's normalisation, and how more than
    8 bits a channel are read (engine/inputs/pixels.py).
    """

    size: int
    resample: str
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    depth: str = CLIP

    @classmethod
    def of(cls, processor: BlipImageProcessor, depth: str = CLIP) -> PixelSpec:
        """Take over a slow image processor's settings, by the function that the exported graphs use, too."""
        resample = Image.Resampling(processor.resample).name.lower()
        rescale, mean, std = normalisation(processor)
        return cls(processor.size["height"], resample, rescale, tuple(mean), tuple(std), depth)

    def read(self, source: object) -> NDArray[np.uint8]:
        """Return u8[size,size,3]; see engine.inputs.pixels.read_image. Raises ImageError, also without the memory."""
        try:
            return read_image(source, self.size, self.size, self.resample, depth=self.depth)  # type: ignore[arg-type]
        except MemoryError as error:
            raise ImageError(str(source), "needs more memory than is free: remove this image or shrink it") from error

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return f32[B,3,size,size] of u8[B,size,size,3] on its device, as BlipImageProcessor computes it."""
        scaled = (pixels.double() * self.rescale).float()
        mean, std = (torch.tensor(values, device=pixels.device) for values in (self.mean, self.std))
        return ((scaled - mean) / std).permute(0, 3, 1, 2).contiguous()


Item = dict[str, torch.Tensor | str | None]
TEXTS = ("caption", "prompt")
"""What an item holds beside tensors: a caption, None for a blank, and the prompt in front of it, which may be empty."""


class Pictures(Dataset[Item]):
    """Image-caption pairs read from disk; `augmentation` draws from a generator of its own for every place."""

    def __init__(self, examples: Sequence[Example], spec: PixelSpec, *, augmentation: str = "none", seed: int = 0):
        self.examples, self.spec, self.seed = examples, spec, seed
        self._augment = AUGMENTATIONS[augmentation]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: EpochIndex) -> Item:
        """Return pixels u8[size,size,3], caption and prompt, TEXTS. Raises ImageError.

        They are normalised on the model's device: so a batch takes a quarter of the shared memory, of which containers
        have little.
        """
        pixels, example = self.pixels(place)
        return {"pixels": torch.tensor(pixels)} | texts_of(example)

    def pixels(self, place: EpochIndex) -> tuple[NDArray[np.uint8], Example | None]:
        """Return u8[size,size,3] and the example; zeros and None for a blank. Raises ImageError."""
        epoch, index = place
        if index >= len(self.examples):
            return np.zeros((self.spec.size, self.spec.size, 3), np.uint8), None
        example = self.examples[index]
        pixels = self.spec.read(example.image)
        if self._augment is not None:
            pixels = self._augment(pixels, np.random.default_rng([self.seed, epoch, index]))
        return pixels, example


class Features(Dataset[Item]):
    """A frozen encoder's output f16[N,S,D], kept in memory, with the examples it is of."""

    def __init__(self, features: torch.Tensor, examples: Sequence[Example]) -> None:
        self.features, self.examples = features, examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: EpochIndex) -> Item:
        """Return encoder_hidden_states f32[S,D], caption and prompt, TEXTS."""
        _, index = place
        if index >= len(self.examples):
            return {"encoder_hidden_states": torch.zeros_like(self.features[0]).float()} | texts_of(None)
        return {"encoder_hidden_states": self.features[index].float()} | texts_of(self.examples[index])


def texts_of(example: Example | None) -> Item:
    """Return TEXTS of an example, of a blank for None."""
    caption, prompt = (None, "") if example is None else (example.caption, example.prompt)
    return {"caption": caption, "prompt": prompt}


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
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str | None],
    bos_token_id: int,
    max_tokens: int = 200,
    prompts: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Tokenise captions into input_ids, attention_mask and labels, each i64[B,L]; None is a blank without targets.

    With `prompts`, one a caption or '', a row is [DEC] prompt caption [SEP], as captions are generated behind prompts;
    of a longer one than `max_tokens` the caption is cut. A prompt is told, not learned: its labels are IGNORED.

    Two traps of Hugging Face's BLIP are avoided here: sequences from the processor start with [CLS] while
    generation starts with [DEC] (`bos_token_id`), and its loss does not mask padding; so the first id is [DEC], and
    padded labels are IGNORED. BlipTextLMHeadModel shifts the labels itself, so the first one is never a target: it is
    IGNORED, too, which makes the labels that count as many as the terms of the loss.
    """
    texts = [caption or "" for caption in captions]
    before = [prompt_ids(tokenizer, prompt) for prompt in prompts] or [()] * len(texts)
    rows = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    rows = [
        [bos_token_id, *ids, *row[1:-1][: max_tokens - 2 - len(ids)], row[-1]]
        for ids, row in zip(before, rows, strict=True)
    ]
    input_ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, (ids, row, caption) in enumerate(zip(before, rows, captions, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
        if caption is not None:
            told = 1 + len(ids)
            labels[i, told : len(row)] = input_ids[i, told : len(row)]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class Collator:
    """Makes a batch of what Pictures or Features hold."""

    tokenizer: PreTrainedTokenizerBase
    bos_token_id: int
    max_tokens: int

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Return the stacked tensors with input_ids, attention_mask and labels.

        In a process of a DataLoader they are moved to shared memory here, where an error reaches the trainer. torch
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

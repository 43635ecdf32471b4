"""CLIPScore and RefCLIPScore (Hessel et al. 2021): own lines over transformers' CLIPModel and a folder of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.inputs.depth import CLIP
from engine.inputs.notes import ImageNote, note_lines
from engine.inputs.pixels import decode_image
from engine.scoring.base import Items, Measured, MetricInputs, UnavailableError, library, mean
from engine.scoring.neural import fingerprint, import_library, quiet, weights_folder, whole

WANTED = "openai/clip-vit-base-patch32"
PREFIX = "A photo depicts "
WEIGHT = 2.5
TOKENS = 77
"""Prefix, weight and length of the paper's own code."""


@dataclass(frozen=True)
class _Pixels:
    """Which images are read, and how: the frame of DICOM files, and what becomes of more than 8 bits a channel."""

    paths: tuple[Path, ...]
    frame: int
    depth: str


class ClipScore:
    """2.5 * max(cos(image, "A photo depicts " + caption), 0), mean over images; captions as they are.

    Images are read as a run reads them: frame number `frame` of DICOM files, more than 8 bits a channel as `depth` says
    (engine/inputs/depth.py).
    """

    name = "clipscore"

    def __init__(self, setting: MetricInputs, *, frame: int = 0, depth: str = CLIP) -> None:
        self._setting, self._frame, self._depth = setting, frame, depth

    def signature(self) -> str:
        directory = weights_folder(self._setting, "clipscore", WANTED)
        pixels = f"|dicom-frame:{self._frame}" if self._frame else ""
        pixels += f"|high-bit-depth:{self._depth}" if self._depth != CLIP else ""
        return f"{self.name}|model:{fingerprint(directory)}|w:{WEIGHT}|text:raw{pixels}|{library('transformers')}"

    def measure(self, items: Items) -> Measured:
        image, text, note = self._features(items)
        return mean(clip_scores(image, text), note)

    def _features(self, items: Items) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
        """Return unit vectors f64[N,D] of the images and of the captions, and a note on the images."""
        if items.images is None:
            raise UnavailableError("needs the images: --images DIR")
        model = self._model()
        image, notes = model.image_features(_Pixels(tuple(items.images), self._frame, self._depth))
        return image, model.text_features(tuple(items.candidates)), ". ".join(note_lines(notes))

    def _model(self) -> _Clip:
        directory = weights_folder(self._setting, "clipscore", WANTED)
        return _load(str(directory), self._setting.device, self._setting.batch_size)


class _Clip:
    """The model, and the vectors of the images it read last: two metrics ask for the same."""

    def __init__(self, directory: str, device: str | None, batch_size: int) -> None:
        self._torch, transformers = import_library("torch"), import_library("transformers")
        self._device = device or ("cuda" if self._torch.cuda.is_available() else "cpu")
        self._batch_size = batch_size
        with whole(Path(directory)):
            self._model = transformers.CLIPModel.from_pretrained(directory).eval().to(self._device)
        with quiet():
            self._processor = transformers.CLIPProcessor.from_pretrained(directory)
        self._images: tuple[_Pixels, NDArray[np.float64], list[ImageNote]] | None = None

    def image_features(self, pixels: _Pixels) -> tuple[NDArray[np.float64], list[ImageNote]]:
        """Return unit vectors f64[N,D] of images, and notes of what reading dropped from them."""
        if self._images is None or self._images[0] != pixels:
            notes: list[ImageNote] = []

            def encode(paths: list[Path]) -> Any:
                images = [decode_image(path, frame=pixels.frame, depth=pixels.depth, notes=notes) for path in paths]
                return self._encode_images(images)

            self._images = pixels, self._in_batches(pixels.paths, encode), notes
        return self._images[1:]

    def text_features(self, captions: tuple[str, ...]) -> NDArray[np.float64]:
        """Return unit vectors f64[N,D] of captions."""
        return self._in_batches(captions, self._encode_texts)

    def _in_batches(self, values: Sequence[Any], features: Any) -> NDArray[np.float64]:
        parts = []
        with self._torch.inference_mode():
            for start in range(0, len(values), self._batch_size):
                part = features(list(values[start : start + self._batch_size])).double().cpu().numpy()
                parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
        return np.concatenate(parts)

    def _encode_images(self, images: list[Any]) -> Any:
        inputs = self._processor(images=images, return_tensors="pt").to(self._device)
        return self._model.get_image_features(**inputs)

    def _encode_texts(self, captions: list[str]) -> Any:
        inputs = self._processor(
            text=[PREFIX + caption for caption in captions],
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(self._device)
        return self._model.get_text_features(**inputs)


_load = lru_cache(maxsize=1)(_Clip)


class RefClipScore(ClipScore):
    """Harmonic mean of CLIPScore and the best cosine of caption and reference (below 0 counted as 0)."""

    name = "refclipscore"

    def measure(self, items: Items) -> Measured:
        image, text, note = self._features(items)
        places = [i for i, several in enumerate(items.references) for _ in several]
        references = self._model().text_features(tuple(_flat(items.references)))
        closest = np.zeros(len(items))
        np.maximum.at(closest, places, (text[places] * references).sum(1))
        return mean(harmonic(clip_scores(image, text), closest), note)


def clip_scores(image: NDArray[np.float64], text: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 2.5 * max(cos, 0) of unit vectors f64[N,D]."""
    return np.asarray(WEIGHT * np.maximum((image * text).sum(1), 0.0))


def harmonic(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the harmonic means of two arrays f64[N] of numbers from 0; 0 where both are."""
    total = first + second
    return np.divide(2 * first * second, total, out=np.zeros_like(total), where=total > 0)


def _flat(several: Sequence[tuple[str, ...]]) -> Iterator[str]:
    for references in several:
        yield from references

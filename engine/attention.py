"""Attention maps of captions: which words a caption's tokens belong to, the .npz files, and how maps are drawn."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from engine.captions import Attention
from engine.errors import DataError, OutputError, UsageError
from engine.files.atomic import LONGEST_NAME, replace_file
from engine.inputs.kinds import open_regular
from engine.inputs.pixels import resized_size

SUFFIX = ".npz"
ARRAYS = ("tokens", "grid", "maps", "layers", "words", "word_of", "crop")
"""The arrays of a file: fields of Attention, and `grid` i64[2], the rows and columns of its maps."""
MOST_CROPPED = 8
"""Largest ratio of the sizes of a crop: no file may make a picture grow without limit."""
MAX_BYTES = 1 << 26
"""Far above any file: 512 tokens over a grid of 64 x 64 take 4 MB."""


def words_of(ids: Sequence[int], text_of: Callable[[Sequence[int]], str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the words of a caption, split at white space, and for each id the index of its word; -1 for special ids.

    `text_of` turns the first ids of the caption into text. So this works for every kind of tokenizer, and punctuation
    that the text has no space before belongs to the word that it follows.
    """
    words = tuple(text_of(ids).split())
    counts, belongs, before = [], [], ""
    for end in range(1, len(ids) + 1):
        text = text_of(ids[:end])
        counts.append(len(text.split()))
        belongs.append(text != before)
        before = text
    # later ids may join words, as the hyphen and "weighted" after "t2" do
    joined = np.minimum.accumulate(np.array([*counts, len(words)])[::-1])[::-1][:-1] - 1
    return words, tuple(int(word) if is_text else -1 for word, is_text in zip(joined, belongs, strict=True))


def word_maps(attention: Attention) -> list[tuple[str, NDArray[np.float32]]]:
    """Return each word that has tokens with the mean f32[rows,columns] of their maps."""
    maps, word_of = attention.maps.astype(np.float32), np.array(attention.word_of)
    return [(word, maps[word_of == index].mean(0)) for index, word in enumerate(attention.words) if index in word_of]


def attention_path(folder: Path, image_id: str) -> Path:
    """Return where the attention of an image is: `folder`/ID.npz. Raises UsageError for an id that is not a file name.

    An id that is a path, as with `--ids path`, has subfolders.
    """
    path = PurePath(image_id)
    name = f"{image_id}{SUFFIX}"
    is_inside = not path.is_absolute() and ".." not in path.parts and path.parts and "\0" not in image_id
    if not is_inside or image_id.endswith("/") or len(os.fsencode(PurePath(name).name)) > LONGEST_NAME:
        raise UsageError(f"the id {image_id!r} is not a file name for --attention: rename the image")
    return folder / name


def write_attention(path: Path, attention: Attention) -> None:
    """Write a file atomically. Raises OutputError, also for an existing file that is not of this kind."""
    if os.path.lexists(path) and not _is_own(path):
        raise OutputError(f"{path} exists and is not a file of --attention: move it away, or choose another folder")
    content = io.BytesIO()
    np.savez(
        content,
        tokens=np.array(attention.tokens, np.int64),
        grid=np.array(attention.maps.shape[1:], np.int64),
        maps=attention.maps,
        layers=np.array(attention.layers, np.int64),
        words=np.array(attention.words, np.str_),
        word_of=np.array(attention.word_of, np.int64),
        crop=np.array(attention.crop, np.int64),
    )
    replace_file(path, content.getvalue(), follow=False)


def _is_own(path: Path) -> bool:
    """Return whether a file looks like one that write_attention wrote, without reading all of it."""
    try:
        with open_regular(path, MAX_BYTES, follow=False) as stream, zipfile.ZipFile(stream) as archive:
            return {f"{name}.npy" for name in ARRAYS} <= set(archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def read_attention(path: Path) -> Attention:
    """Read a file. Raises DataError if it is missing, damaged or not such a file."""
    try:
        with open_regular(path, MAX_BYTES) as stream, zipfile.ZipFile(stream) as archive:
            # the sizes that the archive itself states, before anything is unpacked
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES} bytes")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as arrays:
                return _checked({name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{path} is not a file of --attention ({error}): caption its image again") from error


def _checked(arrays: dict[str, NDArray[Any]]) -> Attention:
    """Return the content of a file. Raises ValueError or KeyError if its arrays do not fit each other."""
    maps, words = arrays["maps"], arrays["words"]
    numbers = {name: arrays[name] for name in ("tokens", "grid", "layers", "word_of", "crop")}
    if maps.dtype != np.float16 or maps.ndim != 3 or words.ndim != 1 or words.dtype.kind not in "US":
        raise ValueError("its maps or words have another type")
    if any(array.ndim != 1 or array.dtype != np.int64 for array in numbers.values()):
        raise ValueError("its numbers have another type")
    lists = {name: tuple(array.tolist()) for name, array in numbers.items()}
    count = len(lists["tokens"])
    fits = maps.shape == (count, *lists["grid"]) and maps.size and len(lists["word_of"]) == count
    if not fits or any(not -1 <= word < len(words) for word in lists["word_of"]):
        raise ValueError("its arrays have different lengths")
    if (crop := lists["crop"]) and not (len(crop) in (3, 4) and 0 < max(crop) <= MOST_CROPPED * min(crop)):
        raise ValueError("its crop is not a size")
    if not np.isfinite(maps).all() or (maps < 0).any():
        raise ValueError("its maps are not weights")
    return Attention(
        tokens=lists["tokens"],
        maps=maps,
        words=tuple(map(str, words.tolist())),
        word_of=lists["word_of"],
        layers=lists["layers"],
        crop=lists["crop"],
    )


def is_attention_of(path: Path, tokens: Sequence[int], layers: Sequence[int]) -> bool:
    """Return whether a file holds the attention of a caption with these ids, averaged over these layers."""
    try:
        found = read_attention(path)
    except DataError:
        return False
    return found.tokens == tuple(tokens) and found.layers == tuple(layers)


def seen_box(attention: Attention, width: int, height: int) -> tuple[float, float, float, float]:
    """Return the part of an image of width x height pixels that the model saw: left, top, right, bottom, 0 to 1.

    Parts of the center crop beyond a small image are below 0 or above 1.
    """
    if not attention.crop:
        return 0.0, 0.0, 1.0, 1.0
    crop_height, crop_width, *resize = attention.crop
    full_width, full_height = resized_size(width, height, crop_height, crop_width, tuple(resize))
    left, top = (full_width - crop_width) // 2, (full_height - crop_height) // 2
    return left / full_width, top / full_height, (left + crop_width) / full_width, (top + crop_height) / full_height


STOPS = ((0.0, (255, 255, 178)), (0.35, (254, 178, 76)), (0.7, (240, 59, 32)), (1.0, (189, 0, 38)))
"""Colours of low to high weights: ColorBrewer's YlOrRd, whose lightness falls evenly, so that it survives grey print
and is read with any kind of colour vision.
"""
MOST_OPAQUE = 0.72
"""Opacity of the highest weight: the image stays visible below it."""


def heat(weights: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return weights [rows,columns] as colours u8[rows,columns,4], from transparent to opaque.

    The highest weight of the map has the full colour, so that maps show where a word looks, not how much.
    """
    highest = float(weights.max())
    scaled = np.asarray(weights, np.float32) / highest if highest > 0 else np.zeros(weights.shape, np.float32)
    places = [place for place, _ in STOPS]
    channels = [np.interp(scaled, places, [colour[i] for _, colour in STOPS]) for i in range(3)]
    return np.stack([*channels, 255 * MOST_OPAQUE * scaled], -1).round().astype(np.uint8)


def overlay(image: Image.Image, attention: Attention, weights: NDArray[np.floating]) -> Image.Image:
    """Return an RGB image with a map drawn over it."""
    left, top, right, bottom = seen_box(attention, *image.size)
    width, height = image.size
    box = [round(value) for value in (left * width, top * height, right * width, bottom * height)]
    size = max(1, box[2] - box[0]), max(1, box[3] - box[1])
    colours = Image.fromarray(heat(enlarged(weights, *size)))
    layer = Image.new("RGBA", image.size)
    layer.paste(colours, (box[0], box[1]))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def enlarged(weights: NDArray[np.floating], width: int, height: int) -> NDArray[np.float32]:
    """Return a map f32[height,width], interpolated between the centers of its cells."""
    small = Image.fromarray(np.ascontiguousarray(weights, np.float32))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


PANEL = 300
"""Width and height in pixels that a panel of the overview fits into."""
MARGIN, COLUMNS, TEXT = 12, 5, 17
"""Of the overview: pixels between panels, panels per row, and size of the words in pixels."""
SIDES = (512, 2048)
"""The longest side of a picture of one word, in pixels: a small image is enlarged, a large one reduced."""


def word_pictures(image: Image.Image, attention: Attention) -> list[tuple[str, Image.Image]]:
    """Return each word with its map over the image."""
    longest = max(image.size)
    factor = min(max(longest, SIDES[0]), SIDES[1]) / longest
    if factor != 1:
        width, height = (max(1, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return [(word, overlay(image, attention, weights)) for word, weights in word_maps(attention)]


def overview(image: Image.Image, attention: Attention) -> Image.Image:
    """Return one picture for papers: the image, then each word above its map, and a scale of the colours."""
    image = image.copy()
    image.thumbnail((PANEL, PANEL), Image.Resampling.LANCZOS, reducing_gap=2.0)
    panels = [("", image), *((word, overlay(image, attention, weights)) for word, weights in word_maps(attention))]
    font = ImageFont.load_default(TEXT)
    line = 2 * TEXT
    width, height = image.width + MARGIN, image.height + line
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    page = Image.new("RGB", (columns * width + MARGIN, rows * height + line + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    for number, (word, picture) in enumerate(panels):
        left, top = MARGIN + number % columns * width, number // columns * height
        pen.text((left, top + line - TEXT // 2), _fitted(word, pen, font, image.width), "black", font, anchor="ls")
        page.paste(picture, (left, top + line))
    lowest, highest = "no weight", "highest weight of the word"
    left, base = MARGIN, page.height - MARGIN
    pen.text((left, base), lowest, "black", font, anchor="ls")
    left += round(pen.textlength(lowest, font)) + MARGIN
    colours = Image.fromarray(heat(np.linspace(0, 1, PANEL // 2, dtype=np.float32)[None].repeat(TEXT, 0)))
    page.paste(
        Image.alpha_composite(Image.new("RGBA", colours.size, "grey"), colours).convert("RGB"), (left, base - TEXT + 3)
    )
    pen.text((left + colours.width + MARGIN, base), highest, "black", font, anchor="ls")
    return page


def _fitted(word: str, pen: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """Return a word, shortened to `width` pixels."""
    if pen.textlength(word, font) <= width:
        return word
    while word and pen.textlength(f"{word}...", font) > width:
        word = word[:-1]
    return f"{word}..."

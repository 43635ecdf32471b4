"""Read a checkpoint without torch: everything that a bundle needs, with the weights read lazily.

`read_checkpoint` checks what export/checkpoints/load.py checks, and returns what export/bundle.py writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from engine.bundle.manifest import ImageSpec, ModelDims, TokenIds
from engine.checkpoints.families import ORIGINAL
from engine.checkpoints.files import read_config_file, refuse_file_of_folder, rules_at, weight_files
from engine.checkpoints.int8 import Residual
from engine.checkpoints.rules import ConvertibleRules, Rules, task_ids
from engine.checkpoints.settings import (
    ProcessorSettings,
    assumed_settings,
    configured_settings,
    generation_settings,
    ignored_settings,
    read_processor,
    refuse_unsupported,
    size_before_crop,
)
from engine.checkpoints.tokenizer import read_tokenizer
from engine.checkpoints.weights import Tensor, Transposed, Weights, open_weights
from engine.errors import CheckpointError, UsageError, counted
from engine.files.atomic import file_sha256
from engine.options import options_from


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can become a bundle.

    `shape` decides which operations its graphs have (ConvertibleRules.shape). `rescale` and the mean and std of `image`
    are those of (x * rescale - mean) / std. `tasks` are those of Bundle. `generation` are the settings that differ from
    Hugging Face's defaults, and `generation_from` says where each comes from. `tokenizer` is the text of the tokenizers
    library. `notes` are what users should know, one line each. `weights` have the names of Hugging Face's layout, and
    `residual` says how to rotate them for int8 (Rules.residual).
    """

    path: Path
    family: str
    shape: Mapping[str, int | float | str]
    model: ModelDims
    image: ImageSpec
    rescale: float
    tokens: TokenIds
    tasks: Mapping[str, tuple[int, ...]]
    generation: Mapping[str, Any]
    generation_from: Mapping[str, str]
    tokenizer: str
    clean_up_tokenization_spaces: bool
    notes: tuple[str, ...]
    weights: Weights
    residual: Residual | None
    files: tuple[Path, ...]
    sha256: Callable[[Path], str]

    @cached_property
    def description(self) -> dict[str, Any]:
        """Name, sha256 and weight files of the checkpoint, as the manifest has them. Reads the files on first use."""
        files = {path.name: self.sha256(path) for path in self.files}
        return {"name": self.path.resolve().name, "sha256": sha256_of_all(files.values()), "files": files}


def sha256_of_all(digests: Iterable[str]) -> str:
    """Return one sha256 for several files: the hash of their digests."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_checkpoint(
    path: Path, *, image_size: int | None = None, sha256: Callable[[Path], str] = file_sha256
) -> Checkpoint:
    """Read a checkpoint: a folder in Hugging Face's layout, or a `.pth` file in the authors' own.

    With `image_size` (px), the position table is resized to it. `sha256` computes the digest of a file. Weights are
    only listed here and checked for NaN when they are read. Raises CheckpointError, as export does, for what is not a
    captioning checkpoint of a known family, for settings that the engine does not support, and for weights that do not
    fit config.json.
    """
    if not path.is_file():
        return _read(path, path, image_size, sha256, {})
    refuse_file_of_folder(path)
    shapes = open_weights([path], path)
    refuse_other_models(shapes, ORIGINAL, path)
    original = ORIGINAL.convert_original({name: shapes.shape(name) for name in shapes}, path)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {"config.json": json.dumps(original.config), **original.files}.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return _read(Path(folder), path, image_size, sha256, original.names)


def _read(
    folder: Path,
    source: Path,
    image_size: int | None,
    sha256: Callable[[Path], str],
    names: Mapping[str, str],
) -> Checkpoint:
    """Read the settings in `folder` and the weights in `source`, a folder or a file whose weights have other names."""
    raw, rules = _read_config(folder, source)
    files = [source] if names else weight_files(source)
    weights = open_weights(files, source)
    if names:
        weights = Weights({new: weights.tensors[old] for old, new in names.items()}, source)
    refuse_other_models(weights, rules, source)
    weights = fitted(renamed(weights, rules), rules, raw)
    processor, sizes = read_processor(folder), rules.sizes(raw)
    if image_size is not None:
        raw = rules.resized(raw, image_size)
        sizes, old = rules.sizes(raw), sizes
        if sizes.encoder_positions != old.encoder_positions:
            table = rules.position_table
            weights.tensors[table] = ResizedTable(weights.tensors[table], sizes.encoder_positions)
    elif processor.file is not None and processor.size != (sizes.image_size,) * 2:
        height, width = processor.size
        raise CheckpointError(
            f"{source}: {processor.file.name} makes {height}x{width} px images, but the position table "
            f"({sizes.encoder_positions} rows) is for {sizes.image_size} px: pass --image-size {height} to resize it"
        )
    if max(sizes.tokens.bos, sizes.tokens.eos, sizes.tokens.pad) >= sizes.vocab_size:
        raise CheckpointError(
            f"{folder / 'config.json'}: the token ids {sizes.tokens} do not fit a vocabulary of {sizes.vocab_size}"
        )
    generation, generation_from = _read_generation(folder)
    text = read_tokenizer(folder, rules.tokenizer_class, sizes.vocab_size, rules.special_tokens)
    tokenizer = Tokenizer.from_str(text.text) if rules.tasks else None
    values = processor.values
    return Checkpoint(
        path=source,
        family=rules.model_type,
        shape=rules.shape(raw),
        model=ModelDims(**{name: getattr(sizes, name) for name in ModelDims.__dataclass_fields__}),
        image=_image_spec(processor, sizes.image_size),
        rescale=values["rescale_factor"] if values["do_rescale"] else 1.0,
        tokens=sizes.tokens,
        tasks={}
        if tokenizer is None
        else task_ids(rules, lambda one: tokenizer.encode(one, add_special_tokens=False).ids),
        generation=generation,
        generation_from=generation_from,
        tokenizer=text.text,
        clean_up_tokenization_spaces=text.clean_up_tokenization_spaces,
        notes=(*ignored_settings(folder), *assumed_settings(folder)),
        weights=weights,
        residual=rules.residual(raw),
        files=tuple(files),
        sha256=sha256,
    )


def _read_config(folder: Path, source: Path) -> tuple[Mapping[str, Any], ConvertibleRules]:
    """Return config.json and the rules of its family. Raises CheckpointError if it cannot be converted here."""
    raw, rules = read_config_file(folder), rules_at(folder)
    rules.check_config(raw, folder / "config.json")
    if "auto_map" in raw and not rules.has_native_code:
        raise CheckpointError(
            f"{folder / 'config.json'} asks for custom code (auto_map), which is never run: remove that entry"
        )
    if not (isinstance(rules, ConvertibleRules) and rules.converts(raw)):
        raise CheckpointError(
            f"{source} is a {rules.name} checkpoint, which needs torch to become a bundle: run `python -m export` in a "
            "checkout of this project"
        )
    refuse_unsupported(folder, rules, raw)
    return raw, rules


def _read_generation(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the generation settings, and where each of them stands. Raises CheckpointError for invalid values."""
    generation, sources = generation_settings(folder), configured_settings(folder)
    try:
        options_from(generation, {})
    except UsageError as error:
        where = sorted({sources[name].source for name in generation})
        raise CheckpointError(f"{folder}: {' or '.join(where)}: {error}") from error
    return generation, {name: sources[name].source for name in generation}


def _image_spec(processor: ProcessorSettings, image_size: int) -> ImageSpec:
    """Return how images become pixels; without normalisation the mean is 0 and the standard deviation 1."""
    values = processor.values
    mean, std = (values["image_mean"], values["image_std"]) if values["do_normalize"] else ([0.0] * 3, [1.0] * 3)
    return ImageSpec(
        height=image_size,
        width=image_size,
        resample=Image.Resampling(values["resample"]).name.lower(),
        mean=tuple(mean),
        std=tuple(std),
        resize=size_before_crop(processor.for_size(image_size)),
    )


def refuse_other_models(names: Iterable[str], rules: Rules, source: Path) -> None:
    """Raise CheckpointError for the weights of a model of the family that cannot caption."""
    listed = list(names)
    for start, what in rules.other_models.items():
        if any(name.startswith(start) for name in listed):
            raise CheckpointError(
                f"{source} is {what} of {rules.name}, which cannot generate captions: use a captioning checkpoint"
            )


def renamed(weights: Weights, rules: Rules) -> Weights:
    """Return weights by the names that transformers has for them, see Rules.current_name."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        new, is_transposed = rules.current_name(name)
        tensors[new] = Transposed(tensor) if is_transposed else tensor
    return Weights(tensors, weights.source)


def fitted(weights: Weights, rules: ConvertibleRules, raw: Mapping[str, Any]) -> Weights:
    """Return exactly the weights that config.json describes, tied ones under both names.

    Raises CheckpointError if one is missing or has another shape, if tied weights differ, or if all weights of the
    encoder or the decoder are 0. Only the last two checks read values: of weights that are stored twice, and up to the
    first value that is not 0.
    """
    source, tensors = weights.source, weights.tensors
    expected, tied = rules.weight_shapes(raw), rules.tied(raw)
    for copy, original in tied.items():
        if copy in tensors and original in tensors:
            refuse_wrong_shapes(weights, {name: expected[name] for name in (copy, original)})
            if not weights.are_equal(copy, original):
                raise CheckpointError(
                    f"{source}: {copy} differs from {original}, but tie_word_embeddings requires them to be equal: set "
                    "it to false in config.json, or remove one of the two"
                )
        if original not in tensors and copy in tensors:
            tensors[original] = tensors[copy]
    refuse_wrong_shapes(weights, expected)
    missing = sorted(set(expected) - set(tensors) - set(tied))
    refuse_missing(missing, rules, source)
    complete = Weights({name: tensors[tied.get(name, name)] for name in expected}, source)
    for part in rules.weight_prefixes:
        names = [name for name in expected if name.startswith(part)]
        if not any(complete[name].any() for name in sorted(names, key=lambda name: math.prod(expected[name]))):
            raise CheckpointError(f"{source}: all weights of {part[:-1]} are 0: save the trained model again")
    return complete


def refuse_wrong_shapes(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError if a weight has another shape than config.json requires."""
    for name in weights:
        if name in expected and weights.shape(name) != expected[name]:
            raise CheckpointError(
                f"{weights.source}: {name} has the shape {weights.shape(name)}, but config.json requires "
                f"{expected[name]}"
            )


def refuse_missing(missing: list[str], rules: Rules, source: Path) -> None:
    """Raise CheckpointError if weights are missing."""
    if missing:
        raise CheckpointError(
            f"{source} lacks {counted(len(missing), 'weight')} of {rules.architecture} ({missing[0]}, ...): "
            f"is it a {rules.name} captioning checkpoint?"
        )


@dataclass(frozen=True)
class ResizedTable:
    """A position table for another number of patches, by bicubic interpolation. The class row is kept.

    This is interpolate_pos_encoding of BLIP's, GIT's and ViT's embeddings (transformers 4.57), which Hugging Face would
    do for each image.
    """

    table: Tensor
    positions: int

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.table.shape[:-2], self.positions, self.table.shape[-1]

    def read(self) -> NDArray[np.float32]:
        """Return the resized table f32[1,positions,D] or f32[positions,D], as the original one."""
        table = self.table.read().reshape(-1, self.table.shape[-1])
        old, new = math.isqrt(len(table) - 1), math.isqrt(self.positions - 1)
        rows = bicubic_matrix(old, new)
        grid = table[1:].reshape(old, old, -1)
        resized = np.einsum("yi,xj,ijd->yxd", rows, rows, grid, optimize=True).reshape(new * new, -1)
        whole: NDArray[np.float32] = np.concatenate([table[:1], resized]).astype(np.float32)
        return whole.reshape(self.shape)


def bicubic_matrix(old: int, new: int) -> NDArray[np.float64]:
    """Return f64[new,old]: the weights of bicubic interpolation along one axis, identical to torch's interpolate.

    Cubic convolution with a = -0.75 (Keys, 1981), pixel centres (align_corners=False), coordinates clamped at the
    borders, no low-pass filter when the result is smaller. The weights are rounded to float32 at the same places as
    torch's (ATen/native/UpSample.h, with fused products and sums), because their terms cancel: float64 would be
    5e-6 off.
    """
    a = np.float32(-0.75)
    scale = np.float32(old) / np.float32(new)
    centres = _fused(np.arange(new, dtype=np.float32) + np.float32(0.5), scale, np.float32(-0.5))
    first = np.floor(centres)
    offset = centres - first  # of the centre from the second of four neighbours
    columns = np.clip(first[:, None].astype(np.int64) + np.arange(-1, 3), 0, old - 1)

    def near(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return _fused(_fused(x, a + 2, -(a + 3)) * x, x, np.float32(1))

    def far(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return _fused(_fused(_fused(x, a, -5 * a), x, 8 * a), x, -4 * a)

    weights = np.stack([far(offset + 1), near(offset), near(1 - offset), far(2 - offset)], 1)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], columns), weights)
    return matrix


def _fused(
    x: NDArray[np.float32], factor: NDArray[np.float32] | np.float32, summand: np.float32
) -> NDArray[np.float32]:
    """Return x * factor + summand with one rounding."""
    result: NDArray[np.float32] = (x.astype(np.float64) * factor + np.float64(summand)).astype(np.float32)
    return result

"""The images of a split, with references and prompts, as a sweep takes them. Knows nothing of decoding and scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.errors import DataError
from engine.inputs.columns import USUAL, Columns
from engine.inputs.ids import join_some
from engine.inputs.images import ImageFile
from train.data.dataset import Split, read_dataset

Say = Callable[[str], None]


def choose_split(data: Path, name: str, unpack_into: Path | None, say: Say, columns: Columns = USUAL) -> Split:
    """Return the split to caption: the one asked for, `test` in place of a missing `valid`. Raises DataError."""
    splits = read_dataset(data, unpack_into=unpack_into, columns=columns, log=say)
    if name == "valid" and name not in splits and "test" in splits:
        say(f"{data} has no split valid: the sweep is made on its split test")
        name = "test"
    if name not in splits:
        wanted = "valid or test" if name == "valid" else name
        raise DataError(f"{data} has no split {wanted}, only {', '.join(splits)}: choose with --split")
    split = splits[name]
    for line in split.problems.lines():
        say(f"{name}: {line}")
    return split


def choose_images(split: Split, limit: int | None) -> tuple[list[ImageFile], dict[str, tuple[str, ...]]]:
    """Return the images of a split, each once and in its order, and their references by id.

    Raises DataError where files are missing, or one id has two of them.
    """
    files: dict[str, Path] = {}
    references: dict[str, tuple[str, ...]] = {}
    for example in split.examples:
        if files.setdefault(example.id, example.image) != example.image:
            raise DataError(
                f"{split.captions_file}: {example.id} stands for two pictures, {files[example.id].name} and "
                f"{example.image.name}: give each an id of its own"
            )
        references[example.id] = (*references.get(example.id, ()), example.caption)
    ids = [list(files)[place] for place in spaced(len(files), limit or len(files))]
    missing = [name for name in ids if not files[name].is_file()]
    if missing:
        raise DataError(
            f"{split.captions_file}: {len(missing)} of {len(ids)} images are missing ({join_some(missing, 3)}): "
            "add the files, or take their rows out"
        )
    return [ImageFile(name, files[name]) for name in ids], {name: references[name] for name in ids}


def prompts_of(split: Split, images: list[ImageFile]) -> dict[str, str] | None:
    """Return what the captions of the images start with by id, None where none of them has a prompt."""
    prompts = {example.id: example.prompt for example in split.examples if example.prompt}
    found = {image.id: prompts.get(image.id, "") for image in images}
    return found if any(found.values()) else None


def spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` places of `count`, evenly spaced, or all: captions often come sorted by kind."""
    return list(range(count)) if wanted >= count else [i * count // wanted for i in range(wanted)]

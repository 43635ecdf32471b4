"""Read a data set directory into splits of examples: find the captions, their images, concepts and prompts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import DataError, UsageError, counted
from engine.inputs.columns import PROMPT, USUAL, Columns
from engine.inputs.ids import Ids, join_some, shown, spelled
from engine.inputs.images import RepeatedIdError, find_images
from engine.inputs.kinds import SUFFIXES, cut_suffix
from engine.inputs.readers import read_ids
from engine.inputs.tables import Table, read_table
from train.data.examples import OF_NO_ID, Example, Finding, Problems, Split
from train.data.layouts import (
    LOOKED_FOR,
    SPLITS,
    Listing,
    SplitFiles,
    describe_unknown,
    find_source,
    find_table,
    read_concepts,
    split_of_path,
)
from train.data.parquet import CONCEPT_COLUMNS, safe_name, split_concepts, unpack


@dataclass(frozen=True)
class DataInputs:
    """A data set of captioned images and how to read it.

    With `allow_missing` unusable entries are skipped instead of stopping the command, with `decode_images` every image
    is decoded first. `unpack_into` is the folder for the images of parquet files, `columns` the names of the table's
    columns.
    """

    directory: Path
    allow_missing: bool = False
    decode_images: bool = True
    unpack_into: Path | None = None
    columns: Columns = USUAL


def read_dataset(
    directory: Path,
    *,
    unpack_into: Path | None = None,
    columns: Columns = USUAL,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Split]:
    """Read the splits of a data set directory: some of "train", "valid" and "test", in this order.

    An image with several captions (COCO) becomes several examples with the same prompt. Images inside parquet files are
    written once to `unpack_into`/<split>/ (`directory`/unpacked/<split>/ if None). Every folder is listed once, and no
    image is opened. If only the folders of the images define the splits, `log` gets a line with their sizes.
    Raises UsageError if the directory or a chosen column does not exist, and DataError if no layout fits or a file does
    not have the expected format.

    Example: `read_dataset(Path("data"))["train"].examples[0].caption`.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: expected the folder of a data set")
    root = Listing.of(directory)
    reader = _Reader(root, unpack_into or directory / "unpacked", columns, log)
    for name in SPLITS:
        source = find_source(root, name)
        if source is not None:
            reader.read(name, source)
    if not reader.splits:
        table = find_table(root)
        if table is None:
            raise DataError(
                f"{directory} is not a data set of a known layout: {describe_unknown(root)}. Looked for {LOOKED_FOR}"
            )
        reader.read_all(table)
    columns.require_found()
    return reader.finish()


def hold_out(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Split `train` into (train, valid); valid gets about `fraction` of the ids, each with all of its captions.

    A hash of the id and the seed alone decides where an id goes, so it stays there when images are added. Raises
    UsageError if `fraction` is not between 0 and 1, and DataError if one of the two parts would be empty.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"the share to hold out must be between 0 and 1, not {fraction}")
    valid_ids = {example.id for example in train.examples if draw(example.id, seed) < fraction}
    kept = [example for example in train.examples if example.id not in valid_ids]
    held_out = [example for example in train.examples if example.id in valid_ids]
    if not kept or not held_out:
        raise DataError(
            f"{train.captions_file}: a share of {fraction} of {len(train.examples)} captions leaves "
            f"{len(kept)} for training and {len(held_out)} held out: choose another share or seed"
        )
    train_problems = replace(
        train.problems.select(lambda name: name not in valid_ids),
        **{name: getattr(train.problems, name) for name in OF_NO_ID},
    )
    valid_problems = train.problems.select(valid_ids.__contains__)
    return (
        replace(train, examples=kept, problems=train_problems),
        replace(train, name="valid", examples=held_out, problems=valid_problems),
    )


def draw(name: str, seed: int) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on the id and the seed."""
    digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


class _Reader:
    """Reads the splits of one directory. Caches the listings of its folders, because splits may share a folder."""

    def __init__(self, root: Listing, unpack_into: Path, columns: Columns, log: Callable[[str], None]) -> None:
        self.splits: dict[str, Split] = {}
        self._root = root
        self._unpack_into = unpack_into
        self._columns, self._log = columns, log
        self._no_images = _ImageFolder(root.directory, None, False)
        self._listings: dict[tuple[Path, bool], _ImageFolder] = {}
        self._used: dict[str, _ImageFolder] = {}

    def read(self, name: str, source: SplitFiles) -> None:
        """Read the captions of one split and find their images."""
        if source.parquet:
            self._read_parquet(name, source)
            return
        concepts = read_concepts(source.concepts) if source.concepts else {}
        table = read_table(source.captions, self._columns)
        self._add(name, source, table, list(table.captions), concepts)

    def read_all(self, source: SplitFiles) -> None:
        """Read one table that holds all splits.

        The split of an image comes from the lists of ids, else from the column `split`, else from the folder of the
        image, else it is "train". If there are lists, images that no list contains are skipped.
        """
        table = read_table(source.captions, self._columns)
        column = next((values for title, values in table.columns.items() if title.lower() == "split"), None)
        if source.lists:
            listed = {
                split: table.ids.find_all(read_ids(path, whole=True), path).values() for split, path in source.lists
            }
            column = {name: split for split, ids in listed.items() for name in ids}
        if column is None:
            column = self._splits_by_folder(source, table)
        by_split: dict[str, list[str]] = {name: [] for name in SPLITS}
        for image_id in table.captions:
            if source.lists and image_id not in (column or {}):
                continue
            value = "train" if column is None else column.get(image_id, "")
            name = next((split for split, aliases in SPLITS.items() if value.strip().lower() in aliases), None)
            if name is None:
                raise DataError(f"{source.captions}: {image_id} has the split {value!r}, expected {', '.join(SPLITS)}")
            by_split[name].append(image_id)
        for name, ids in by_split.items():
            if ids:
                self._add(name, source, table, ids, {})

    def _splits_by_folder(self, source: SplitFiles, table: Table) -> dict[str, str] | None:
        """Return {id: split} if images are in folders named after splits, or None if no image is.

        Raises DataError if only some images are: the others could belong to any split.
        """
        names = {image_id: table.files.get(image_id, image_id) for image_id in table.captions}
        _, listing, _ = self._choose_folder(source, list(names.values()))
        images = {image_id: listing.find(name) for image_id, name in names.items()}
        paths = {
            image_id: name if path is None else os.path.relpath(path, self._root.directory)
            for (image_id, name), path in zip(names.items(), images.values(), strict=True)
        }
        splits = dict(zip(paths, split_of_path(list(paths.values())), strict=True))
        inside = [paths[image_id] for image_id, split in splits.items() if split]
        outside = [paths[image_id] for image_id, split in splits.items() if not split]
        if inside and outside:
            raise DataError(
                f"{source.captions}: {counted(len(inside), 'image is', 'images are')} in folders named after a split "
                f"({join_some(inside, 2)}) "
                f"and {len(outside)} are not ({join_some(outside, 2)}): add a column `split` with train, valid or test"
            )
        if inside:
            counts = Counter(splits.values())
            self._log(
                f"{source.captions}: the folders of the images define the splits: "
                + ", ".join(f"{name} {counts[name]}" for name in SPLITS if counts[name])
            )
        return {image_id: split for image_id, split in splits.items() if split} or None

    def finish(self) -> dict[str, Split]:
        """Return the splits, and add the images without caption to their problems.

        If splits share a folder, such an image is reported once, for the first of them.
        """
        used = {example.image for split in self.splits.values() for example in split.examples}

        def unused(paths: Iterable[Path]) -> list[Finding]:
            rest = [path for path in paths if path not in used]
            used.update(rest)
            return [(os.path.relpath(path, self._root.directory), "") for path in rest]

        for name, listing in self._used.items():
            rest = {"uncaptioned": unused(listing.by_path.values()), "imageless": unused(listing.imageless)}
            split = self.splits[name]
            self.splits[name] = replace(split, problems=replace(split.problems, **rest))
        return self.splits

    def _read_parquet(self, name: str, source: SplitFiles) -> None:
        folder = self._unpack_into / name
        examples = unpack(list(source.parquet), folder, self._columns)
        if not examples:
            raise DataError(f"{source.captions} holds no captions")
        prompts = _checked_prompts(((example.id, example.prompt) for example in examples), source.captions)
        examples = [replace(example, prompt=prompts[example.id]) for example in examples]
        present = set(os.listdir(folder))
        reason = "no image in the parquet file, or deleted after unpacking"
        missing = {example.id: reason for example in examples if example.image.name not in present}
        # In parquet an image may have several captions, but several images of one id are suspicious.
        images: dict[str, set[Path]] = {}
        for example in examples:
            images.setdefault(example.id, set()).add(example.image)
        shared = [(image_id, f"of {len(paths)} images") for image_id, paths in images.items() if len(paths) > 1]
        self._keep(name, source, examples, missing, shared)

    def _add(
        self, name: str, source: SplitFiles, table: Table, ids: list[str], concepts: dict[str, tuple[str, ...]]
    ) -> None:
        """Add the split of these ids of a table. Its images are found by file name, else by id, else by column `name`.

        If `concepts` {id: concepts} is empty, concepts come from a column of the table. Prompts always do.
        """
        if not concepts:
            columns = [values for title, values in table.columns.items() if title.lower() in CONCEPT_COLUMNS]
            concepts = {key: tuple(split_concepts(value)) for values in columns[:1] for key, value in values.items()}
        title = next((title for title in table.columns if title.lower() == PROMPT), "")
        if title in table.varying:
            raise _different_prompts(table.path, table.varying[title])
        cells = table.columns.get(title, {})
        prompts = _checked_prompts(((image_id, cells.get(image_id, "")) for image_id in ids), source.captions)
        written = {image_id: table.files.get(image_id, image_id) for image_id in ids}
        folder, listing, looked = self._choose_folder(source, list(written.values()))
        names = table.columns.get("name", {})
        if names and not any(listing.find(path) for path in written.values()):
            written = {image_id: names.get(image_id, image_id) for image_id in ids}
            folder, listing, looked = self._choose_folder(source, list(written.values()))
        images = listing.find_all(written, names, source.captions)
        # The table of one split may name images in the folder of another, such as val/1.png in the table of train.
        if any(image_id not in images and "/" in spelled(path) for image_id, path in written.items()):
            rest = {image_id: path for image_id, path in written.items() if image_id not in images}
            images |= self._list(self._root.directory, True).find_all(rest, {}, source.captions)
        missing = {image_id: f"no such image in {looked}" for image_id in ids if image_id not in images}
        images |= {image_id: folder / f"{safe_name(image_id)}.jpg" for image_id in missing}
        examples = [
            Example(image_id, images[image_id], caption, concepts.get(image_id, ()), prompts[image_id])
            for image_id in ids
            for caption in table.captions[image_id]
        ]
        repeated = [
            (image_id, f"{len(table.captions[image_id])} captions")
            for image_id in ids
            if source.one_each and len(table.captions[image_id]) > 1
        ]
        self._used[name] = listing
        self._keep(name, source, examples, missing, repeated)

    def _keep(
        self, name: str, source: SplitFiles, examples: list[Example], missing: dict[str, str], repeated: list[Finding]
    ) -> None:
        empty = [(e.id, "white space only" if e.caption else "no text") for e in examples if e.is_empty]
        problems = Problems(missing=list(missing.items()), empty=empty, repeated=repeated)
        self.splits[name] = Split(name, examples, source.captions, problems)

    def _choose_folder(self, source: SplitFiles, ids: list[str]) -> tuple[Path, _ImageFolder, str]:
        """Return the folder of the images, its listing, and the names of the searched folders for messages.

        This is the first folder with at least half of the images, else the folder with the most. A folder that cannot
        be used (two images with the same id) is an error only if no other folder has any of the images.
        """
        best: tuple[int, Path, _ImageFolder] = (0, source.folders[0][0], self._no_images)
        looked, trouble = [], None
        for folder, deep in source.folders:
            try:
                listing = self._list(folder, deep)
            except UsageError as error:
                trouble = trouble or error
                continue
            trouble = trouble or listing.trouble
            looked.append(self._shown(folder))
            hits = sum(listing.find(name) is not None for name in ids)
            if hits > best[0]:
                best = (hits, folder, listing)
            if 2 * hits >= len(ids):
                break
        if best[0]:
            return best[1], best[2], self._shown(best[1])
        if trouble is not None:
            raise DataError(f"{source.captions}: its images cannot be listed: {trouble}") from trouble
        return best[1], self._no_images, ", ".join(dict.fromkeys(looked)) or self._shown(self._root.directory)

    def _shown(self, folder: Path) -> str:
        return os.path.relpath(folder, self._root.directory) + "/" if folder != self._root.directory else f"{folder}/"

    def _list(self, folder: Path, deep: bool) -> _ImageFolder:
        try:
            if (folder, deep) not in self._listings:
                self._listings[folder, deep] = _ImageFolder(self._root.directory, folder, deep)
            return self._listings[folder, deep]
        except OSError as error:
            raise UsageError(f"{error.filename or folder} cannot be listed: {error.strerror}") from error


def _holds_images(folder: Path, deep: bool) -> bool:
    """Return whether a folder holds an image. find_images raises an error for a folder without images."""
    for _, folders, files in os.walk(folder):
        if any(Path(name).suffix.lower() in SUFFIXES and not name.startswith(".") for name in files):
            return True
        folders[:] = [name for name in folders if not name.startswith(".")] if deep else []
    return False


class _ImageFolder:
    """The images of a folder, by their paths inside it. Looks up ids as engine.inputs.ids.Ids does.

    If two images have the same name (cat/1.png and dog/1.png, or 1.jpg and 1.png), the paths keep their suffix, and
    `trouble` says that names alone do not distinguish them. `imageless` are DICOM files without an image. A folder of
    None has no images.
    """

    def __init__(self, root: Path, folder: Path | None, deep: bool) -> None:
        self.trouble: UsageError | None = None
        self.by_path: dict[str, Path] = {}
        self.imageless: list[Path] = []
        if folder is not None and _holds_images(folder, deep):
            try:
                found = find_images(folder, recursive=deep)
            except RepeatedIdError as error:
                found = find_images(folder, recursive=deep, ids="file")
                self.trouble = UsageError(
                    f"{str(error).partition('; --ids')[0]}; write folder and suffix in the table, or rename one"
                )
            for image in found.images:
                inside = image.inside.as_posix()
                self.by_path[inside if self.trouble else cut_suffix(inside)] = image.path
            self.imageless = [folder / name for name in sorted(found.imageless)]
        self._ids, self._root = Ids(self.by_path), root
        self._is_there: dict[str, bool] = {}

    def find(self, name: str) -> Path | None:
        """Return the image of an id or of a file name, with or without folders, or None if there is no such image.

        If the folder in `name` exists in the data set, only an image in that folder matches: `val/1.png` does not match
        train/1.png. A folder of another machine is ignored: `coco/val2014/1.png` may match train/1.png.
        """
        key = self._ids.find(name)
        folder = spelled(name).rpartition("/")[0]
        if key is None or not folder:
            return None if key is None else self.by_path[key]
        if folder not in self._is_there:
            self._is_there[folder] = (self._root / folder).is_dir()
        image = self.by_path[key]
        return image if not self._is_there[folder] or image.parent == self._root / folder else None

    def find_all(self, written: Mapping[str, str], names: Mapping[str, str], source: Path) -> dict[str, Path]:
        """Return {id: image}. An image is looked up by its path in `written` {id: path}, else by its entry in `names`.

        Raises DataError if two ids of the table `source` have the same image: one of them must be wrong.
        """
        images: dict[str, Path] = {}
        owners: dict[Path, str] = {}
        for image_id, path in written.items():
            image = self.find(path) or self.find(names.get(image_id, path))
            if image is None:
                continue
            if (owner := owners.setdefault(image, image_id)) != image_id:
                raise DataError(f"{source}: {shown(written[owner])} and {shown(path)} are two names of {image}")
            images[image_id] = image
        return images


def _checked_prompts(prompts: Iterable[tuple[str, str]], captions_file: Path) -> dict[str, str]:
    """Return {id: prompt} of (id, prompt) pairs; a prompt of white space only becomes ''.

    Raises DataError if an image has different prompts, because one caption is generated per image, and if a prompt
    contains control characters or an unpaired surrogate.
    """
    by_id: dict[str, str] = {}
    for name, prompt in prompts:
        if by_id.setdefault(name, prompt) != prompt:
            raise _different_prompts(captions_file, name)
        if not prompt.isprintable():
            raise DataError(f"{captions_file}: the prompt of {shown(name)} contains unprintable characters: {prompt!a}")
    return {name: prompt if prompt.strip() else "" for name, prompt in by_id.items()}


def _different_prompts(captions_file: Path, name: str) -> DataError:
    return DataError(
        f"{captions_file}: {shown(name)} has captions with different prompts: give all rows of an image the same prompt"
    )

"""Read a data set directory into splits of examples: find the captions, their images, concepts and prompts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from engine.errors import DataError, UsageError
from engine.inputs.columns import PROMPT, USUAL, Columns
from engine.inputs.ids import Ids, join_some, shown, spelled
from engine.inputs.images import RepeatedIdError, find_images
from engine.inputs.kinds import SUFFIXES, cut_suffix
from engine.inputs.readers import read_ids
from engine.inputs.tables import Table, read_table
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
from train.data.parquet import CONCEPT_COLUMNS, Row, safe_name, split_concepts, unpack
from train.data.problems import OF_NO_ID, Problems, is_empty


def rows_of(table: Table, concepts: dict[str, tuple[str, ...]]) -> list[Row]:
    """Return one row per caption of a table.

    If `concepts` {id: concepts} is empty, concepts come from a column of the table. Prompts always do. Raises DataError
    if an image has different prompts.
    """
    if not concepts:
        columns = [values for title, values in table.columns.items() if title.lower() in CONCEPT_COLUMNS]
        concepts = {name: tuple(split_concepts(value)) for values in columns[:1] for name, value in values.items()}
    title = next((title for title in table.columns if title.lower() == PROMPT), "")
    if title in table.varying:
        raise _different_prompts(table.path, table.varying[title])
    prompts = table.columns.get(title, {})
    return [
        Row(name, None, caption, concepts.get(name, ()), prompts.get(name, ""))
        for name, captions in table.captions.items()
        for caption in captions
    ]


def check_prompts(rows: Iterable[Row], captions_file: Path) -> None:
    """Check the prompts of rows.

    Raises DataError if an image has different prompts, because one caption is generated per image, and if a prompt
    contains control characters or an unpaired surrogate.
    """
    prompts: dict[str, str] = {}
    for row in rows:
        if prompts.setdefault(row.id, row.prompt) != row.prompt:
            raise _different_prompts(captions_file, row.id)
        if not row.prompt.isprintable():
            raise DataError(
                f"{captions_file}: the prompt of {shown(row.id)} contains unprintable characters: {row.prompt!a}"
            )


def _different_prompts(captions_file: Path, name: str) -> DataError:
    return DataError(
        f"{captions_file}: {shown(name)} has captions with different prompts: give all rows of an image the same prompt"
    )


@dataclass(frozen=True)
class Example:
    """An image with one of its captions.

    `concepts` are UMLS CUIs, () if the data set has none. `prompt` is the text before the caption. It is not part of
    `caption`, and empty if the image has no prompt.
    """

    id: str
    image: Path
    caption: str
    concepts: tuple[str, ...] = ()
    prompt: str = ""

    @property
    def text(self) -> str:
        """The prompt followed by the caption: the full text that the model gets."""
        return f"{self.prompt} {self.caption}" if self.prompt else self.caption


@dataclass(frozen=True)
class Split:
    """The captioned images of one split ("train", "valid" or "test") in the order of its captions file.

    `problems` are those found while reading: missing images, empty captions, repeated ids, images without caption. The
    path of a missing image points to a file that does not exist.
    """

    name: str
    examples: list[Example]
    captions_file: Path
    problems: Problems = field(default_factory=Problems)


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
        self._no_images = _ImageFolder(root.directory, {})
        self._listings: dict[tuple[Path, bool], _ImageFolder] = {}
        self._used: dict[str, _ImageFolder] = {}

    def read(self, name: str, source: SplitFiles) -> None:
        """Read the captions of one split and find their images."""
        if source.parquet:
            self._read_parquet(name, source)
            return
        concepts = read_concepts(source.concepts) if source.concepts else {}
        table = read_table(source.captions, self._columns)
        self._add(name, source, rows_of(table, concepts), table)

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
        by_split: dict[str, list[Row]] = {name: [] for name in SPLITS}
        for row in rows_of(table, {}):
            if source.lists and row.id not in (column or {}):
                continue
            value = "train" if column is None else column.get(row.id, "")
            name = next((split for split, aliases in SPLITS.items() if value.strip().lower() in aliases), None)
            if name is None:
                raise DataError(f"{source.captions}: {row.id} has the split {value!r}, expected {', '.join(SPLITS)}")
            by_split[name].append(row)
        for name, rows in by_split.items():
            if rows:
                self._add(name, source, rows, table)

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
                f"{source.captions}: {len(inside)} images are in folders named after a split ({join_some(inside, 2)}) "
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
        for name, listing in self._used.items():
            without_caption = [path for path in listing.by_path.values() if path not in used]
            used.update(without_caption)
            skipped = [path for path in listing.imageless if path not in used]
            used.update(skipped)
            split, relative = self.splits[name], partial(os.path.relpath, start=self._root.directory)
            uncaptioned, imageless = ([(relative(path), "") for path in paths] for paths in (without_caption, skipped))
            problems = replace(split.problems, uncaptioned=uncaptioned, imageless=imageless)
            self.splits[name] = replace(split, problems=problems)
        return self.splits

    def _read_parquet(self, name: str, source: SplitFiles) -> None:
        folder = self._unpack_into / name
        rows = unpack(list(source.parquet), folder, self._columns)
        if not rows:
            raise DataError(f"{source.captions} holds no captions")
        present = set(os.listdir(folder))
        reason = "no image in the parquet file, or deleted after unpacking"
        missing = {row.id: reason for row in rows if row.file is None or row.file.name not in present}
        examples = [_example(row, row.file or folder / f"{safe_name(row.id)}.jpg") for row in rows]
        check_prompts(rows, source.captions)
        problems = _problems(examples, missing, one_each=False)  # in parquet an image may have several captions
        self.splits[name] = Split(name, examples, source.captions, replace(problems, repeated=_shared_ids(examples)))

    def _add(self, name: str, source: SplitFiles, rows: list[Row], table: Table) -> None:
        """Add a split. Its images are found by file name, else by id, else by the column `name`."""
        written = {row.id: table.files.get(row.id, row.id) for row in rows}
        folder, listing, looked = self._choose_folder(source, list(written.values()))
        names = table.columns.get("name", {})
        if names and not any(listing.find(path) for path in written.values()):
            written = {image_id: names.get(image_id, image_id) for image_id in written}
            folder, listing, looked = self._choose_folder(source, list(written.values()))
        images = listing.find_all(written, names, source.captions)
        # The table of one split may name images in the folder of another, such as val/1.png in the table of train.
        if any(image_id not in images and "/" in spelled(path) for image_id, path in written.items()):
            rest = {image_id: path for image_id, path in written.items() if image_id not in images}
            images |= self._list(self._root.directory, True).find_all(rest, {}, source.captions)
        examples, missing = [], {}
        for row in rows:
            image = images.get(row.id)
            if image is None:
                missing[row.id] = f"no such image in {looked}"
                image = folder / f"{safe_name(row.id)}.jpg"
            examples.append(_example(row, image))
        check_prompts(rows, source.captions)
        self._used[name] = listing
        self.splits[name] = Split(name, examples, source.captions, _problems(examples, missing, source.one_each))

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
        key = (folder, deep)
        if key not in self._listings:
            try:
                self._listings[key] = _list_images(self._root.directory, folder, deep)
            except OSError as error:
                raise UsageError(f"{error.filename or folder} cannot be listed: {error.strerror}") from error
        return self._listings[key]


def _holds_images(folder: Path, deep: bool) -> bool:
    """Return whether a folder holds an image. find_images raises an error for a folder without images."""
    for _, folders, files in os.walk(folder):
        if any(Path(name).suffix.lower() in SUFFIXES and not name.startswith(".") for name in files):
            return True
        folders[:] = [name for name in folders if not name.startswith(".")] if deep else []
    return False


class _ImageFolder:
    """The images of a folder, by their paths inside it. Looks up ids as engine.inputs.ids.Ids does.

    `trouble` is set if two images have the same name, so that names alone do not distinguish them. `imageless` are
    DICOM files without an image.
    """

    def __init__(
        self,
        root: Path,
        by_path: dict[str, Path],
        trouble: UsageError | None = None,
        imageless: Sequence[Path] = (),
    ) -> None:
        self.by_path, self.trouble, self.imageless = by_path, trouble, imageless
        self._ids, self._root = Ids(by_path), root
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


def _list_images(root: Path, folder: Path, deep: bool) -> _ImageFolder:
    """List the images of a folder.

    If two images have the same name (cat/1.png and dog/1.png, or 1.jpg and 1.png), the paths keep their suffix.
    """
    if not _holds_images(folder, deep):
        return _ImageFolder(root, {})
    trouble = None
    try:
        found = find_images(folder, recursive=deep)
    except RepeatedIdError as error:
        found = find_images(folder, recursive=deep, ids="file")
        trouble = UsageError(
            f"{str(error).partition('; --ids')[0]}; write folder and suffix in the table, or rename one"
        )
    paths = {image.path: image.inside.as_posix() for image in found.images}
    by_path = {inside if trouble else cut_suffix(inside): path for path, inside in paths.items()}
    return _ImageFolder(root, by_path, trouble, [folder / name for name in sorted(found.imageless)])


def _example(row: Row, image: Path) -> Example:
    return Example(row.id, image, row.caption, row.concepts, row.prompt if row.prompt.strip() else "")


def _shared_ids(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return findings for ids that have several images."""
    images: dict[str, set[Path]] = {}
    for example in examples:
        images.setdefault(example.id, set()).add(example.image)
    return [(name, f"of {len(paths)} images") for name, paths in images.items() if len(paths) > 1]


def _problems(examples: Iterable[Example], missing: dict[str, str], one_each: bool) -> Problems:
    counts = Counter(example.id for example in examples)
    empty = [
        (example.id, "white space only" if example.caption else "no text")
        for example in examples
        if is_empty(example.caption)
    ]
    repeated = [(name, f"{count} captions") for name, count in counts.items() if count > 1] if one_each else []
    return Problems(missing=list(missing.items()), empty=empty, repeated=repeated)

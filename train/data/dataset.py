"""Rows of a table of captions with their concepts and prompts; knows nothing of pictures."""

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
from train.data.parquet import CONCEPT_COLUMNS, ParquetRow, safe_name, split_concepts, unpack
from train.data.problems import OF_NO_ID, Problems, is_empty


def rows_of(table: Table, concepts: dict[str, tuple[str, ...]]) -> list[ParquetRow]:
    """Return a row for every caption. Concepts that are not given come from a column; so do prompts, one an image.

    Raises DataError for an image with different prompts.
    """
    if not concepts:
        columns = [values for title, values in table.columns.items() if title.lower() in CONCEPT_COLUMNS]
        concepts = {name: tuple(split_concepts(value)) for values in columns[:1] for name, value in values.items()}
    title = next((title for title in table.columns if title.lower() == PROMPT), "")
    if title in table.varying:
        raise _different_prompts(table.path, table.varying[title])
    prompts = table.columns.get(title, {})
    return [
        ParquetRow(name, None, caption, concepts.get(name, ()), prompts.get(name, ""))
        for name, captions in table.captions.items()
        for caption in captions
    ]


def check_prompts(rows: Iterable[ParquetRow], captions_file: Path) -> None:
    """Raise DataError for an image with different prompts, for which no one caption could be generated, and for a
    prompt that holds control characters or half a character.
    """
    prompts: dict[str, str] = {}
    for row in rows:
        if prompts.setdefault(row.id, row.prompt) != row.prompt:
            raise _different_prompts(captions_file, row.id)
        if not row.prompt.isprintable():
            raise DataError(
                f"{captions_file}: the prompt of {shown(row.id)} holds characters that are no text: {row.prompt!a}"
            )


def _different_prompts(captions_file: Path, name: str) -> DataError:
    return DataError(
        f"{captions_file}: {shown(name)} has captions with different prompts: an image has one prompt, the same in all "
        "of its rows"
    )


@dataclass(frozen=True)
class Example:
    """One image with one of its captions; `concepts` are UMLS CUIs where the data set has them.

    `prompt` is what its captions start with, in front of `caption` and no part of it; empty where there is none.
    """

    id: str
    image: Path
    caption: str
    concepts: tuple[str, ...] = ()
    prompt: str = ""

    @property
    def text(self) -> str:
        """The prompt and the caption: all that a model is shown."""
        return f"{self.prompt} {self.caption}" if self.prompt else self.caption


@dataclass(frozen=True)
class Split:
    """The captioned images of one split ("train", "valid" or "test") in the order of its captions file.

    `problems` is what reading found: missing images, empty captions, repeated ids, images without caption. An example
    whose image is missing keeps a path where none is.
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
    """Return the splits of a data set directory: some of "train", "valid" and "test", in this order.

    An image with several captions (COCO) gives an example for each; they share its prompt. Images inside parquet
    files are written once to `unpack_into`/<split>/ (`directory`/unpacked/<split>/ when None). Every folder is listed
    once and no image opened. `log` gets a line where splits are told by folders alone.
    Raises UsageError when there is no such directory or chosen column, DataError when no layout fits, or when a file is
    not what it seems, naming it.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: expected the folder of a data set")
    place = Listing.of(directory)
    reader = _Reader(place, unpack_into or directory / "unpacked", columns, log)
    for name in SPLITS:
        source = find_source(place, name)
        if source is not None:
            reader.read(name, source)
    if not reader.splits:
        table = find_table(place)
        if table is None:
            raise DataError(
                f"{directory} is no data set of a known layout: {describe_unknown(place)}. Looked for {LOOKED_FOR}"
            )
        reader.read_all(table)
    columns.require_found()
    return reader.finish()


def hold_out(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Return (train, valid): the second takes about `fraction` of the ids, each with all of its captions.

    An id is taken by a hash of itself and the seed alone, so that it stays where it is when images are added. Raises
    UsageError for a fraction outside 0 to 1, DataError when one of the two would be empty.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"the share to hold out lies between 0 and 1, not at {fraction}")
    taken = {example.id for example in train.examples if draw(example.id, seed) < fraction}
    kept = [example for example in train.examples if example.id not in taken]
    held = [example for example in train.examples if example.id in taken]
    if not kept or not held:
        raise DataError(
            f"{train.captions_file}: a share of {fraction} of {len(train.examples)} captions leaves "
            f"{len(kept)} for training and {len(held)} held out: choose another share or seed"
        )
    stays = replace(
        train.problems.select(lambda name: name not in taken),
        **{name: getattr(train.problems, name) for name in OF_NO_ID},
    )
    goes = train.problems.select(taken.__contains__)
    return replace(train, examples=kept, problems=stays), replace(train, name="valid", examples=held, problems=goes)


def draw(name: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on nothing but the id and the seed."""
    digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


class _Reader:
    """Reads the sources of one directory; keeps the listings of its folders, which splits may share."""

    def __init__(self, place: Listing, unpack_into: Path, columns: Columns, log: Callable[[str], None]) -> None:
        self.splits: dict[str, Split] = {}
        self._place = place
        self._unpack_into = unpack_into
        self._columns, self._log = columns, log
        self._nothing = _Pictures(place.directory, {})
        self._listings: dict[tuple[Path, bool], _Pictures] = {}
        self._used: dict[str, _Pictures] = {}

    def read(self, name: str, source: SplitFiles) -> None:
        """Read the captions of one split and find their pictures."""
        if source.parquet:
            self._read_parquet(name, source)
            return
        concepts = read_concepts(source.concepts) if source.concepts else {}
        table = read_table(source.captions, self._columns)
        self._add(name, source, rows_of(table, concepts), table)

    def read_all(self, source: SplitFiles) -> None:
        """Read one table for all splits: by lists of ids, by its column `split`, by the folders of the images.

        With lists, what none of them names belongs to no split. All is for training where nothing says otherwise.
        """
        table = read_table(source.captions, self._columns)
        column = next((values for title, values in table.columns.items() if title.lower() == "split"), None)
        if source.lists:
            named = {
                split: table.ids.find_all(read_ids(path, whole=True), path).values() for split, path in source.lists
            }
            column = {name: split for split, ids in named.items() for name in ids}
        if column is None:
            column = self._splits_by_folder(source, table)
        by_split: dict[str, list[ParquetRow]] = {name: [] for name in SPLITS}
        for row in rows_of(table, {}):
            if source.lists and row.id not in (column or {}):
                continue
            value = "train" if column is None else column.get(row.id, "")
            name = next((split for split, aliases in SPLITS.items() if value.strip().lower() in aliases), None)
            if name is None:
                raise DataError(f"{source.captions}: {row.id} has the split {value!r}: expected {', '.join(SPLITS)}")
            by_split[name].append(row)
        for name, rows in by_split.items():
            if rows:
                self._add(name, source, rows, table)

    def _splits_by_folder(self, source: SplitFiles, table: Table) -> dict[str, str] | None:
        """Return the split of each id where images are in folders named after splits; None where none is.

        Raises DataError where only some are: the others could belong to any split.
        """
        names = {one: table.files.get(one, one) for one in table.captions}
        _, listing, _ = self._choose_folder(source, list(names.values()))
        found = {one: listing.find(name) for one, name in names.items()}
        paths = {
            one: name if path is None else os.path.relpath(path, self._place.directory)
            for (one, name), path in zip(names.items(), found.values(), strict=True)
        }
        splits = dict(zip(paths, split_of_path(list(paths.values())), strict=True))
        inside = [paths[one] for one, split in splits.items() if split]
        outside = [paths[one] for one, split in splits.items() if not split]
        if inside and outside:
            raise DataError(
                f"{source.captions}: {len(inside)} images are in folders named after a split ({join_some(inside, 2)}) "
                f"and {len(outside)} are not ({join_some(outside, 2)}): add a column `split` of train, valid or test"
            )
        if inside:
            counts = Counter(splits.values())
            self._log(
                f"{source.captions}: images belong to the split that their folder is named after: "
                + ", ".join(f"{name} {counts[name]}" for name in SPLITS if counts[name])
            )
        return {one: split for one, split in splits.items() if split} or None

    def finish(self) -> dict[str, Split]:
        """Return the splits, with the pictures that none of them captions: each named once, at the first that could."""
        used = {example.image for split in self.splits.values() for example in split.examples}
        for name, listing in self._used.items():
            left = [path for path in listing.by_path.values() if path not in used]
            used.update(left)
            skipped = [path for path in listing.imageless if path not in used]
            used.update(skipped)
            split, shown = self.splits[name], partial(os.path.relpath, start=self._place.directory)
            uncaptioned, imageless = ([(shown(path), "") for path in paths] for paths in (left, skipped))
            problems = replace(split.problems, uncaptioned=uncaptioned, imageless=imageless)
            self.splits[name] = replace(split, problems=problems)
        return self.splits

    def _read_parquet(self, name: str, source: SplitFiles) -> None:
        folder = self._unpack_into / name
        rows = unpack(list(source.parquet), folder, self._columns)
        if not rows:
            raise DataError(f"{source.captions} holds no captions")
        present = set(os.listdir(folder))
        reason = "no picture in the parquet file, or deleted after unpacking"
        lost = {row.id: reason for row in rows if row.file is None or row.file.name not in present}
        examples = [_example(row, row.file or folder / f"{safe_name(row.id)}.jpg") for row in rows]
        check_prompts(rows, source.captions)
        problems = _problems(examples, lost, one_each=False)  # several captions of one picture are no trouble here
        self.splits[name] = Split(name, examples, source.captions, replace(problems, repeated=_shared_ids(examples)))

    def _add(self, name: str, source: SplitFiles, rows: list[ParquetRow], table: Table) -> None:
        """Add a split. Images are found by their file names, else by their ids, else by a column `name`."""
        written = {row.id: table.files.get(row.id, row.id) for row in rows}
        folder, listing, looked = self._choose_folder(source, list(written.values()))
        names = table.columns.get("name", {})
        if names and not any(listing.find(one) for one in written.values()):
            written = {one: names.get(one, one) for one in written}
            folder, listing, looked = self._choose_folder(source, list(written.values()))
        images = listing.find_all(written, names, source.captions)
        if any(one not in images and "/" in spelled(path) for one, path in written.items()):
            everywhere = self._list(self._place.directory, True)  # a table of train may also name val/1.png
            images |= everywhere.find_all(
                {one: p for one, p in written.items() if one not in images}, {}, source.captions
            )
        examples, lost = [], {}
        for row in rows:
            image = images.get(row.id)
            if image is None:
                lost[row.id] = f"no such picture in {looked}"
                image = folder / f"{safe_name(row.id)}.jpg"
            examples.append(_example(row, image))
        check_prompts(rows, source.captions)
        self._used[name] = listing
        self.splits[name] = Split(name, examples, source.captions, _problems(examples, lost, source.one_each))

    def _choose_folder(self, source: SplitFiles, ids: list[str]) -> tuple[Path, _Pictures, str]:
        """Return the folder of the pictures, its listing, and where was looked, in words.

        The first folder with half of the pictures is it, else the one with most. A folder that cannot be used (two
        pictures with one id) stops the run only when there is no other with any of the pictures.
        """
        best: tuple[int, Path, _Pictures] = (0, source.folders[0][0], self._nothing)
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
            raise DataError(f"{source.captions}: its pictures cannot be listed: {trouble}") from trouble
        return best[1], self._nothing, ", ".join(dict.fromkeys(looked)) or self._shown(self._place.directory)

    def _shown(self, folder: Path) -> str:
        return os.path.relpath(folder, self._place.directory) + "/" if folder != self._place.directory else f"{folder}/"

    def _list(self, folder: Path, deep: bool) -> _Pictures:
        key = (folder, deep)
        if key not in self._listings:
            try:
                self._listings[key] = _pictures(self._place.directory, folder, deep)
            except OSError as error:
                raise UsageError(f"{error.filename or folder} cannot be listed: {error.strerror}") from error
        return self._listings[key]


def _holds_pictures(folder: Path, deep: bool) -> bool:
    """Return whether find_images, for which a folder without pictures is an error, will find one."""
    for _, folders, files in os.walk(folder):
        if any(Path(name).suffix.lower() in SUFFIXES and not name.startswith(".") for name in files):
            return True
        folders[:] = [name for name in folders if not name.startswith(".")] if deep else []
    return False


class _Pictures:
    """The images of a folder by their paths inside it, found as Ids finds them.

    `trouble` is why their names alone do not distinguish them. `imageless` are DICOM files without an image.
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
        """Return the image of an id, which may also be written as a file name, with folders or without.

        Where the data set has the folder that is written, an image of another folder is not meant: `val/1.png` is not
        train/1.png, but `coco/val2014/1.png` of another machine may be.
        """
        found = self._ids.find(name)
        folder = spelled(name).rpartition("/")[0]
        if found is None or not folder:
            return None if found is None else self.by_path[found]
        if folder not in self._is_there:
            self._is_there[folder] = (self._root / folder).is_dir()
        image = self.by_path[found]
        return image if not self._is_there[folder] or image.parent == self._root / folder else None

    def find_all(self, written: Mapping[str, str], names: Mapping[str, str], source: Path) -> dict[str, Path]:
        """Return the images of ids, by what is `written` of each or else by its name.

        Raises DataError where two ids of `source` have one image: the captions of one are of another image.
        """
        found: dict[str, Path] = {}
        owners: dict[Path, str] = {}
        for one, path in written.items():
            image = self.find(path) or self.find(names.get(one, path))
            if image is None:
                continue
            if (owner := owners.setdefault(image, one)) != one:
                raise DataError(f"{source}: {shown(written[owner])} and {shown(path)} are two names of {image}")
            found[one] = image
        return found


def _pictures(root: Path, folder: Path, deep: bool) -> _Pictures:
    """List a folder; where two images have one name (cat/1.png, dog/1.png or 1.jpg, 1.png) paths keep their suffix."""
    if not _holds_pictures(folder, deep):
        return _Pictures(root, {})
    trouble = None
    try:
        found = find_images(folder, recursive=deep)
    except RepeatedIdError as error:
        found = find_images(folder, recursive=deep, ids="file")
        trouble = UsageError(
            f"{str(error).partition('; --ids')[0]}; name folder and suffix in the table, or rename one"
        )
    paths = {image.path: image.inside.as_posix() for image in found.images}
    by_path = {inside if trouble else cut_suffix(inside): path for path, inside in paths.items()}
    return _Pictures(root, by_path, trouble, [folder / name for name in sorted(found.imageless)])


def _example(row: ParquetRow, image: Path) -> Example:
    return Example(row.id, image, row.caption, row.concepts, row.prompt if row.prompt.strip() else "")


def _shared_ids(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return the ids under which several pictures stand."""
    pictures: dict[str, set[Path]] = {}
    for example in examples:
        pictures.setdefault(example.id, set()).add(example.image)
    return [(name, f"of {len(several)} pictures") for name, several in pictures.items() if len(several) > 1]


def _problems(examples: Iterable[Example], lost: dict[str, str], one_each: bool) -> Problems:
    counts = Counter(example.id for example in examples)
    empty = [
        (example.id, "white space only" if example.caption else "no text")
        for example in examples
        if is_empty(example.caption)
    ]
    repeated = [(name, f"{count} captions") for name, count in counts.items() if count > 1] if one_each else []
    return Problems(missing=list(lost.items()), empty=empty, repeated=repeated)

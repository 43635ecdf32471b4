"""Known layouts of data sets: find where a directory keeps the captions, concepts and images of a split.

Reads only file names and the headers of tables.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DataError, UsageError, counted
from engine.inputs.columns import CAPTION_COLUMNS, ID_COLUMNS, find_column
from engine.inputs.ids import join_some, spelled
from engine.inputs.kinds import SUFFIXES, count_kinds
from engine.inputs.readers import DELIMITERS, read_rows, read_text, table_text
from engine.inputs.tables import METADATA, find_sidecars, read_table
from train.data.parquet import CONCEPT_COLUMNS, split_concepts

SPLITS = {
    "train": ("train", "training", "restval"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing"),
}
"""The splits and the names that files and folders use for them."""
DELIMITED = (".csv", ".tsv", ".txt")
TABLES = (*DELIMITED, ".jsonl", ".json")
SINGLE = (
    "captions.csv",
    "pairs.jsonl",
    *METADATA,
    "captions.jsonl",
    "captions.tsv",
    "captions.txt",
    "captions.json",
    "results.csv",
)
KNOWN = (
    r"dataset_(?!dict|info)\w+\.json|annotation\.json|"
    r"flickr_annotations_\w+\.csv|(Flickr8k|results_20130124)\.token(\.txt)?"
)
"""Published names of tables that hold all splits: Karpathy, R2Gen, Flickr8k and Flickr30k."""
LOOKED_FOR = (
    "{split}_captions.csv and the like (ROCOv2, ImageCLEF), {split}-*.parquet, {split}/metadata.csv or .jsonl, "
    "default/{split}/*.parquet, annotations/captions_{split}*.json or {split}.json (COCO, VizWiz), "
    "*_karpathy_{split}.json (BLIP, LAVIS), {split}/radiology/captions.txt (ROCO), {split}.jsonl, .csv, .tsv or "
    "{split}.json, images in {split}/ each with a text file of the same name, dataset_*.json (Karpathy), "
    f"annotation.json (R2Gen), Flickr8k.token.txt, {', '.join(SINGLE)}, where split is train, valid or test"
)


@dataclass(frozen=True)
class Listing:
    """The names of the folders and files in a directory, sorted, without hidden entries."""

    directory: Path
    folders: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path) -> Listing:
        """List a directory. One that does not exist is empty. Raises UsageError if it cannot be listed."""
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file() or not os.path.exists(entry.path):  # noqa: PTH110 (broken links count, pipes and devices do not)
                        files.append(entry.name)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise UsageError(f"{directory} cannot be listed: {error.strerror}") from error
        return cls(directory, tuple(sorted(folders)), tuple(sorted(files)))

    def of_split(self, split: str) -> list[Path]:
        """Return the folders of a split, shortest names first: train before train_images."""
        names = [name for name in self.folders if split_of(name) == split]
        return [self.directory / name for name in sorted(names, key=lambda name: (len(name), name))]


@dataclass(frozen=True)
class SplitFiles:
    """The file with the captions of a split, and the folders that may hold its images: (folder, with subfolders).

    `one_each`: the layout has one caption per image. `parquet`: the files, if images and captions are inside parquet.
    `lists`: (split, file with its ids), if one table holds all splits.
    """

    captions: Path
    folders: tuple[tuple[Path, bool], ...]
    concepts: Path | None = None
    one_each: bool = False
    parquet: tuple[Path, ...] = ()
    lists: tuple[tuple[str, Path], ...] = ()


def split_of(name: str) -> str | None:
    """Return the split that a file or folder name contains, or None if it contains no split or more than one.

    `train2017` is "train", `trainval` is None.
    """
    words = {re.sub(r"\d+$", "", word) for word in re.split(r"[^a-z0-9]+", name.lower())}
    splits = [split for split, aliases in SPLITS.items() if words & set(aliases)]
    return splits[0] if len(splits) == 1 else None


def split_of_path(paths: Sequence[str]) -> list[str | None]:
    """Return the split of each path, from the name of its first folder. Folders that all paths share are skipped.

    `train/a.png` is "train". For `images/train/a.png` and `images/test/b.png`, the second folder counts.
    """
    folders = [spelled(path).split("/")[:-1] for path in paths]
    while True:
        splits = [split_of(parts[0]) if parts else None for parts in folders]
        if any(splits) or not all(folders) or len({parts[0] for parts in folders}) > 1:
            return splits
        folders = [parts[1:] for parts in folders]


def find_source(root: Listing, split: str) -> SplitFiles | None:
    """Return the files of a split, or None if no layout fits. Raises DataError if more than one file fits."""
    return next(filter(None, (layout(root, split) for layout in LAYOUTS)), None)


def find_table(root: Listing) -> SplitFiles | None:
    """Return the table (or folder of images and text files) of a directory that has no separate files per split."""
    for here in (root, *(Listing.of(root.directory / name) for name in root.folders if "text" in name.lower())):
        known = [name for name in here.files if re.fullmatch(KNOWN, name)]
        name = next((name for name in (*known, *SINGLE) if name in here.files), None)
        if name is not None:
            # Flickr8k's lists of images by split: Flickr_8k.trainImages.txt and similar names.
            matches = (re.fullmatch(r"(?i).*?\b(train|val|dev|test)Images\.txt", file) for file in here.files)
            lists = tuple((split_of(match[1]) or "", here.directory / match[0]) for match in matches if match)
            return SplitFiles(here.directory / name, _image_folders(root), lists=lists)
    if find_sidecars(root.directory):
        return _next_to_images(root.directory)
    return None


def _image_folders(root: Listing, split: str = "", first: tuple[Path, ...] = ()) -> tuple[tuple[Path, bool], ...]:
    """Return the folders that may hold the images of a split, as (folder, with subfolders).

    The directory itself comes last, first without and then with its subfolders.
    """
    images = Listing.of(root.directory / "images")
    split_folders = root.of_split(split) if split else []
    folders = [*first, *(folder / "images" for folder in split_folders), *split_folders]
    folders += [*(images.of_split(split) if split else []), images.directory]
    return (*((folder, True) for folder in folders), (root.directory, False), (root.directory, True))


def _parquet(root: Listing, split: str) -> SplitFiles | None:
    """Find {split}-*.parquet in the directory or in data/, or *.parquet in {split}/ or default/{split}/."""
    for here in (root, Listing.of(root.directory / "data")):
        files = [name for name in here.files if name.lower().endswith(".parquet") and split_of(name) == split]
        if files:
            paths = tuple(here.directory / name for name in files)
            return SplitFiles(paths[0], (), parquet=paths)
    for here in (root, Listing.of(root.directory / "default")):  # the hub's converted data sets: default/train/
        for folder in here.of_split(split):
            paths = tuple(sorted(path for path in folder.glob("*.parquet") if path.name not in METADATA))
            if paths:
                return SplitFiles(paths[0], (), parquet=paths)
    return None


def _captions_file(root: Listing, split: str) -> SplitFiles | None:
    """Find {split}_captions.csv and similar names (ROCOv2, ImageCLEF) in the directory or in the split's folder."""
    for here in (root, *map(Listing.of, root.of_split(split))):
        allowed = TABLES if here is root else (".csv", ".tsv")
        named = [name for name in here.files if split_of(name) == split and name.lower().endswith(allowed)]
        exact = [name for name in named if _is_exactly(name, split, ("captions", "caption"))]
        loose = [name for name in named if "caption" in name.lower()]
        labels = [name for name in named if _is_exactly(name, split, ("labels",))]
        candidates = exact or [
            name for name in loose or labels if not (name.lower().endswith(DELIMITED) and _is_concepts(here, name))
        ]
        if candidates:
            captions = here.directory / _require_one(here, candidates, f"captions of {split}")
            concepts = _concepts_file(here, split, captions.name)
            return SplitFiles(captions, _image_folders(root, split), concepts, captions.suffix.lower() in DELIMITED)
    return None


def _concepts_file(here: Listing, split: str, captions: str) -> Path | None:
    """Return {split}_concepts.csv, else the only table of the split that names concepts in its name or header."""
    named = [name for name in here.files if split_of(name) == split and name.lower().endswith(DELIMITED)]
    named = [name for name in named if name != captions]
    exact = [name for name in named if _is_exactly(name, split, ("concepts",))]
    words = {name: re.split(r"[^a-z]+", name.lower()) for name in named}
    loose = [n for n in named if any(w.startswith(("concept", "cui")) for w in words[n]) or _is_concepts(here, n)]
    candidates = exact or loose
    return here.directory / _require_one(here, candidates, f"concepts of {split}") if candidates else None


def _is_exactly(name: str, split: str, words: tuple[str, ...]) -> bool:
    return Path(name).stem.lower() in {f"{alias}_{word}" for alias in SPLITS[split] for word in words}


def _is_concepts(here: Listing, name: str) -> bool:
    """Return whether a header names concepts and no captions. Both tasks of ImageCLEF have a {split}_labels.csv."""
    try:
        with (here.directory / name).open("rb") as stream:
            header = stream.readline(4096).decode("utf-8-sig", "replace").lower()
    except OSError as error:
        raise UsageError(f"{here.directory / name} cannot be read: {error.strerror}") from error
    words = {word.strip("\" \r\n'") for word in re.split(r"[,\t|]", header)}
    return bool(words & set(CONCEPT_COLUMNS)) and find_column(words, CAPTION_COLUMNS) is None


def _require_one(here: Listing, names: list[str], what: str) -> str:
    if len(names) > 1:
        raise DataError(
            f"{here.directory} contains more than one file with {what}: {join_some(names)}: keep one, move the others"
        )
    return names[0]


def _imagefolder(root: Listing, split: str) -> SplitFiles | None:
    """Find {split}/metadata.csv, .jsonl or .parquet, the imagefolder layout of Hugging Face."""
    for folder in root.of_split(split):
        name = next((name for name in METADATA if (folder / name).is_file()), None)
        if name is not None:
            return SplitFiles(folder / name, _image_folders(root, split, (folder,)), one_each=True)
    return None


def _coco(root: Listing, split: str) -> SplitFiles | None:
    """Find the JSON files of COCO, VizWiz (annotations/train.json), BLIP and LAVIS (coco_karpathy_train.json)."""
    for here, words in ((Listing.of(root.directory / "annotations"), ("caption", "karpathy")), (root, ("karpathy",))):
        of_split = [name for name in here.files if name.lower().endswith(".json") and split_of(name) == split]
        plain = [name for name in of_split if here is not root and Path(name).stem.lower() in SPLITS[split]]
        names = [name for name in of_split if any(word in name.lower() for word in words)] or plain
        if names:
            captions = here.directory / _require_one(here, names, f"captions of {split}")
            return SplitFiles(captions, _image_folders(root, split))
    return None


def _roco(root: Listing, split: str) -> SplitFiles | None:
    """Find {split}/radiology/captions.txt of ROCO, or *data.csv in Kaggle's copy of it."""
    for folder in root.of_split(split):
        tables = sorted((folder / "radiology").glob("*data.csv"))  # Kaggle's copy has other image names
        captions = tables[0] if tables else folder / "radiology" / "captions.txt"
        if captions.is_file():
            return SplitFiles(captions, ((folder / "radiology" / "images", True),), one_each=True)
    return None


def _file_of_split(root: Listing, split: str) -> SplitFiles | None:
    """Find a table named after the split, such as train.jsonl or train.csv."""
    # Not .txt: train.txt is often a list of ids.
    wanted = [alias + suffix for alias in SPLITS[split] for suffix in TABLES if suffix != ".txt"]
    names = [name for name in root.files if name.lower() in wanted]
    if not names:
        return None
    return SplitFiles(root.directory / _require_one(root, names, f"captions of {split}"), _image_folders(root, split))


def _text_files(root: Listing, split: str) -> SplitFiles | None:
    """Find a folder of the split that holds images, each with a text file of the same name."""
    for folder in root.of_split(split):
        if find_sidecars(folder):
            return _next_to_images(folder)
    return None


def _next_to_images(folder: Path) -> SplitFiles:
    return SplitFiles(folder, ((folder, False), (folder, True)), one_each=True)


LAYOUTS = (_parquet, _captions_file, _imagefolder, _coco, _roco, _file_of_split, _text_files)
"""Layouts in the order in which they are tried: the most specific first, text files next to images last."""


def read_concepts(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a table with the columns ID and CUIs, delimited by commas, TABs or bars, into {id: concepts}.

    Raises DataError naming file and line.
    """
    text, separator = table_text(path)
    line = text.lstrip("\r\n").partition("\n")[0]
    delimiter = separator or next((character for character in DELIMITERS if character in line), ",")
    rows = read_rows(path, text, delimiter)
    header = rows[0][1] if rows else []
    id_index, concepts_index = find_column(header, ID_COLUMNS), find_column(header, CONCEPT_COLUMNS)
    if id_index is None or concepts_index is None:
        raise DataError(f"{path} is not a table of concepts: its header needs the columns ID and CUIs")
    concepts = {}
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: {counted(len(row), 'column')}, but the header has {len(header)}")
        concepts[row[id_index]] = tuple(split_concepts(row[concepts_index]))
    return concepts


MAX_FILES = 100_000
"""About how many files are listed to describe an unknown directory."""
REMEDIES = {
    ".arrow": "a folder of save_to_disk(): write each split with to_parquet('SPLIT-00000-of-00001.parquet')",
    ".tar": "shards in tar files: unpack them into images, each with a text file of the same name",
    ".zip": "packed: unpack it",
    ".gz": "packed: unpack it",
    ".tfrecord": "TFRecord: write the images as files, and captions.csv with the columns file_name and caption",
    ".h5": "HDF5: write the images as files, and captions.csv with the columns file_name and caption",
    ".hdf5": "HDF5: write the images as files, and captions.csv with the columns file_name and caption",
    ".pkl": "pickle, not opened because it can run code: write captions.csv with the columns file_name and caption",
}
"""What to do with files that no layout reads, by suffix."""


def describe_unknown(root: Listing) -> str:
    """Describe an unknown directory: its files, the closest layout, and what is missing for that layout."""
    files: list[str] = []
    for here, folders, names in os.walk(root.directory):
        folders.sort()
        files += [os.path.relpath(Path(here, name), root.directory) for name in sorted(names)]
        if len(files) > MAX_FILES:
            break
    if not files:
        return "it contains no files"
    shown = [name for name in files if not Path(name).name.startswith(".")]
    inside = f" in the folders {join_some(root.folders, 4)}" if root.folders else ""
    return f"it contains {count_kinds(files)}{inside}; {_suggest_layout(root, shown)}"


def _suggest_layout(root: Listing, files: list[str]) -> str:
    counts = Counter(Path(name).suffix.lower() for name in files)
    for suffix, remedy in REMEDIES.items():
        if counts[suffix]:
            return f"{suffix} is {remedy}"
    images = sum(counts[suffix] for suffix in SUFFIXES)
    if tables := [name for name in root.files if _holds_captions(root.directory / name)]:
        return f"{tables[0]} contains captions: name it captions{Path(tables[0]).suffix.lower()}, or after its split"
    delimited = [name for name in root.files if name.lower().endswith((".csv", ".tsv"))]
    if delimited:
        return (
            f"the closest layout is one table for all splits, but {delimited[0]} lacks a column of ids "
            f"({', '.join(ID_COLUMNS)}) or of captions ({', '.join(CAPTION_COLUMNS)}): name it captions.csv and set "
            "--id-column and --caption-column"
        )
    if not images:
        return "images and captions are missing"
    splits = [name for name in root.folders if split_of(name) in SPLITS]
    table = f"{splits[0]}/metadata.csv" if splits else "captions.csv"
    return (
        f"the closest layout is images with text files, but none of the {images} images has a text file of the same "
        f"name, and there is no {table} with the columns file_name and caption"
    )


def _holds_captions(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix not in (*DELIMITED, ".json", ".jsonl"):
        return False
    try:
        if suffix in DELIMITED:  # read_table accepts tables without a header too, which any table could be
            header = re.split(r"[,\t|;]", read_text(path).partition("\n")[0])
            if find_column(header, CAPTION_COLUMNS) is None:
                return False
        return bool(read_table(path).captions)
    except (DataError, UsageError):
        return False

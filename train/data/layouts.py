"""Where a data set directory keeps captions, concepts and pictures of a split; reads file names and headers only."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DataError, UsageError
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
"""Splits by our name, with the names others give them."""
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
"""Names of one table for all splits under which data sets are shipped: Karpathy's, R2Gen, Flickr's."""
LOOKED_FOR = (
    "{split}_captions.csv and the like (ROCOv2, ImageCLEF), {split}-*.parquet, {split}/metadata.csv or .jsonl, "
    "default/{split}/*.parquet, annotations/captions_{split}*.json or {split}.json (COCO, VizWiz), "
    "*_karpathy_{split}.json (BLIP, LAVIS), {split}/radiology/captions.txt (ROCO), {split}.jsonl, .csv, .tsv or "
    "{split}.json, pictures in {split}/ with a text file beside each, dataset_*.json (Karpathy), annotation.json "
    f"(R2Gen), Flickr8k.token.txt, {', '.join(SINGLE)}, where split is train, valid or test"
)


@dataclass(frozen=True)
class Listing:
    """A directory's entries that are not hidden, sorted: names of its folders and of its files."""

    directory: Path
    folders: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path) -> Listing:
        """List a directory, an empty one where there is none; raise UsageError when it cannot be listed."""
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file() or not os.path.exists(entry.path):  # noqa: PTH110 (not a pipe or a device)
                        files.append(entry.name)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise UsageError(f"{directory} cannot be listed: {error.strerror}") from error
        return cls(directory, tuple(sorted(folders)), tuple(sorted(files)))

    def of_split(self, split: str) -> list[Path]:
        """Return the folders of a split, those with the plainest names first: train before train_images."""
        own = [name for name in self.folders if split_of(name) == split]
        return [self.directory / name for name in sorted(own, key=lambda name: (len(name), name))]


@dataclass(frozen=True)
class SplitFiles:
    """Where the captions of a split are, and which folders may hold its pictures, with what is in them or without.

    `one_each`: the layout has one caption an image. `parquet`: the files that hold pictures and captions, if they do.
    `lists`: the ids of each split, where one table holds all.
    """

    captions: Path
    folders: tuple[tuple[Path, bool], ...]
    concepts: Path | None = None
    one_each: bool = False
    parquet: tuple[Path, ...] = ()
    lists: tuple[tuple[str, Path], ...] = ()


def split_of(name: str) -> str | None:
    """Return the split a file or folder is named after, None for none or several: train2017 is, trainval is not."""
    words = {re.sub(r"\d+$", "", word) for word in re.split(r"[^a-z0-9]+", name.lower())}
    found = [split for split, aliases in SPLITS.items() if words & set(aliases)]
    return found[0] if len(found) == 1 else None


def split_of_path(paths: Sequence[str]) -> list[str | None]:
    """Return the split that the folder of each path is named after: the first folder, or the first that differs.

    `train/a.png` is of train. Of `images/train/a.png` and `images/test/b.png` the second folder counts.
    """
    folders = [spelled(path).split("/")[:-1] for path in paths]
    while True:
        splits = [split_of(parts[0]) if parts else None for parts in folders]
        if any(splits) or not all(folders) or len({parts[0] for parts in folders}) > 1:
            return splits
        folders = [parts[1:] for parts in folders]


def find_source(place: Listing, split: str) -> SplitFiles | None:
    """Return where a split is, None when no layout fits; raise DataError when two files could be meant."""
    for layout in LAYOUTS:
        source = layout(place, split)
        if source is not None:
            return source
    return None


def find_table(place: Listing) -> SplitFiles | None:
    """Return the one table (or folder of pictures and text files) of a directory without files for each split."""
    for here in (place, *(Listing.of(place.directory / name) for name in place.folders if "text" in name.lower())):
        known = [name for name in here.files if re.fullmatch(KNOWN, name)]
        name = next((name for name in (*known, *SINGLE) if name in here.files), None)
        if name is not None:
            return SplitFiles(here.directory / name, _picture_folders(place), lists=_split_lists(here))
    if find_sidecars(place.directory):
        return _beside_pictures(place.directory)
    return None


def _split_lists(here: Listing) -> tuple[tuple[str, Path], ...]:
    """Return Flickr8k's lists of pictures by split: Flickr_8k.trainImages.txt and names like it."""
    named = {name: re.fullmatch(r"(?i).*?\b(train|val|dev|test)Images\.txt", name) for name in here.files}
    return tuple((split_of(match[1]) or "", here.directory / name) for name, match in named.items() if match)


def _picture_folders(place: Listing, split: str = "", first: tuple[Path, ...] = ()) -> tuple[tuple[Path, bool], ...]:
    """Return the folders that may hold the pictures of a split; the directory itself comes last, flat and then deep."""
    images = Listing.of(place.directory / "images")
    own = place.of_split(split) if split else []
    folders = [*first, *(folder / "images" for folder in own), *own]
    folders += [*(images.of_split(split) if split else []), images.directory]
    return (*((folder, True) for folder in folders), (place.directory, False), (place.directory, True))


def _parquet(place: Listing, split: str) -> SplitFiles | None:
    for here in (place, Listing.of(place.directory / "data")):
        files = [name for name in here.files if name.lower().endswith(".parquet") and split_of(name) == split]
        if files:
            paths = tuple(here.directory / name for name in files)
            return SplitFiles(paths[0], (), parquet=paths)
    for here in (place, Listing.of(place.directory / "default")):  # as the hub converts data sets: default/train/
        for folder in here.of_split(split):
            paths = tuple(sorted(path for path in folder.glob("*.parquet") if path.name not in METADATA))
            if paths:
                return SplitFiles(paths[0], (), parquet=paths)
    return None


def _captions_file(place: Listing, split: str) -> SplitFiles | None:
    """ROCOv2 and ImageCLEF: {split}_captions.csv and names like it, in the directory or in the split's folder."""
    for here in (place, *map(Listing.of, place.of_split(split))):
        allowed = TABLES if here is place else (".csv", ".tsv")
        named = [name for name in here.files if split_of(name) == split and name.lower().endswith(allowed)]
        exact = [name for name in named if _is_exactly(name, split, ("captions", "caption"))]
        loose = [name for name in named if "caption" in name.lower()]
        labels = [name for name in named if _is_exactly(name, split, ("labels",))]
        candidates = exact or [
            name for name in loose or labels if not (name.lower().endswith(DELIMITED) and _is_concepts(here, name))
        ]
        if candidates:
            captions = here.directory / _only(here, candidates, f"captions of {split}")
            concepts = _concepts_file(here, split, captions.name)
            return SplitFiles(captions, _picture_folders(place, split), concepts, captions.suffix.lower() in DELIMITED)
    return None


def _concepts_file(here: Listing, split: str, captions: str) -> Path | None:
    """Return {split}_concepts.csv, or else the one file whose name or header speaks of the split's concepts."""
    named = [name for name in here.files if split_of(name) == split and name.lower().endswith(DELIMITED)]
    named = [name for name in named if name != captions]
    exact = [name for name in named if _is_exactly(name, split, ("concepts",))]
    loose = [name for name in named if _speaks_of_concepts(name) or _is_concepts(here, name)]
    candidates = exact or loose
    return here.directory / _only(here, candidates, f"concepts of {split}") if candidates else None


def _is_exactly(name: str, split: str, words: tuple[str, ...]) -> bool:
    return Path(name).stem.lower() in {f"{alias}_{word}" for alias in SPLITS[split] for word in words}


def _speaks_of_concepts(name: str) -> bool:
    return any(word.startswith(("concept", "cui")) for word in re.split(r"[^a-z]+", name.lower()))


def _is_concepts(here: Listing, name: str) -> bool:
    """Return whether a header names concepts and no captions: both tasks of ImageCLEF have a {split}_labels.csv."""
    try:
        with (here.directory / name).open("rb") as stream:
            header = stream.readline(4096).decode("utf-8-sig", "replace").lower()
    except OSError as error:
        raise UsageError(f"{here.directory / name} cannot be read: {error.strerror}") from error
    words = {word.strip("\" \r\n'") for word in re.split(r"[,\t|]", header)}
    return bool(words & set(CONCEPT_COLUMNS)) and find_column(words, CAPTION_COLUMNS) is None


def _only(here: Listing, names: list[str], what: str) -> str:
    if len(names) > 1:
        raise DataError(
            f"{here.directory} holds several files of {what}: {join_some(names)}: keep one, move the others"
        )
    return names[0]


def _imagefolder(place: Listing, split: str) -> SplitFiles | None:
    for folder in place.of_split(split):
        name = next((name for name in METADATA if (folder / name).is_file()), None)
        if name is not None:
            return SplitFiles(folder / name, _picture_folders(place, split, (folder,)), one_each=True)
    return None


def _coco(place: Listing, split: str) -> SplitFiles | None:
    """COCO, VizWiz (annotations/train.json), and the files that BLIP and LAVIS ship (coco_karpathy_train.json)."""
    for here, words in ((Listing.of(place.directory / "annotations"), ("caption", "karpathy")), (place, ("karpathy",))):
        of_split = [name for name in here.files if name.lower().endswith(".json") and split_of(name) == split]
        plain = [name for name in of_split if here is not place and Path(name).stem.lower() in SPLITS[split]]
        names = [name for name in of_split if any(word in name.lower() for word in words)] or plain
        if names:
            captions = here.directory / _only(here, names, f"captions of {split}")
            return SplitFiles(captions, _picture_folders(place, split))
    return None


def _roco(place: Listing, split: str) -> SplitFiles | None:
    for folder in place.of_split(split):
        tables = sorted((folder / "radiology").glob("*data.csv"))  # Kaggle's copy: its pictures have names of their own
        captions = tables[0] if tables else folder / "radiology" / "captions.txt"
        if captions.is_file():
            return SplitFiles(captions, ((folder / "radiology" / "images", True),), one_each=True)
    return None


def _file_of_split(place: Listing, split: str) -> SplitFiles | None:
    wanted = [alias + suffix for alias in SPLITS[split] for suffix in TABLES if suffix != ".txt"]  # often mere ids
    names = [name for name in place.files if name.lower() in wanted]
    if not names:
        return None
    return SplitFiles(place.directory / _only(place, names, f"captions of {split}"), _picture_folders(place, split))


def _sidecars(place: Listing, split: str) -> SplitFiles | None:
    for folder in place.of_split(split):
        if find_sidecars(folder):
            return _beside_pictures(folder)
    return None


def _beside_pictures(folder: Path) -> SplitFiles:
    return SplitFiles(folder, ((folder, False), (folder, True)), one_each=True)


LAYOUTS = (_parquet, _captions_file, _imagefolder, _coco, _roco, _file_of_split, _sidecars)
"""In this order: pictures inside parquet first, what is told by the least (text files beside pictures) last."""


def read_concepts(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a table headed ID and CUIs, delimited by commas, TABs or bars; raise DataError naming file and line."""
    text, separator = table_text(path)
    line = text.lstrip("\r\n").partition("\n")[0]
    delimiter = separator or next((one for one in DELIMITERS if one in line), ",")
    rows = read_rows(path, text, delimiter)
    header = rows[0][1] if rows else []
    place_of_id, place_of_concepts = find_column(header, ID_COLUMNS), find_column(header, CONCEPT_COLUMNS)
    if place_of_id is None or place_of_concepts is None:
        raise DataError(f"{path} is not a table of concepts: its header does not name ID and CUIs")
    concepts = {}
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: {len(row)} columns where the header has {len(header)}")
        concepts[row[place_of_id]] = tuple(split_concepts(row[place_of_concepts]))
    return concepts


MOST_SEEN = 100_000
"""Files looked at below a directory: enough to tell what it is."""
REMEDIES = {
    ".arrow": "a folder of save_to_disk(): write each split with to_parquet('SPLIT-00000-of-00001.parquet')",
    ".tar": "shards in tar files: unpack them, pictures with a text file of the same name beside each are read",
    ".zip": "packed: unpack it",
    ".gz": "packed: unpack it",
    ".tfrecord": "TFRecord: write pictures as files, and captions.csv with the columns file_name and caption",
    ".h5": "HDF5: write pictures as files, and captions.csv with the columns file_name and caption",
    ".hdf5": "HDF5: write pictures as files, and captions.csv with the columns file_name and caption",
    ".pkl": "pickles, which are not opened: they run code. Write captions.csv with the columns file_name and caption",
}
"""What to do with files that no layout reads."""


def describe_unknown(place: Listing) -> str:
    """Return what was seen in a directory, the closest layout, and what is missing for it."""
    files = _files_below(place.directory)
    if not files:
        return "it holds no files"
    shown = [name for name in files if not Path(name).name.startswith(".")]
    return f"it holds {count_kinds(files)}{_folders(place)}; {_closest(place, shown)}"


def _files_below(directory: Path) -> list[str]:
    found: list[str] = []
    for here, folders, files in os.walk(directory):
        folders.sort()
        found += [os.path.relpath(Path(here, name), directory) for name in sorted(files)]
        if len(found) > MOST_SEEN:
            break
    return found


def _folders(place: Listing) -> str:
    return f" in the folders {join_some(place.folders, 4)}" if place.folders else ""


def _closest(place: Listing, files: list[str]) -> str:
    counts = Counter(Path(name).suffix.lower() for name in files)
    for suffix, remedy in REMEDIES.items():
        if counts[suffix]:
            return f"{suffix} is {remedy}"
    pictures = sum(counts[suffix] for suffix in SUFFIXES)
    if tables := [name for name in place.files if _is_of_captions(place.directory / name)]:
        return f"{tables[0]} holds captions: name it captions{Path(tables[0]).suffix.lower()}, or after its split"
    delimited = [name for name in place.files if name.lower().endswith((".csv", ".tsv"))]
    if delimited:
        return (
            f"closest is one table for all, but {delimited[0]} has no column of ids ({', '.join(ID_COLUMNS)}) with one "
            f"of captions ({', '.join(CAPTION_COLUMNS)}): name it captions.csv and give --id-column, --caption-column"
        )
    if not pictures:
        return "pictures are missing, and their captions"
    splits = [name for name in place.folders if split_of(name) in SPLITS]
    table = f"{splits[0]}/metadata.csv" if splits else "captions.csv"
    return (
        f"closest are pictures with captions beside them, but none of the {pictures} pictures has a text file of its "
        f"name, and there is no {table} with the columns file_name and caption"
    )


def _is_of_captions(path: Path) -> bool:
    if path.suffix.lower() not in (*DELIMITED, ".json", ".jsonl"):
        return False
    try:
        if path.suffix.lower() in DELIMITED and not _heads_captions(path):
            return False
        return bool(read_table(path).captions)
    except (DataError, UsageError):
        return False


def _heads_captions(path: Path) -> bool:
    header = read_text(path).partition("\n")[0]
    return find_column(re.split(r"[,\t|;]", header), CAPTION_COLUMNS) is not None

"""What is in a directory of no known layout, in one line: what was seen, the closest layout, and what it lacks."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from engine.errors import DataError, UsageError
from engine.inputs.columns import CAPTION_COLUMNS, ID_COLUMNS, find_column
from engine.inputs.delimited import read_text
from engine.inputs.ids import join_some
from engine.inputs.kinds import SUFFIXES, count_kinds
from engine.inputs.tables import read_table
from train.data.layouts import DELIMITED, SPLITS, Listing, split_of

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

"""`engine duplicates`: find test images that have a twin in training, or twins within a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.cli.shared import LOCATION, PATH, log
from engine.errors import UsageError, counted
from engine.options import CLIP, DEPTH_HELP, window_of

if TYPE_CHECKING:  # for a quick --help
    from engine.inputs.remote import Location


@click.command()
@click.option(
    "--input",
    "inputs",
    type=LOCATION,
    multiple=True,
    required=True,
    help="Folder, URI, image, pattern or list of the images to check, as for `caption`; repeatable.",
)
@click.option(
    "--against",
    type=LOCATION,
    multiple=True,
    help="Images to look for twins in, such as the training images; repeatable. Default: the --input images.",
)
@click.option(
    "--out", type=PATH, required=True, help="CSV file to write, with the columns ID,twin,kind,distance,group."
)
@click.option("--page", type=PATH, help="Also write an HTML file that shows the pairs.")
@click.option("--recursive", is_flag=True, help="Also look for images in subfolders.")
@click.option(
    "--ids",
    type=click.Choice(("stem", "path", "file")),
    default="stem",
    show_default=True,
    help="Image ids: file name without suffix, path inside the input without suffix, or that path with suffix.",
)
@click.option(
    "--dicom-frame", type=click.IntRange(0), default=0, show_default=True, help="Frame of DICOM files, counted from 0."
)
@click.option("--high-bit-depth", default=CLIP, show_default=True, help=DEPTH_HELP)
def duplicates(
    inputs: tuple[Location, ...],
    against: tuple[Location, ...],
    out: Path,
    page: Path | None,
    recursive: bool,
    ids: str,
    dicom_frame: int,
    high_bit_depth: str,
) -> None:
    """Find images that are twins: the same file, or the same image resized, saved again, mirrored or cropped.

    Compares all images of --input with all of --against, or with each other. Similar images that are not twins, such as
    neighbouring slices of one volume, have the kind `near`.
    """
    from engine.files.atomic import check_outputs, write_atomically
    from engine.inputs import twins
    from engine.inputs.ids import join_some
    from engine.inputs.images import FindOptions
    from engine.inputs.paths import find_inputs
    from engine.inputs.pixels import note_lines

    window_of(high_bit_depth)
    outputs = {name: path for name, path in (("--out", out), ("--page", page)) if path is not None}
    check_outputs(outputs, [path for path in (*inputs, *against) if isinstance(path, Path)])
    options = FindOptions(recursive, dicom_frame, ids, high_bit_depth)
    sides, notes = [], []
    for locations in filter(None, (inputs, against)):
        images = find_inputs(locations, options).images
        name = str(locations[0]) if len(locations) == 1 else f"{len(locations)} inputs"
        with _progress_bar(len(images), f"reading {name}") as advance:
            prints = twins.fingerprint(images, advance)
        if len(prints.unreadable) == len(images):
            raise UsageError(
                f"{name}: none of {counted(len(images), 'image')} can be read, for example "
                f"{images[0].source}: {prints.unreadable[0]}"
            )
        notes += prints.notes
        sides.append((name, images, prints))
        only_bytes = "compared by their bytes only"
        if prints.unreadable:
            reasons = [f"{images[i].source} ({reason})" for i, reason in prints.unreadable.items()]
            log(f"note: {len(reasons)} images of {name} cannot be read and are {only_bytes}: {join_some(reasons, 3)}")
        if prints.flat:
            files = [str(images[i].source) for i in prints.flat]
            log(f"note: {len(files)} images of {name} have a single colour and are {only_bytes}: {join_some(files, 3)}")
    for line in note_lines(notes):
        log(f"note: {line}")
    name, images, prints = sides[0]
    other = sides[1] if against else None
    with _progress_bar(len(images), "comparing") as advance:
        pairs = twins.find_twins(prints, other and other[2], advance)
    write_atomically(out, twins.twins_csv(pairs, [i.id for i in images], other and [i.id for i in other[1]]))
    if page is not None:
        from engine.report.pairs import Side, write_pairs_page

        write_pairs_page(page, pairs, Side(name, images), other and Side(other[0], other[1]))
    counts = twins.count_kinds(pairs)
    near = counts.pop(twins.NEAR, 0)
    where = f"in {other[0]}" if other else f"earlier in {name}"
    kinds = f" ({', '.join(f'{kind} {count}' for kind, count in counts.items())})" if counts else ""
    twinned = f"{sum(counts.values())} of {counted(len(images), 'image has', 'images have')} a twin {where}{kinds}"
    only_near = counted(near, "other has only a near image", "others have only a near image")
    log(f"{twinned}; {only_near} -> {', '.join(map(str, outputs.values()))}")


@contextmanager
def _progress_bar(length: int, label: str) -> Iterator[Callable[[int], None]]:
    with click.progressbar(length=length, label=label, file=sys.stderr, show_pos=True) as bar:
        yield bar.update

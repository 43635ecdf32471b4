"""Compute and plot statistics of a data set: caption lengths, modalities, image sizes, duplicates and overlaps."""

from __future__ import annotations

import hashlib
import json
import stat
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import EngineError, ImageError, OutputError, UsageError, counted
from engine.files.atomic import write_atomically
from engine.inputs.images import ImageFile, is_dicom
from engine.inputs.pixels import MAX_FILE_BYTES, SYSTEM_TROUBLE, decode_image, image_errors, open_image
from engine.inputs.twins import NEAR, count_kinds, find_twins, fingerprint
from engine.options import CLIP, window_of
from train.data.dataset import DataInputs, read_dataset
from train.data.examples import Example, Split, check_split, in_threads

COLOURS = {"train": "#3b5b92", "valid": "#c98b2b", "test": "#0b6e4f"}
MAX_TOKENS = 200
"""The default of the recipes: captions with more tokens are cut."""
SHOWN = 0.99
"""Smallest fraction of a split's captions that a plot of lengths shows. A cut tail is noted in the axis label."""


Stats = dict[str, Any]


def draw_dataset(stats: Stats, out: Path) -> None:
    """Plot caption lengths (in words, and in tokens if they were counted) and modalities by split into a PNG.

    Values are percentages of each split, so that a small split can be compared with a large one. Raises OutputError if
    the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    splits = stats["splits"]
    units = [unit for unit in ("words", "tokens") if any(split[unit] for split in splits.values())]
    has_modalities = any(split["modalities"]["with_concepts"] for split in splits.values())
    panels = max(1, len(units) + has_modalities)
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.4), layout="constrained", squeeze=False)
    try:
        for unit, panel in zip(units, axes[0], strict=False):
            _draw_lengths(panel, {name: split[unit] for name, split in splits.items() if split[unit]}, unit)
        if has_modalities:
            _draw_modalities(axes[0][-1], {name: split["modalities"] for name, split in splits.items()})
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        plt.close(figure)


def _draw_lengths(panel: Any, lengths: dict[str, Stats], unit: str) -> None:
    """Draw a step plot of caption lengths, as percentages of the captions of each split."""
    longest = max(split["max"] for split in lengths.values())
    repeated = [np.repeat([int(length) for length in s["counts"]], [*s["counts"].values()]) for s in lengths.values()]
    most = max(int(np.quantile(one, SHOWN, method="inverted_cdf")) for one in repeated)
    end = min(longest, most * 5 // 4)
    width = max(1, -(-end // 60))
    end += width - 1 - end % width  # makes the last step as wide as the others
    beyond = 0
    for name, split in lengths.items():
        counts = {int(length): count for length, count in split["counts"].items()}
        total = sum(counts.values())
        beyond += sum(count for length, count in counts.items() if length > end)
        shares = [0.0] * (end // width + 1 + (longest <= end))  # a complete curve ends at zero, a cut one does not
        for length, count in counts.items():
            if length <= end:
                shares[length // width] += 100 * count / total
        centres = [i * width + (width - 1) / 2 for i in range(len(shares))]
        label = f"{name}: {counted(total, 'caption')}, median {split['median']:g}"
        panel.plot(centres, shares, drawstyle="steps-mid", linewidth=1.3, color=COLOURS.get(name), label=label)
    captions = sum(sum(split["counts"].values()) for split in lengths.values())
    tail = f"\n({beyond} of {captions} captions are longer, up to {longest}: not shown)" if beyond else ""
    panel.set_xlabel(f"{unit} per caption" + (f", in steps of {width}" if width > 1 else "") + tail)
    panel.set_ylabel("% of the captions of the split")
    panel.set_title(f"Caption length in {unit}")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_modalities(panel: Any, modalities: dict[str, Stats]) -> None:
    """Draw bars of modalities, as percentages of the images of each split, labelled with the number of images."""
    known = next(iter(modalities.values()))["counts"]
    names = [name for name in known if any(split["counts"][name] for split in modalities.values())]
    height = 0.8 / len(modalities)
    for i, (split, stats) in enumerate(modalities.items()):
        images = stats["images"] or 1
        positions = [j + (i - (len(modalities) - 1) / 2) * height for j in range(len(names))]
        counts = [stats["counts"][name] for name in names]
        bars = panel.barh(positions, [100 * n / images for n in counts], height, color=COLOURS.get(split), label=split)
        panel.bar_label(bars, [str(count) for count in counts], fontsize=6.5, padding=2, color="#444")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xlabel("% of the images of the split, and number of images")
    panel.set_title("Modality, from the concepts")
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)


MODALITIES = {
    "C0040405": "X-ray computed tomography",
    "C0024485": "magnetic resonance imaging",
    "C1306645": "plain X-ray",
    "C0041618": "ultrasonography",
    "C0002978": "angiogram",
    "C0032743": "positron-emission tomography",
    "C1699633": "PET/CT",
}
"""UMLS concepts of imaging modalities in ROCOv2 (doi:10.1038/s41597-024-03496-6) and their names."""
NO_MODALITY = "other/none"
FIRST = 5
"""How many duplicates, overlaps and unread images are listed. All of them are counted."""


@dataclass(frozen=True)
class _Header:
    """Size in px, Pillow's mode and sha256 of an image file, or the `reason` why it cannot be read."""

    width: int = 0
    height: int = 0
    mode: str = ""
    digest: str = ""
    reason: str = ""


def inspect_dataset(
    splits: dict[str, Split],
    *,
    count_tokens: Callable[[str], int] | None = None,
    images: bool = True,
) -> Stats:
    """Return statistics of the splits as JSON-compatible dicts.

    `count_tokens` adds caption lengths in tokens, prompts included. With `images`, every file is read once, in threads,
    for the size in its header and the sha256 of its bytes. Only DICOM is decoded. "duplicates" counts images with the
    same bytes and images with the same caption, within splits and between them. "overlaps" counts ids that two splits
    share. Raises EngineError for errors of the system, such as too many open files.
    """
    paths = list(dict.fromkeys(e.image for split in splits.values() for e in split.examples)) if images else []
    headers = dict(zip(paths, in_threads(_read_header, paths), strict=True))
    stats: Stats = {"splits": {name: _describe(split, count_tokens, headers) for name, split in splits.items()}}
    examples = [(name, example) for name, split in splits.items() for example in split.examples]
    stats["duplicates"] = {
        "files": _repeats((name, e.id, headers[e.image].digest) for name, e in examples if e.image in headers),
        "captions": _repeats((name, e.id, e.caption.strip()) for name, e in examples),
    }
    ids = {name: dict.fromkeys(e.id for e in split.examples) for name, split in splits.items()}
    stats["overlaps"] = {}
    for first, second in combinations(ids, 2):
        shared = [name for name in ids[first] if name in ids[second]]
        stats["overlaps"][f"{first} and {second}"] = {"count": len(shared), "first": shared[:FIRST]}
    return stats


def inspect_directory(
    data: DataInputs,
    out: Path,
    log: Callable[[str], None],
    *,
    model: Path | None = None,
    high_bit_depth: str = CLIP,
    twins: bool = True,
) -> bool:
    """Describe a data set with `log`, in out/inspect.json and in out/inspect.png; return whether all of it is usable.

    With `twins`, all images are read once more, to find images of a split that have a twin in another one.
    If `model` is given (the folder of a checkpoint), its tokenizer counts tokens. Captions with more than MAX_TOKENS
    tokens are then listed, and captions that lose accents or words when they are tokenized.
    """
    window_of(high_bit_depth)
    count_tokens, lost_in = None, None
    if model is not None:
        if not model.is_dir():
            raise UsageError(f"--model {model}: there is no such folder")
        from export.checkpoints.settings import read_tokenizer  # imports transformers, which takes seconds
        from train.data.batches import lost_in_tokens

        tokenizer = read_tokenizer(model)
        count_tokens = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
        lost_in = lambda text: lost_in_tokens(tokenizer, text)  # noqa: E731
    splits = read_dataset(data.directory, unpack_into=data.unpack_into, columns=data.columns, log=log)
    stats = inspect_dataset(splits, count_tokens=count_tokens)
    by_split = {
        name: check_split(
            split,
            decode=data.decode_images,
            depth=high_bit_depth,
            count_tokens=count_tokens,
            max_tokens=MAX_TOKENS,
            lost_in=lost_in,
        )
        for name, split in splits.items()
    }
    stats["twins"] = twins_across(splits, high_bit_depth) if twins else {}
    stats["problems"] = {name: asdict(problems) for name, problems in by_split.items()}
    for line in lines(stats):
        log(line)
    for name, problems in by_split.items():
        for line in problems.lines():
            log(f"{name}: {line}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "inspect.json", json.dumps(stats, indent=1) + "\n")
    draw_dataset(stats, out / "inspect.png")
    log(f"-> {out / 'inspect.json'}, {out / 'inspect.png'}")
    return not any(problems.fatal for problems in by_split.values())


def _describe(split: Split, count_tokens: Callable[[str], int] | None, headers: dict[Path, _Header]) -> Stats:
    captions = [example.caption for example in split.examples]
    files = {example.image: example.id for example in split.examples}
    return {
        "captions_file": str(split.captions_file),
        "images": len({example.id for example in split.examples}),
        "captions": len(captions),
        "prompts": sum(bool(example.prompt) for example in split.examples),
        "words": _lengths(len(caption.split()) for caption in captions),
        "tokens": _lengths(count_tokens(example.text) for example in split.examples)
        if count_tokens is not None
        else None,
        "modalities": _modalities(split.examples),
        "sizes": _sizes([(name, headers[path]) for path, name in files.items()]) if headers else None,
    }


def _lengths(lengths: Iterable[int]) -> Stats | None:
    """Return min, median, mean, 95th percentile and max of the lengths, and the number of captions per length."""
    ordered = sorted(lengths)
    if not ordered:
        return None
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "mean": round(statistics.fmean(ordered), 2),
        "p95": ordered[-(-95 * len(ordered) // 100) - 1],
        "max": ordered[-1],
        "counts": {str(length): count for length, count in sorted(Counter(ordered).items())},
    }


def _modalities(examples: list[Example]) -> Stats:
    """Count images by the modality among their concepts. An image with two counts for both, and in "several"."""
    by_image = {example.id: set(example.concepts) for example in examples}
    counts = dict.fromkeys([*MODALITIES.values(), NO_MODALITY], 0)
    several = 0
    for concepts in by_image.values():
        known = [name for concept, name in MODALITIES.items() if concept in concepts]
        several += len(known) > 1
        for name in known or [NO_MODALITY]:
            counts[name] += 1
    with_concepts = sum(map(bool, by_image.values()))
    return {"images": len(by_image), "with_concepts": with_concepts, "several": several, "counts": counts}


def _sizes(headers: list[tuple[str, _Header]]) -> Stats:
    """Return min, median and max of width and height in px, the modes, and the files whose header cannot be read."""
    read = [header for _, header in headers if not header.reason]
    unread = [[name, header.reason] for name, header in headers if header.reason]
    modes = Counter(header.mode for header in read)
    spans = {}
    for side in ("width", "height"):
        values = sorted(getattr(header, side) for header in read)
        spans[side] = {"min": values[0], "median": statistics.median(values), "max": values[-1]} if values else None
    return {
        **spans,
        "modes": dict(modes.most_common()),
        "not_rgb": round(1 - modes["RGB"] / len(read), 4) if read else None,
        "unread": {"count": len(unread), "first": unread[:FIRST]},
    }


def _repeats(items: Iterable[tuple[str, str, Hashable]]) -> Stats:
    """Count contents that several images share. Items are (split, id, content); empty contents are ignored.

    "within" counts, by split, the images that repeat an earlier one. "between" counts contents found in both splits.
    """
    groups: dict[Hashable, list[tuple[str, str]]] = defaultdict(list)
    for split, name, content in dict.fromkeys(items):
        if content:
            groups[content].append((split, name))
    shared = [group for group in groups.values() if len(group) > 1]
    within: Counter[str] = Counter()
    between: Counter[str] = Counter()
    for group in shared:
        counts = Counter(split for split, _ in group)
        within.update({split: count - 1 for split, count in counts.items() if count > 1})
        between.update(" and ".join(pair) for pair in combinations(counts, 2))
    first = [[f"{split}: {name}" for split, name in group[:FIRST]] for group in shared[:FIRST]]
    return {"groups": len(shared), "within": dict(within), "between": dict(between), "first": first}


def twins_across(splits: dict[str, Split], depth: str) -> Stats:
    """Return for each pair of splits how many images of the second have a twin in the first, see engine.inputs.twins.

    "images" counts them, "kinds" by kind, "near" those with only a near image, "first" lists [image, twin, kind].
    """
    if len(splits) < 2:
        return {}
    images = {
        name: [ImageFile(e.id, e.image, depth=depth) for e in {e.image: e for e in split.examples}.values()]
        for name, split in splits.items()
    }
    prints = {name: fingerprint(files) for name, files in images.items()}
    found = {}
    for first, second in combinations(splits, 2):
        pairs = find_twins(prints[second], prints[first])
        kinds = count_kinds(pairs)
        near = kinds.pop(NEAR, 0)
        listed = [p for p in pairs if p.kind != NEAR][:FIRST]
        found[f"{first} and {second}"] = {
            "images": sum(kinds.values()),
            "of": len(images[second]),
            "kinds": kinds,
            "near": near,
            "first": [[images[second][p.first].id, images[first][p.second].id, p.kind] for p in listed],
        }
    return found


def _read_header(path: Path) -> _Header:
    """Read the header of an image file. Raises EngineError for errors of the system."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            return _Header(reason="not a file, or too large")  # opening a pipe would wait for its writer
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if is_dicom(path):
                return _Header(*decode_image(path).size, "DICOM", digest)
            stream.seek(0)
            with image_errors(path), open_image(stream) as image:
                return _Header(*image.size, image.mode, digest)
    except ImageError as error:
        return _Header(reason=error.reason)
    except OSError as error:
        if error.errno in SYSTEM_TROUBLE:
            raise EngineError(f"{path} cannot be read: {error.strerror}") from error
        return _Header(reason=error.strerror or str(error))


def lines(stats: Stats) -> list[str]:
    """Return the statistics as lines for a terminal."""
    out: list[str] = []
    for name, split in stats["splits"].items():
        out.append(
            f"{name}: {counted(split['images'], 'image')}, {counted(split['captions'], 'caption')} "
            f"({split['captions_file']})"
        )
        for unit in ("words", "tokens"):
            span = split[unit]
            if span:
                out.append(
                    f"  {unit} per caption: {span['min']} to {span['max']}, median {span['median']:g}, "
                    f"mean {span['mean']:.1f}, 95 % have at most {span['p95']}"
                )
        if split["prompts"]:
            out.append(f"  prompts: {split['prompts']} of {split['captions']} captions have one; tokens include it")
        modalities, sizes = split["modalities"], split["sizes"]
        if modalities["with_concepts"]:
            counts = ", ".join(f"{name} {count}" for name, count in modalities["counts"].items() if count)
            several = (
                f" ({counted(modalities['several'], 'image has', 'images have')} more than one)"
                if modalities["several"]
                else ""
            )
            out.append(f"  modalities: {counts}{several}")
        else:
            out.append("  modalities: unknown, no concepts")
        if sizes is not None and sizes["width"]:
            spans = [(side, sizes[side]) for side in ("width", "height")]
            sides = "; ".join(
                f"{side} {span['min']} to {span['max']}, median {span['median']:g}" for side, span in spans
            )
            modes = ", ".join(f"{mode} {count}" for mode, count in sizes["modes"].items())
            out.append(f"  pixels: {sides}; {sizes['not_rgb']:.1%} not RGB ({modes})")
        if sizes is not None and sizes["unread"]["count"]:
            unread = sizes["unread"]
            named = ", ".join(f"{name} ({reason})" for name, reason in unread["first"])
            out.append(f"  {unread['count']} of unknown size: {named}" + (", ..." if unread["count"] > FIRST else ""))
    for kind, noun in (("files", "images with the same bytes"), ("captions", "images with the same caption")):
        repeats = stats["duplicates"][kind]
        parts = [f"{count} repeat an earlier one of {name}" for name, count in repeats["within"].items()]
        parts += [f"{count} shared by {pair}" for pair, count in repeats["between"].items()]
        example = f"; for example {', '.join(repeats['first'][0])}" if parts else ""
        out.append(f"{noun}: {', '.join(parts) or 'none'}{example}")
    for pair, shared in stats["overlaps"].items():
        names = f": {', '.join(shared['first'])}" + (", ..." if shared["count"] > FIRST else "")
        out.append(f"ids in {pair}: " + (f"{shared['count']}{names}" if shared["count"] else "none"))
    for pair, twins in stats.get("twins", {}).items():
        first, second = pair.split(" and ")
        kinds = ", ".join(f"{kind} {count}" for kind, count in twins["kinds"].items())
        example = "".join(f"; for example {name} and {twin} ({kind})" for name, twin, kind in twins["first"][:1])
        out.append(
            f"images of {second} with a twin in {first}: {twins['images']} of {twins['of']}"
            f"{f' ({kinds})' if kinds else ''}, {twins['near']} others with only a near image{example}"
        )
    return out

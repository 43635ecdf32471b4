"""Draw what a data set is like, from the numbers of inspect.py."""

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

from engine.errors import EngineError, ImageError, OutputError, UsageError
from engine.files.atomic import write_atomically
from engine.inputs.columns import USUAL, Columns
from engine.inputs.images import is_dicom
from engine.inputs.pixels import CLIP, MAX_FILE_BYTES, SYSTEM_TROUBLE, decode_image, image_errors, open_image, window_of
from train.data.check import Progress, check_split, in_threads
from train.data.dataset import Example, Split, read_dataset

COLOURS = {"train": "#3b5b92", "valid": "#c98b2b", "test": "#0b6e4f"}
SHOWN = 0.99
"""Share of a split's captions that a plot of lengths shows at least; a longer tail is cut, and the axis says so."""


Stats = dict[str, Any]


def draw_dataset(stats: Stats, out: Path) -> None:
    """Draw caption lengths (words, and tokens where they were counted) and modalities by split into a PNG.

    Shares of each split, so that a small one can be compared with a large one. Raises OutputError when the file cannot
    be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    splits = stats["splits"]
    units = [unit for unit in ("words", "tokens") if any(found[unit] for found in splits.values())]
    has_modalities = any(found["modalities"]["with_concepts"] for found in splits.values())
    panels = max(1, len(units) + has_modalities)
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.4), layout="constrained", squeeze=False)
    try:
        for unit, panel in zip(units, axes[0], strict=False):
            _draw_lengths(panel, {name: found[unit] for name, found in splits.items() if found[unit]}, unit)
        if has_modalities:
            _draw_modalities(axes[0][-1], {name: found["modalities"] for name, found in splits.items()})
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        plt.close(figure)


def _draw_lengths(panel: Any, lengths: dict[str, Stats], unit: str) -> None:
    """Steps: share of the captions of each split that have a length."""
    longest = max(found["max"] for found in lengths.values())
    end = min(longest, max(_enough(found["counts"]) for found in lengths.values()) * 5 // 4)
    width = max(1, -(-end // 60))
    end += width - 1 - end % width  # the last step is a whole one
    beyond = 0
    for name, found in lengths.items():
        counts = {int(length): count for length, count in found["counts"].items()}
        total = sum(counts.values())
        beyond += sum(count for length, count in counts.items() if length > end)
        shares = [0.0] * (end // width + 1 + (longest <= end))  # a last line comes down to zero, a cut one does not
        for length, count in counts.items():
            if length <= end:
                shares[length // width] += 100 * count / total
        centres = [i * width + (width - 1) / 2 for i in range(len(shares))]
        label = f"{name}: {total} captions, median {found['median']:g}"
        panel.plot(centres, shares, drawstyle="steps-mid", linewidth=1.3, color=COLOURS.get(name), label=label)
    whole = sum(sum(found["counts"].values()) for found in lengths.values())
    tail = f"\n({beyond} of {whole} captions are longer, up to {longest}: not shown)" if beyond else ""
    panel.set_xlabel(f"{unit} a caption" + (f", in steps of {width}" if width > 1 else "") + tail)
    panel.set_ylabel("% of the captions of the split")
    panel.set_title(f"Caption length in {unit}")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)


def _enough(counts: dict[str, int]) -> int:
    """Return the length that SHOWN of the captions do not exceed."""
    left = SHOWN * sum(counts.values())
    for length, count in counts.items():
        left -= count
        if left <= 0:
            return int(length)
    return int(max(counts, key=int))


def _draw_modalities(panel: Any, modalities: dict[str, Stats]) -> None:
    """Bars: share of the images of each split that have a modality, with their number."""
    known = next(iter(modalities.values()))["counts"]
    names = [name for name in known if any(found["counts"][name] for found in modalities.values())]
    height = 0.8 / len(modalities)
    for i, (split, found) in enumerate(modalities.items()):
        images = found["images"] or 1
        places = [j + (i - (len(modalities) - 1) / 2) * height for j in range(len(names))]
        counts = [found["counts"][name] for name in names]
        bars = panel.barh(places, [100 * n / images for n in counts], height, color=COLOURS.get(split), label=split)
        panel.bar_label(bars, [str(count) for count in counts], fontsize=6.5, padding=2, color="#444")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xlabel("% of the images of the split, and their number")
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
"""So many duplicates, overlaps and unread images are named; all are counted."""


@dataclass(frozen=True)
class _Picture:
    """What a file says of its picture: size in px, Pillow's mode, sha256 of the bytes; or why it says nothing."""

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
    progress: Progress | None = None,
) -> Stats:
    """Return statistics of the splits that json can write.

    `count_tokens` adds lengths in tokens, prompts included. With `images` every file is read once, in threads, for the
    size in its header and the sha256 of its bytes; only DICOM is decoded. "duplicates" counts images with the same
    bytes, and others with the same caption, within splits and between them; "overlaps" counts ids that two splits
    share. Raises EngineError for trouble of the system, such as too many open files.
    """
    paths = list(dict.fromkeys(e.image for split in splits.values() for e in split.examples)) if images else []
    pictures = dict(zip(paths, in_threads(_read_header, paths, progress), strict=True))
    stats: Stats = {"splits": {name: _describe(split, count_tokens, pictures) for name, split in splits.items()}}
    examples = [(name, example) for name, split in splits.items() for example in split.examples]
    stats["duplicates"] = {
        "files": _repeats((name, e.id, pictures[e.image].digest) for name, e in examples if e.image in pictures),
        "captions": _repeats((name, e.id, e.caption.strip()) for name, e in examples),
    }
    stats["overlaps"] = _overlaps({name: [e.id for e in split.examples] for name, split in splits.items()})
    return stats


def inspect_directory(
    data: Path,
    out: Path,
    log: Callable[[str], None],
    *,
    model: Path | None = None,
    decode: bool = True,
    unpack_into: Path | None = None,
    columns: Columns = USUAL,
    max_tokens: int = 200,
    high_bit_depth: str = CLIP,
) -> bool:
    """Describe a data set on the terminal, in out/inspect.json and out/inspect.png; return whether all of it is usable.

    With `model`, a checkpoint, its tokenizer counts tokens, and captions beyond `max_tokens` are listed, as are those
    that lose accents or words in it.
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
    splits = read_dataset(data, unpack_into=unpack_into, columns=columns, log=log)
    stats = inspect_dataset(splits, count_tokens=count_tokens)
    counting: dict[str, Any] = {"count_tokens": count_tokens, "max_tokens": max_tokens, "lost_in": lost_in}
    found = {
        name: check_split(split, decode=decode, depth=high_bit_depth, **counting) for name, split in splits.items()
    }
    stats["problems"] = {name: asdict(problems) for name, problems in found.items()}
    for line in lines(stats):
        log(line)
    for name, problems in found.items():
        for line in problems.lines():
            log(f"{name}: {line}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "inspect.json", json.dumps(stats, indent=1) + "\n")
    draw_dataset(stats, out / "inspect.png")
    log(f"-> {out / 'inspect.json'}, {out / 'inspect.png'}")
    return not any(problems.fatal for problems in found.values())


def _describe(split: Split, count_tokens: Callable[[str], int] | None, pictures: dict[Path, _Picture]) -> Stats:
    captions = [example.caption for example in split.examples]
    found: Stats = {
        "captions_file": str(split.captions_file),
        "images": len({example.id for example in split.examples}),
        "captions": len(captions),
        "prompts": sum(bool(example.prompt) for example in split.examples),
        "words": _lengths(len(caption.split()) for caption in captions),
        "tokens": _lengths(count_tokens(one.text) for one in split.examples) if count_tokens is not None else None,
        "modalities": _modalities(split.examples),
    }
    files = {example.image: example.id for example in split.examples}
    found["sizes"] = _sizes([(name, pictures[path]) for path, name in files.items()]) if pictures else None
    return found


def _lengths(lengths: Iterable[int]) -> Stats | None:
    """Return least, median, mean, 95th percentile and greatest length, and how many captions have each."""
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
    """Count images by the modality among their concepts; an image with two counts for both, and among "several"."""
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


def _sizes(pictures: list[tuple[str, _Picture]]) -> Stats:
    """Return least, median and greatest width and height in px, modes, and the files that tell neither."""
    read = [picture for _, picture in pictures if not picture.reason]
    unread = [[name, picture.reason] for name, picture in pictures if picture.reason]
    modes = Counter(picture.mode for picture in read)
    spans = {}
    for side in ("width", "height"):
        values = sorted(getattr(picture, side) for picture in read)
        spans[side] = {"min": values[0], "median": statistics.median(values), "max": values[-1]} if values else None
    return {
        **spans,
        "modes": dict(modes.most_common()),
        "not_rgb": round(1 - modes["RGB"] / len(read), 4) if read else None,
        "unread": {"count": len(unread), "first": unread[:FIRST]},
    }


def _repeats(items: Iterable[tuple[str, str, Hashable]]) -> Stats:
    """Count what occurs at several images: (split, id, content); empty content is nobody's duplicate.

    "within" counts, by split, the images that repeat an earlier one; "between" counts contents found in both splits.
    """
    groups: dict[Hashable, list[tuple[str, str]]] = defaultdict(list)
    for split, name, content in dict.fromkeys(items):
        if content:
            groups[content].append((split, name))
    several = [group for group in groups.values() if len(group) > 1]
    within: Counter[str] = Counter()
    between: Counter[str] = Counter()
    for group in several:
        counts = Counter(split for split, _ in group)
        within.update({split: count - 1 for split, count in counts.items() if count > 1})
        between.update(" and ".join(pair) for pair in combinations(counts, 2))
    first = [[f"{split}: {name}" for split, name in group[:FIRST]] for group in several[:FIRST]]
    return {"groups": len(several), "within": dict(within), "between": dict(between), "first": first}


def _overlaps(ids: dict[str, list[str]]) -> Stats:
    found = {}
    for one, other in combinations(ids, 2):
        theirs = set(ids[other])
        shared = [name for name in dict.fromkeys(ids[one]) if name in theirs]
        found[f"{one} and {other}"] = {"count": len(shared), "first": shared[:FIRST]}
    return found


def _read_header(path: Path) -> _Picture:
    """Return what a file says of its picture. Raises EngineError for trouble of the system."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            return _Picture(reason="not a file, or too large")  # opening a pipe would wait for its writer
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if is_dicom(path):
                return _Picture(*decode_image(path).size, "DICOM", digest)
            stream.seek(0)
            with image_errors(path), open_image(stream) as picture:
                return _Picture(*picture.size, picture.mode, digest)
    except ImageError as error:
        return _Picture(reason=error.reason)
    except OSError as error:
        if error.errno in SYSTEM_TROUBLE:
            raise EngineError(f"{path} cannot be read: {error.strerror}") from error
        return _Picture(reason=error.strerror or str(error))


def lines(stats: Stats) -> list[str]:
    """Return the statistics as lines for a terminal."""
    out: list[str] = []
    for name, found in stats["splits"].items():
        out.append(f"{name}: {found['images']} images, {found['captions']} captions ({found['captions_file']})")
        for unit in ("words", "tokens"):
            span = found[unit]
            if span:
                out.append(
                    f"  {unit} a caption: {span['min']} to {span['max']}, median {span['median']:g}, "
                    f"mean {span['mean']:.1f}, 95 % have at most {span['p95']}"
                )
        if found["prompts"]:
            out.append(f"  prompts: {found['prompts']} of {found['captions']} captions have one; tokens count it")
        out += [f"  {line}" for line in (*_modality_lines(found), *_size_lines(found["sizes"]))]
    for kind, noun in (("files", "images with the same bytes"), ("captions", "images with the same caption")):
        out.append(f"{noun}: {_repeat_line(stats['duplicates'][kind])}")
    for pair, shared in stats["overlaps"].items():
        names = f": {', '.join(shared['first'])}" + (", ..." if shared["count"] > FIRST else "")
        out.append(f"ids in {pair}: " + (f"{shared['count']}{names}" if shared["count"] else "none"))
    return out


def _modality_lines(found: Stats) -> list[str]:
    seen = found["modalities"]
    if not seen["with_concepts"]:
        return ["modalities: unknown, no concepts"]
    counts = ", ".join(f"{name} {count}" for name, count in seen["counts"].items() if count)
    several = f" ({seen['several']} images have more than one)" if seen["several"] else ""
    return [f"modalities: {counts}{several}"]


def _size_lines(sizes: Stats | None) -> list[str]:
    if sizes is None:
        return []
    out = []
    if sizes["width"]:
        sides = (f"{side} {s['min']} to {s['max']}, median {s['median']:g}" for side, s in _sides(sizes))
        modes = ", ".join(f"{mode} {count}" for mode, count in sizes["modes"].items())
        out.append(f"pixels: {'; '.join(sides)}; {sizes['not_rgb']:.1%} not RGB ({modes})")
    unread = sizes["unread"]
    if unread["count"]:
        named = ", ".join(f"{name} ({reason})" for name, reason in unread["first"])
        out.append(f"of unknown size: {unread['count']}: {named}" + (", ..." if unread["count"] > FIRST else ""))
    return out


def _sides(sizes: Stats) -> list[tuple[str, Stats]]:
    return [(side, sizes[side]) for side in ("width", "height")]


def _repeat_line(found: Stats) -> str:
    parts = [f"{count} repeat an earlier one of {name}" for name, count in found["within"].items()]
    parts += [f"{count} shared by {pair}" for pair, count in found["between"].items()]
    if not parts:
        return "none"
    return ", ".join(parts) + f"; such as {', '.join(found['first'][0])}"

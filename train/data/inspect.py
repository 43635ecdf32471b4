"""Describe the splits of a data set in numbers, lines and a picture; knows nothing of layouts and models.

Lengths, modalities, image sizes, duplicates and overlaps: what tells whether a caption limit or a split is sound.
"""

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

from engine.errors import EngineError, ImageError, UsageError
from engine.files.atomic import write_atomically
from engine.inputs.columns import USUAL, Columns
from engine.inputs.depth import CLIP, window_of
from engine.inputs.images import is_dicom
from engine.inputs.pixels import MAX_FILE_BYTES, SYSTEM_TROUBLE, decode_image, image_errors, open_image
from train.data.check import Progress, check_split, in_threads
from train.data.dataset import Example, Split, read_dataset
from train.data.plots import draw_dataset

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
Stats = dict[str, Any]


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
    say: Callable[[str], None],
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
        from export.checkpoints.tokenizer import read_tokenizer  # imports transformers, which takes seconds
        from train.data.prompts import lost_in_tokens

        tokenizer = read_tokenizer(model)
        count_tokens = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
        lost_in = lambda text: lost_in_tokens(tokenizer, text)  # noqa: E731
    splits = read_dataset(data, unpack_into=unpack_into, columns=columns, log=say)
    stats = inspect_dataset(splits, count_tokens=count_tokens)
    counting: dict[str, Any] = {"count_tokens": count_tokens, "max_tokens": max_tokens, "lost_in": lost_in}
    found = {
        name: check_split(split, decode=decode, depth=high_bit_depth, **counting) for name, split in splits.items()
    }
    stats["problems"] = {name: asdict(problems) for name, problems in found.items()}
    for line in lines(stats):
        say(line)
    for name, problems in found.items():
        for line in problems.lines():
            say(f"{name}: {line}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "inspect.json", json.dumps(stats, indent=1) + "\n")
    draw_dataset(stats, out / "inspect.png")
    say(f"-> {out / 'inspect.json'}, {out / 'inspect.png'}")
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

"""Measure `engine duplicates` on planted twins: slices of the demo's brain volumes, saved again in many ways.

    python -m benchmarks.twins PAIRS [--every N] [--others N]

PAIRS is a folder of train.demo.volumes.write_pairs. Each test slice is planted in one way at a time, and searched among
all slices. Prints the recall of each planting and, with --others, the pairs of unchanged slices: of different
volumes, and of neighbouring slices.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from engine.inputs.images import ImageFile
from engine.inputs.twins import NEAR, Fingerprints, find_twins, fingerprint
from train.demo.volumes import Pair, read_pairs

Plant = Callable[[Image.Image, random.Random], Image.Image]


def saved(quality: int) -> Plant:
    def plant(image: Image.Image, _: random.Random) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return plant


def resized(factor: float, how: Image.Resampling = Image.Resampling.BICUBIC) -> Plant:
    return lambda image, _: image.resize((round(image.width * factor), round(image.height * factor)), how)


def levels(factor: float = 1.0, added: float = 0.0) -> Plant:
    return lambda image, _: image.point(lambda value: value * factor + added)


def cropped(part: float) -> Plant:
    def plant(image: Image.Image, rng: random.Random) -> Image.Image:
        width, height = round(image.width * (1 - part)), round(image.height * (1 - part))
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        return image.crop((left, top, left + width, top + height))

    return plant


def turned(how: Image.Transpose) -> Plant:
    return lambda image, _: image.transpose(how)


def chain(*plants: Plant) -> Plant:
    def plant(image: Image.Image, rng: random.Random) -> Image.Image:
        for one in plants:
            image = one(image, rng)
        return image

    return plant


PLANTS: dict[str, Plant] = {
    **{f"JPEG, quality {quality}": saved(quality) for quality in (90, 50, 20)},
    **{f"resized x {factor}": resized(factor) for factor in (0.33, 0.5, 2.0)},
    "resized x 0.73, nearest": resized(0.73, Image.Resampling.NEAREST),
    "brightness x 0.8": levels(0.8),
    "brightness x 1.2": levels(1.2),
    "brightness + 51": levels(added=51),
    "brightness - 51": levels(added=-51),
    "x 0.6, x 1.2, quality 60": chain(resized(0.6), levels(1.2), saved(60)),
    "mirrored": chain(turned(Image.Transpose.FLIP_LEFT_RIGHT), saved(80)),
    "flipped": chain(turned(Image.Transpose.FLIP_TOP_BOTTOM), saved(80)),
    **{f"cropped by {part:.0%}": chain(cropped(part), saved(80)) for part in (0.03, 0.05, 0.1)},
}


def read(paths: list[Path]) -> Fingerprints:
    return fingerprint([ImageFile(path.stem, path) for path in paths])


def main() -> None:
    """Plant, search and print."""
    parser = argparse.ArgumentParser(description="Measure `engine duplicates` on planted twins.")
    parser.add_argument("pairs", type=Path, help="folder of train.demo.volumes.write_pairs")
    parser.add_argument("--every", type=int, default=1, help="plant only every N-th test slice; 0 plants none")
    parser.add_argument("--others", type=int, default=0, help="also search every N-th slice, as it is, among all")
    given = parser.parse_args()
    slices = read_pairs(given.pairs)
    base = read([given.pairs / pair.image for pair in slices])
    test = [i for i, pair in enumerate(slices) if pair.split == "test"]
    origins = test[:: given.every] if given.every else []
    for name, plant in PLANTS.items() if origins else ():
        rng, start = random.Random(0), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for i in origins:
                paths.append(Path(folder, f"{i}.png"))
                with Image.open(given.pairs / slices[i].image) as image:
                    plant(image.convert("RGB"), rng).convert("RGB").save(paths[-1])
            planted = read(paths)
        pairs = find_twins(planted, base)
        hits = {p.first: p.kind for p in reversed(pairs) if base.digests[origins[p.first]] == base.digests[p.second]}
        kinds = Counter(hits.get(k, "-") for k in range(len(origins)))
        twins = sum(count for kind, count in kinds.items() if kind not in ("-", NEAR))
        wrong = [p for p in pairs if p.kind != NEAR and slices[p.second].volume != slices[origins[p.first]].volume]
        print(
            f"{name:26} recall {twins / len(origins):.4f}  {dict(kinds)}  images with a twin of another volume "
            f"{len({p.first for p in wrong})}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    if given.others:
        natural(slices, base, [*test, *(i for i in range(len(slices)) if slices[i].split != "test")][:: given.others])


def natural(slices: list[Pair], base: Fingerprints, queries: list[int]) -> None:
    """Print the kinds of the pairs of some slices with all others, of different volumes, of one, and of neighbours."""
    start = time.perf_counter()
    some = Fingerprints([base.digests[i] for i in queries], base.thumbnails[queries])
    pairs = [(queries[p.first], p.second, p.kind) for p in find_twins(some, base) if queries[p.first] != p.second]
    print(f"{len(queries)} slices with all: {len(pairs)} pairs, {time.perf_counter() - start:.0f} s")
    for is_same, name in ((False, "different volumes"), (True, "one volume")):
        kept = [(i, kind) for i, j, kind in pairs if (slices[i].volume == slices[j].volume) is is_same]
        images = {i for i, kind in kept if kind != NEAR}
        print(f"pairs of {name}: {dict(Counter(kind for _, kind in kept))}; images with a twin: {len(images)}")
    known, places = {(i, j): kind for i, j, kind in pairs}, {}
    for i, pair in enumerate(slices):
        if pair.split == "test":
            places[pair.plane, int(pair.image.rsplit("_", 1)[1][:3])] = i
    for gap in (1, 2, 3):
        ends = [(i, places.get((plane, k + gap))) for (plane, k), i in places.items() if i in queries]
        found = Counter(known.get((i, j), "-") for i, j in ends if j is not None)
        print(f"slices {gap} mm apart: {dict(found)}")


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()

"""Find images that are twins: the same file, or the same image saved again, resized, brightened, mirrored or cropped.

Each image is read once, as captioning reads it, and reduced to a grey thumbnail. Candidates are pairs whose low DCT
coefficients correlate, over several crops and mirrored; all pairs are compared, so that no hash bucket can miss one.
A candidate is a twin if one thumbnail explains almost all of the other one, after their brightness and, for crops,
their positions are fitted.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError, ImageError
from engine.host import available_cores
from engine.inputs.images import ImageFile
from engine.inputs.pixels import ImageNote, read_image
from engine.inputs.readers import read_text

FILE, COPY, MIRRORED, FLIPPED, CROPPED, NEAR = KINDS = ("file", "copy", "mirrored", "flipped", "cropped", "near")
"""Kinds of pairs. FLIPPED is top to bottom. NEAR is similar but not a twin: a neighbouring slice of the same volume."""
COLUMNS = ("ID", "twin", "kind", "distance", "group")

SIDE = 64
"""Width and height of a thumbnail in pixels, whatever the aspect ratio of the image."""
TWIN, SMOOTH_TWIN, MOST_NEAR = 0.0016, 0.0007, 0.05
"""Largest distances of twins, of smoothed twins whose position was fitted, and of NEAR. Measured on slices of brains
(benchmarks/LOG.md): copies that are 20 % brighter, partly saturated, have up to 0.0008, slices 1 mm apart 0.0018 or
more. Smoothed, which hides errors of interpolation, crops have up to 0.0012 (median 0.0002), such slices 0.0007 or
more."""
ALIKE = 0.97
"""Smallest correlation of low frequencies of a candidate. Twins have 0.98 or more."""
CANDIDATES, ALIGNED, LISTED = 48, 3, 10
"""How many candidates of an image are compared, how many of them at full resolution for a crop, and how many pairs are
returned. Among 4,556 slices of four brains, a crop by 3 % may rank 30th before alignment, and first after."""
FREQUENCIES = 6
KEPT = 0.93
"""Crops to look for keep this part of the width and height, at 3 x 3 positions. Others are near enough to one of them
to be candidates."""
LEAST_CROP, MOST_CROP, LEAST_OVERLAP = 0.015, 0.2, 0.75
"""A crop removes between these parts of a side. The part of the image that both show has at least LEAST_OVERLAP."""
QUERIES, BLOCK, BATCH = 64, 8192, 64
"""Images that are searched at a time, images they are compared with at a time, and pairs that are aligned at a time:
their arrays fit into the processor's cache."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Twin:
    """A pair: indices of both images, its kind, and the distance 0 to 1, the part of the variance that differs."""

    first: int
    second: int
    kind: str
    distance: float


@dataclass
class Fingerprints:
    """The digests and thumbnails of N images.

    digests     SHA-256 of each file, "" if it cannot be read
    thumbnails  u8[N,64,64], grey; 0 for an image that cannot be read
    unreadable  {index: reason}; these are only compared by their bytes
    notes       what reading dropped, as for captioning
    """

    digests: list[str]
    thumbnails: NDArray[np.uint8]
    unreadable: dict[int, str] = field(default_factory=dict)
    notes: list[ImageNote] = field(default_factory=list)

    @property
    def flat(self) -> list[int]:
        """Indices of the readable images of one grey value, which are only compared by their bytes."""
        is_flat = self.thumbnails.max((1, 2), initial=0) == self.thumbnails.min((1, 2), initial=255)
        return [int(i) for i in np.flatnonzero(is_flat) if i not in self.unreadable]


def fingerprint(images: Sequence[ImageFile], advance: Callable[[int], None] = lambda _: None) -> Fingerprints:
    """Read all images in threads, calling `advance(1)` after each. Raises EngineError for errors of the system."""
    prints = Fingerprints([""] * len(images), np.zeros((len(images), SIDE, SIDE), np.uint8))

    def read(index: int) -> None:
        image, digest = images[index], list[str]()
        how = {"frame": image.frame, "depth": image.depth, "notes": prints.notes, "sha256": digest}
        try:
            rgb = read_image(image.source, SIDE, SIDE, "bicubic", **how)  # type: ignore[arg-type]  # of a dict
            prints.thumbnails[index] = (rgb @ np.array([0.299, 0.587, 0.114], np.float32) + 0.5).astype(np.uint8)
        except ImageError as error:
            prints.unreadable[index] = error.reason or str(error)
        prints.digests[index] = digest[0] if digest else ""

    with ThreadPoolExecutor(available_cores()) as threads:
        try:
            for _ in threads.map(read, range(len(images))):
                advance(1)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return prints


def find_twins(
    prints: Fingerprints, against: Fingerprints | None = None, advance: Callable[[int], None] = lambda _: None
) -> list[Twin]:
    """Return the pairs of images of `prints` with images of `against`, or with each other: per image, nearest first.

    At most LISTED pairs of an image are returned. Without `against`, a pair is listed once, for the image that comes
    later, and a further copy of a file is only paired with the first one. `advance` is called with the number of images
    that were compared.
    """
    base = prints if against is None else against
    same = defaultdict[str, list[int]](list)
    for j, digest in enumerate(base.digests):
        if digest:
            same[digest].append(j)
    unusable = {*base.unreadable, *base.flat}
    index = _Index(base.thumbnails, [j for j, d in enumerate(base.digests) if j not in unusable and same[d][0] == j])
    skipped = {*prints.unreadable, *prints.flat}
    if against is None:
        skipped.update(j for copies in same.values() for j in copies[1:])

    def compare(start: int) -> list[Twin]:
        rows = [i for i in range(start, min(start + QUERIES, len(prints.digests))) if i not in skipped]
        return index.search(prints.thumbnails, rows, earlier=against is None)

    pairs: dict[int, list[Twin]] = defaultdict(list)
    for i, digest in enumerate(prints.digests):
        copies = same.get(digest, []) if against is not None else [j for j in same.get(digest, [])[:1] if j < i]
        pairs[i] += [Twin(i, j, FILE, 0.0) for j in copies]
    with ThreadPoolExecutor(available_cores()) as threads:
        starts = range(0, len(prints.digests), QUERIES)
        for start, chunk in zip(starts, threads.map(compare, starts), strict=True):
            for pair in chunk:
                copies = same[base.digests[pair.second]] if against is not None else [pair.second]
                known = {other.second for other in pairs[pair.first]}
                pairs[pair.first] += [replace(pair, second=j) for j in copies[:LISTED] if j not in known]
            advance(min(QUERIES, len(prints.digests) - start))
    return [pair for i in range(len(prints.digests)) for pair in sorted(pairs[i], key=_rank)[:LISTED]]


def _rank(pair: Twin) -> tuple[bool, float, int]:
    return pair.kind == NEAR, pair.distance, pair.second


def groups(pairs: Iterable[Twin], *, against: bool) -> dict[tuple[int, int], int]:
    """Return {(0, index) or (1, index of `against`): number of its group from 1}; NEAR pairs join no group."""
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def root(node: tuple[int, int]) -> tuple[int, int]:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for pair in pairs:
        if pair.kind != NEAR:
            parent[root((int(against), pair.second))] = root((0, pair.first))
    numbers: dict[tuple[int, int], int] = {}
    return {node: numbers.setdefault(root(node), len(numbers) + 1) for node in list(parent)}


def twins_csv(pairs: Sequence[Twin], ids: Sequence[str], others: Sequence[str] | None = None) -> str:
    """Return a CSV table with the COLUMNS, one row per pair; a pair that is NEAR has no group."""
    stream, number = io.StringIO(), groups(pairs, against=others is not None)
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for pair in pairs:
        twin, group = (others or ids)[pair.second], "" if pair.kind == NEAR else number[0, pair.first]
        writer.writerow([ids[pair.first], twin, pair.kind, f"{pair.distance:.5f}", group])
    return stream.getvalue()


def read_twins(path: Path) -> dict[str, bool]:
    """Return {id: whether it has a twin} of a file of twins_csv; false if all its pairs are NEAR. Raises DataError."""
    rows = csv.DictReader(io.StringIO(read_text(path, names=True), newline=""))
    if not {"ID", "kind"} <= {*(rows.fieldnames or ())}:
        raise DataError(f"{path} is not a file of `engine duplicates --out`: it lacks the columns ID and kind")
    has_twin: dict[str, bool] = {}
    for number, row in enumerate(rows, 2):
        if row["kind"] not in KINDS:
            raise DataError(f"{path}, line {number}: unknown kind {row['kind']!r}: expected one of {', '.join(KINDS)}")
        has_twin[row["ID"]] = has_twin.get(row["ID"], False) or row["kind"] != NEAR
    return has_twin


def count_kinds(pairs: Iterable[Twin]) -> dict[str, int]:
    """Return {kind: number of images whose best pair is of this kind}, in the order of KINDS."""
    best: dict[int, Twin] = {}
    for pair in pairs:
        best[pair.first] = min(pair, best.get(pair.first, pair), key=_rank)
    kinds = [pair.kind for pair in best.values()]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


def _basis(start: float) -> Floats:
    """Return f32[6,64], the first DCT functions over a side, or over the KEPT part of it from `start` (0 to 1)."""
    size = KEPT if start >= 0 else 1.0
    edges, start = np.linspace(0, 1, SIDE + 1), max(start, 0.0)
    covered = np.clip(np.minimum(edges[1:], start + size) - np.maximum(edges[:-1], start), 0, None)
    places = np.clip(((edges[1:] + edges[:-1]) / 2 - start) / size, 0, 1)
    return np.asarray(np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * places) * covered, np.float32)


WHOLE = _basis(-1.0)
STARTS = (0.0, (1 - KEPT) / 2, 1 - KEPT)
WINDOWS = [(y, x) for y in STARTS for x in STARTS]
_BASES = {start: _basis(start) for start in STARTS}
_ODD = np.where(np.arange(FREQUENCIES) % 2, -1, 1).astype(np.float32)
_FLIPS = {MIRRORED: _ODD[None, :], FLIPPED: _ODD[:, None]}
"""A flip negates the odd frequencies of an axis."""
_WINDOW = np.array([(KEPT, 2 * y + KEPT - 1, KEPT, 2 * x + KEPT - 1) for y, x in WINDOWS], np.float32)
_SCALES, _SHIFTS = _WINDOW[:, ::2], _WINDOW[:, 1::2]
_POSITIONS = np.concatenate(
    [
        np.array([[1, 0, 1, 0]], np.float32),
        _WINDOW,  # the first image shows a part of the second one
        np.stack([1 / _SCALES, -_SHIFTS / _SCALES], 2).reshape(-1, 4),  # and the other way round
    ]
)
"""f32[19,4]: (scale, shift) of rows and of columns; where a pixel of the first image is in the second, both -1 to 1."""


def _unit(coefficients: Floats) -> Floats:
    """Return f32[N,35]: coefficients [N,6,6] without the mean, as vectors of length 1."""
    vectors = coefficients.reshape(-1, FREQUENCIES**2)[:, 1:]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-9), np.float32)


def _coefficients(thumbnails: NDArray[np.uint8], rows: Floats = WHOLE, columns: Floats = WHOLE) -> Floats:
    blocks = [rows @ thumbnails[i : i + 4096].astype(np.float32) @ columns.T for i in range(0, len(thumbnails), 4096)]
    return np.concatenate(blocks) if blocks else np.zeros((0, FREQUENCIES, FREQUENCIES), np.float32)


def _crops(thumbnails: NDArray[np.uint8]) -> Floats:
    """Return f32[9,N,35], the vectors of all WINDOWS."""
    return np.stack([_unit(_coefficients(thumbnails, _BASES[y], _BASES[x])) for y, x in WINDOWS])


class _Index:
    """The images to compare with: their thumbnails, and vectors of each image and its crops."""

    def __init__(self, thumbnails: NDArray[np.uint8], members: Sequence[int]) -> None:
        self._members = np.array(members, np.int64)
        self._thumbnails = thumbnails[self._members]
        self._whole, self._cropped = _unit(_coefficients(self._thumbnails)), _crops(self._thumbnails)

    def search(self, thumbnails: NDArray[np.uint8], rows: Sequence[int], *, earlier: bool) -> list[Twin]:
        """Return the pairs of the images `rows` of `thumbnails`; with `earlier` only with members of a lower index."""
        if not rows:
            return []
        own = thumbnails[rows]
        coefficients = _coefficients(own)
        # In the order of _POSITIONS, then flips: (vectors of these images, vectors of all members)
        views = [(_unit(coefficients), self._whole), *((_unit(coefficients), crop) for crop in self._cropped)]
        views += [(crop, self._whole) for crop in _crops(own)]
        views += [(_unit(coefficients * sign), self._whole) for sign in _FLIPS.values()]
        queries, members = self._candidates(views, np.array(rows) if earlier else None)
        if not len(queries):
            return []
        alike = np.stack([np.einsum("pk,pk->p", ours[queries], theirs[members]) for ours, theirs in views])
        first, second = own[queries], self._thumbnails[members]
        kinds, distances = _compare(first.astype(np.float32), second.astype(np.float32), alike, queries)
        return [
            Twin(rows[query], int(self._members[member]), kind, float(distance))
            for query, member, kind, distance in zip(queries, members, kinds, distances, strict=True)
            if kind
        ]

    def _candidates(
        self, views: Sequence[tuple[Floats, Floats]], limits: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return i64[P] and i64[P]: the queries and members whose vectors are ALIKE in a view, the best of each query.

        A query is only paired with members of an index below its entry in `limits`.
        """
        found = []
        for start in range(0, len(self._members), BLOCK):
            stop = start + BLOCK
            best = views[0][0] @ views[0][1][start:stop].T
            product = np.empty_like(best)
            for ours, theirs in views[1:]:
                np.maximum(best, np.matmul(ours, theirs[start:stop].T, out=product), out=best)
            if limits is not None:
                best[self._members[None, start:stop] >= limits[:, None]] = -1
            query, member = np.nonzero(best >= ALIKE)
            found.append((query, member + start, best[query, member]))
        queries, members, alike = (
            (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else [_NONE] * 3
        )
        order = np.lexsort((-alike, queries))
        queries, members = queries[order], members[order]
        kept = np.arange(len(queries)) - np.searchsorted(queries, queries) < CANDIDATES
        return queries[kept], members[kept]


_NONE = np.zeros(0, np.int64)


def _compare(first: Floats, second: Floats, alike: Floats, queries: NDArray[np.int64]) -> tuple[list[str], Floats]:
    """Return the kinds, "" for unlike images, and distances of P pairs of thumbnails f32[P,64,64].

    alike    f32[21,P], the correlation in each view
    queries  i64[P], sorted: pairs of the same image
    """
    distances = np.ones(len(first), np.float32)
    kinds = [""] * len(first)

    def settle(pairs: NDArray[np.int64], values: Floats, kind: str, limit: float) -> None:
        for pair, value in zip(pairs, values, strict=True):
            if value <= min(limit, distances[pair]) and kinds[pair] in ("", NEAR):
                kinds[pair], distances[pair] = kind, value

    whole = len(_POSITIONS)
    for view, kind, flip in ((0, COPY, (1, 1)), (whole, MIRRORED, (1, -1)), (whole + 1, FLIPPED, (-1, 1))):
        pairs = np.flatnonzero(alike[view] >= ALIKE)
        values = _distance(first[pairs], second[pairs][:, :: flip[0], :: flip[1]])
        settle(pairs, values, kind, TWIN)
        if kind == COPY:
            settle(pairs, values, NEAR, MOST_NEAR)
    crops = alike[:whole].max(0)
    open_ = np.array([kind in ("", NEAR) for kind in kinds]) & (crops >= ALIKE)
    pairs = np.flatnonzero(open_)
    rough, positions = np.ones(len(pairs), np.float32), _POSITIONS[alike[:whole, pairs].argmax(0)]
    for start in range(0, len(pairs), BATCH):
        part, batch = slice(start, start + BATCH), pairs[start : start + BATCH]
        ours, theirs = _halved(first[batch]), _halved(second[batch])
        positions[part] = _aligned(ours, theirs, positions[part], steps=5)
        rough[part] = _distance(ours, *_moved(theirs, positions[part]))
    order = np.lexsort((rough, queries[pairs]))
    of_image = queries[pairs][order]
    best = order[np.arange(len(order)) - np.searchsorted(of_image, of_image) < ALIGNED]
    for start in range(0, len(best), BATCH):
        chosen = best[start : start + BATCH]
        batch = pairs[chosen]
        fitted = _aligned(first[batch], second[batch], positions[chosen], steps=3)
        moved, inside = _moved(second[batch], fitted)
        removed = 1 - 1 / np.maximum(fitted[:, ::2], 1 / fitted[:, ::2]).max(1)
        exact, smooth = _distance(first[batch], moved, inside), _distance(_smooth(first[batch]), _smooth(moved), inside)
        usable = (inside.mean((1, 2)) >= LEAST_OVERLAP) & (removed <= MOST_CROP)
        for kind, valid in ((COPY, usable & (removed < LEAST_CROP)), (CROPPED, usable & (removed >= LEAST_CROP))):
            settle(batch[valid], smooth[valid], kind, SMOOTH_TWIN)
            settle(batch[valid], exact[valid], kind, TWIN)
        settle(batch[usable], exact[usable], NEAR, MOST_NEAR)
    return kinds, distances


def _distance(first: Floats, second: Floats, inside: Floats | None = None) -> Floats:
    """Return f32[P], the part of the variance of one thumbnail that the other does not explain.

    The explanation is brightness and contrast, cut off at black and white as an image is. It is tried in both
    directions, because a brightened image cannot explain what its original had above white. `inside` f32[P,64,64] is 1
    where the two overlap.
    """
    inside = np.ones((1, *first.shape[1:]), np.float32) if inside is None else inside
    return np.minimum(_unexplained(first, second, inside), _unexplained(second, first, inside))


def _unexplained(source: Floats, target: Floats, inside: Floats) -> Floats:
    def total(values: NDArray[Any]) -> Floats:
        return np.asarray(values.sum((1, 2), keepdims=True), np.float32)

    unsaturated = inside * ((target > 6) & (target < 249))
    is_binary = total(unsaturated) < 0.1 * total(inside + 0 * target)  # such as a line drawing
    weight = np.where(is_binary, inside, unsaturated)
    size = np.maximum(total(weight), 1)
    centre, level = total(weight * source) / size, total(weight * target) / size
    spread = source - centre
    gain = total(weight * spread * (target - level)) / np.maximum(total(weight * spread * spread), 1e-6)
    rest = target - np.clip(gain * spread + level, 0, 255)
    mean = total(inside * target) / np.maximum(total(inside + 0 * target), 1)
    part = total(inside * rest * rest) / np.maximum(total(inside * (target - mean) ** 2), 1e-6)
    return np.minimum(np.where(gain > 0, part, 1.0)[:, 0, 0], 1.0).astype(np.float32)


def _halved(images: Floats) -> Floats:
    """Return f32[P,n/2,n/2], the means of 2 x 2 pixels."""
    side = images.shape[1] // 2
    return np.asarray(images.reshape(-1, side, 2, side, 2).mean((2, 4)), np.float32)


def _smooth(images: Floats) -> Floats:
    """Return images f32[P,n,n] after a binomial filter of 3 x 3 pixels."""
    wide = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
    return np.asarray((rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 16, np.float32)


def _aligned(first: Floats, second: Floats, positions: Floats, steps: int) -> Floats:
    """Return the positions f32[P,4] that move the second image onto the first.

    `positions` are first guesses, which Gauss-Newton steps refine (Lucas and Kanade 1981). Gain and level are fitted as
    well.
    """
    side = first.shape[1]
    centres = ((np.arange(side) + 0.5) * 2 / side - 1).astype(np.float32)
    for _ in range(steps):
        moved, inside = _moved(second, positions)
        by_row = np.gradient(moved, 2 / side, axis=1) / positions[:, 0, None, None]
        by_column = np.gradient(moved, 2 / side, axis=2) / positions[:, 2, None, None]
        parts = [by_row * centres[:, None], by_row, by_column * centres, by_column, moved, np.ones_like(moved)]
        slopes = np.stack(parts, 1).reshape(len(first), 6, -1)
        weighted = slopes * inside.reshape(len(first), 1, -1)
        left = (weighted @ slopes.transpose(0, 2, 1)).astype(np.float64) + 1e-3 * np.eye(6)
        right = (weighted @ first.reshape(len(first), -1, 1)).astype(np.float64)
        found = np.linalg.solve(left, right)[:, :, 0]
        change = found[:, :4] / np.maximum(found[:, 4:5], 0.1)
        positions = positions + np.clip(change, -0.1, 0.1).astype(np.float32)
        positions[:, ::2] = positions[:, ::2].clip(1 - MOST_CROP, 1 / (1 - MOST_CROP))
        positions[:, 1::2] = positions[:, 1::2].clip(-2 * MOST_CROP, 2 * MOST_CROP)
    return positions


def _moved(images: Floats, positions: Floats) -> tuple[Floats, Floats]:
    """Return images f32[P,n,n] sampled at `positions` (cubic), and 1 where a pixel is inside the image."""
    (rows, in_rows), (columns, in_columns) = (_sampling(images.shape[1], positions[:, i : i + 2]) for i in (0, 2))
    moved = rows @ images @ columns.transpose(0, 2, 1)
    return np.asarray(moved, np.float32), (in_rows[:, :, None] & in_columns[:, None, :]).astype(np.float32)


def _sampling(side: int, positions: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return f32[P,n,n], the weights of cubic interpolation (Keys 1981, a = -0.5) of one axis, and bool[P,n]."""
    centres = ((np.arange(side) + 0.5) * 2 / side - 1).astype(np.float32)
    places = (positions[:, :1] * centres + positions[:, 1:] + 1) * (side / 2) - 0.5
    inside = (places >= -0.5) & (places <= side - 0.5)
    away = np.abs(places.clip(0, side - 1)[:, :, None] - np.arange(side, dtype=np.float32))
    near, far = (1.5 * away - 2.5) * away * away + 1, ((-0.5 * away + 2.5) * away - 4) * away + 2
    weights = np.where(away < 1, near, np.where(away < 2, far, 0)).astype(np.float32)
    return np.asarray(weights / weights.sum(2, keepdims=True), np.float32), inside

"""Twins of real slices: what is found, what is not, and files that cannot be compared. benchmarks/twins.py has more."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.twins import PLANTS
from engine.inputs import twins
from engine.inputs.images import FindOptions, find_images
from engine.inputs.twins import COPY, CROPPED, FILE, FLIPPED, MIRRORED, NEAR, Fingerprints, Twin, find_twins
from tests.helpers.tiny import random_pictures

SLICES = Path(__file__).parents[4] / "examples" / "images"
EXPECTED = {"mirrored": {MIRRORED, COPY}, "flipped": {FLIPPED}, **{f"cropped by {n}%": {CROPPED} for n in (3, 5, 10)}}
"""Kinds by name of planting, else COPY. A slice of a symmetric brain is its own mirror image."""
MISSING = {"brightness - 51": 6, "cropped by 5%": 1, "cropped by 10%": 2}
"""How many of the 32 are not found. Subtracting 51 makes the darkest tissue black, so that too little is left."""


def prints_of(folder: Path, **options: object) -> tuple[Fingerprints, list[str]]:
    images = find_images(folder, FindOptions(**options)).images  # type: ignore[arg-type]
    return twins.fingerprint(images), [image.id for image in images]


def kinds(pairs: Sequence[Twin], ids: Sequence[str], others: Sequence[str]) -> dict[tuple[str, str], str]:
    return {(ids[pair.first], others[pair.second]): pair.kind for pair in pairs}


@pytest.fixture(scope="module")
def base() -> tuple[Fingerprints, list[str]]:
    return prints_of(SLICES)


@pytest.mark.parametrize("name", PLANTS)
def test_planted_twins_of_real_slices_are_found(base, tmp_path, name):
    rng = random.Random(0)
    for path in sorted(SLICES.glob("*.jpg")):
        with Image.open(path) as image:
            PLANTS[name](image.convert("RGB"), rng).convert("RGB").save(tmp_path / f"{path.stem}.png")
    planted, ids = prints_of(tmp_path)
    pairs = [pair for pair in find_twins(planted, base[0]) if pair.kind != NEAR]
    missing = set(ids) - {ids[pair.first] for pair in pairs}
    assert len(missing) <= MISSING.get(name, 0)
    digests = dict(zip(base[1], base[0].digests, strict=True))  # four pairs of these slices have the same bytes
    assert all(digests[ids[pair.first]] == base[0].digests[pair.second] for pair in pairs)
    assert {pair.kind for pair in pairs} <= EXPECTED.get(name, {COPY})
    assert any(pair.kind in EXPECTED.get(name, {COPY}) - {COPY} or name not in EXPECTED for pair in pairs)


def test_different_pictures_have_no_pairs(tmp_path):
    for i, image in enumerate(random_pictures(300, size=(80, 70))):
        image.save(tmp_path / f"{i}.png")
    prints, _ = prints_of(tmp_path)
    assert find_twins(prints) == []
    assert len(find_twins(prints, prints)) == 300  # each with itself


def test_shifted_slice_is_near_not_a_twin():
    volume = np.random.default_rng(0).normal(size=(40, 40, 40))
    for axis in range(3):  # smooth: neighbouring slices resemble each other
        kernel = np.hanning(13) / np.hanning(13).sum()
        volume = np.apply_along_axis(np.convolve, axis, volume, kernel, "same")
    values = np.clip(128 + 128 * volume / np.abs(volume).max(), 0, 255)
    thumbnails = np.stack(
        [np.asarray(Image.fromarray(values[k].astype(np.uint8)).resize((64, 64))) for k in (20, 21, 30)]
    )
    pairs = find_twins(Fingerprints(["a", "b", "c"], thumbnails))
    assert [(pair.first, pair.second, pair.kind) for pair in pairs] == [(1, 0, NEAR)]


def test_files_of_the_same_bytes_even_if_unreadable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged, too")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "d.png")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "e.png")
    prints, ids = prints_of(tmp_path)
    assert kinds(find_twins(prints), ids, ids) == {("b", "a"): FILE}
    assert sorted(prints.unreadable) == [0, 1, 2]
    assert prints.flat == [3, 4]


def test_images_are_read_as_for_captioning(tmp_path):
    """A 16-bit image and its 8-bit copy are twins if the range is kept, and transparency is dropped."""
    grey = np.asarray(random_pictures(1)[0].convert("L"))
    Image.fromarray(grey).save(tmp_path / "eight.png")
    Image.fromarray(grey.astype(np.uint16) * 200 + 300).save(tmp_path / "sixteen.png")
    Image.fromarray(np.dstack([grey, grey, grey, grey // 2])).save(tmp_path / "alpha.png")
    prints, ids = prints_of(tmp_path, depth="scale")
    assert set(kinds(find_twins(prints), ids, ids).values()) == {COPY}
    assert len(find_twins(prints)) == 3
    clipped, ids = prints_of(tmp_path)
    assert [ids[i] for i in clipped.flat] == ["sixteen"]
    assert {note.kind for note in clipped.notes} == {"clipped", "transparent"}


def test_groups_join_twins_of_twins_but_not_near_ones():
    pairs = [Twin(1, 0, FILE, 0.0), Twin(2, 1, COPY, 0.001), Twin(3, 2, NEAR, 0.02), Twin(5, 4, COPY, 0.001)]
    found = twins.groups(pairs, against=False)
    assert found[0, 0] == found[0, 1] == found[0, 2] == 1
    assert found[0, 4] == found[0, 5] == 2
    assert (0, 3) not in found
    text = twins.twins_csv(pairs, list("abcdef"))
    assert text.splitlines()[3] == "d,c,near,0.02000,"


def test_copies_of_a_file_are_listed_for_each(tmp_path):
    image = random_pictures(1)[0]
    for name in ("one", "two"):
        image.save(tmp_path / f"{name}.png")
    image.save(tmp_path / "other.bmp")
    prints, ids = prints_of(tmp_path)
    assert ids == ["one", "other", "two"]
    assert kinds(find_twins(prints), ids, ids) == {("other", "one"): COPY, ("two", "one"): FILE}
    across = kinds(find_twins(prints, prints), ids, ids)
    assert across["other", "one"] == across["other", "two"] == COPY
    assert across["one", "two"] == FILE

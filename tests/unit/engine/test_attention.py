"""Words of tokens, the files of attention maps, also damaged and hostile ones, and pictures of maps."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from engine.attention import (
    ARRAYS,
    attention_path,
    heat,
    is_attention_of,
    overlay,
    overview,
    read_attention,
    seen_box,
    word_maps,
    word_pictures,
    words_of,
    write_attention,
)
from engine.captions import Attention
from engine.errors import DataError, OutputError, UsageError

RNG = np.random.default_rng(0)
MAPS = RNG.random((4, 2, 3)).astype(np.float16)
SMALL = Attention((5, 6, 7, 3), MAPS, ("a", "t2-weighted"), (0, 1, 1, -1), (0, 2), (32, 48, 64))


@pytest.mark.parametrize(
    ("texts", "words", "word_of"),
    [
        (["a", "a chest", "a chest", "a chest"], ["a", "chest"], (0, 1, -1, -1)),
        (["t2", "t2 -", "t2-weighted", "t2-weighted image"], ["t2-weighted", "image"], (0, 0, 0, 1)),
        (["nod", "nodule", "nodule,", "nodule, a"], ["nodule,", "a"], (0, 0, 0, 1)),
        (["", "", ""], [], (-1, -1, -1)),
        (["caf\ufffd", "café", "café"], ["café"], (0, 0, -1)),
    ],
)
def test_words_of_tokens(texts, words, word_of):
    found, belongs = words_of(range(len(texts)), lambda ids: texts[len(ids) - 1] if len(ids) else "")
    assert (list(found), belongs) == (words, word_of)


def test_map_of_a_word_is_the_mean_of_its_tokens():
    (first, one), (second, mean) = word_maps(SMALL)
    assert (first, second) == ("a", "t2-weighted")
    np.testing.assert_array_equal(one, MAPS[0].astype(np.float32))
    np.testing.assert_allclose(mean, MAPS[1:3].astype(np.float32).mean(0))


def test_written_file_is_read_unchanged(tmp_path):
    path = tmp_path / "a.npz"
    write_attention(path, SMALL)
    found = read_attention(path)
    np.testing.assert_array_equal(found.maps, SMALL.maps)
    assert vars(found) | {"maps": None} == vars(SMALL) | {"maps": None}
    before = path.read_bytes()
    write_attention(path, SMALL)
    assert path.read_bytes() == before
    assert is_attention_of(path, (5, 6, 7, 3), (0, 2))
    assert not is_attention_of(path, (5, 6, 7), (0, 2))
    assert not is_attention_of(path, (5, 6, 7, 3), (0,))
    assert not is_attention_of(tmp_path / "b.npz", (5, 6, 7, 3), (0, 2))


def arrays() -> dict[str, np.ndarray]:
    stream = io.BytesIO()
    numbers = {name: np.array(getattr(SMALL, name)) for name in ARRAYS if name != "grid"}
    np.savez(stream, grid=np.array(MAPS.shape[1:]), **numbers)
    stream.seek(0)
    with np.load(stream) as found:
        return dict(found)


DAMAGED = {
    "another type": {"maps": MAPS.astype(np.float64)},
    "other tokens": {"tokens": np.array([1, 2])},
    "another grid": {"grid": np.array([3, 2])},
    "a word too many": {"word_of": np.array([0, 1, 2, -1])},
    "not weights": {"maps": np.full_like(MAPS, np.nan)},
    "negative": {"maps": -MAPS},
    "a giant crop": {"crop": np.array([1 << 20, 1 << 20, 1])},
    "floats": {"layers": np.array([0.5])},
    "pickled": {"words": np.array(["a", None], object)},
    "no words": {"words": None},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case, tmp_path):
    path = tmp_path / "a.npz"
    content = {name: array for name, array in (arrays() | DAMAGED[case]).items() if array is not None}
    np.savez(path, **content)
    with pytest.raises(DataError, match=r"a\.npz is not a file of --attention \(.+\): caption its image again"):
        read_attention(path)


def test_bombs_and_other_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    for content in (b"", b"PK\x05\x06", b"not a zip"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a file of --attention"):
            read_attention(path)
        with pytest.raises(OutputError, match="exists and is not a file of --attention: move it away"):
            write_attention(path, SMALL)
        assert path.read_bytes() == content
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("maps.npy", bytes(1 << 27))
    with pytest.raises(DataError, match="larger than 67108864 bytes"):
        read_attention(path)
    target = tmp_path / "target"
    target.write_bytes(b"kept")
    path.unlink()
    path.symlink_to(target)
    with pytest.raises(OutputError, match="move it away"):
        write_attention(path, SMALL)
    assert target.read_bytes() == b"kept"


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "", "a\0b", "x" * 252, "a/"])
def test_ids_that_are_not_file_names(name, tmp_path):
    with pytest.raises(UsageError, match="is not a file name for --attention"):
        attention_path(tmp_path, name)


def test_part_of_the_image_that_was_seen():
    assert seen_box(Attention((), MAPS, (), (), ()), 640, 480) == (0, 0, 1, 1)
    edge = Attention((), MAPS, (), (), (), (224, 224, 224))
    assert seen_box(edge, 448, 224) == (112 / 448, 0, 336 / 448, 1)
    both = Attention((), MAPS, (), (), (), (224, 224, 256, 256))
    assert seen_box(both, 640, 480) == (0.0625, 0.0625, 0.9375, 0.9375)


def test_highest_weight_is_drawn_where_it_is():
    weights = np.zeros((2, 4), np.float32)
    weights[1, 3] = 0.25
    colours = heat(weights)
    assert colours[1, 3].tolist() == [189, 0, 38, 184]
    assert colours[0, 0, 3] == 0
    assert heat(np.zeros((2, 2)))[..., 3].max() == 0
    picture = np.asarray(overlay(Image.new("RGB", (80, 40), "grey"), Attention((), MAPS, (), (), ()), weights))
    assert picture.shape == (40, 80, 3)
    assert np.unravel_index((picture[..., 0].astype(int) - picture[..., 1]).argmax(), (40, 80)) >= (30, 70)
    assert picture[0, 0].tolist() == [128, 128, 128]
    cropped = Attention((), MAPS, (), (), (), (40, 40, 40))
    picture = np.asarray(overlay(Image.new("RGB", (80, 40), "grey"), cropped, np.ones((2, 2), np.float32)))
    assert (picture[:, :20] == 128).all()
    assert (picture[:, 60:] == 128).all()
    assert (picture[:, 20:60, 0] > 150).all()


def test_pictures_for_words_and_papers():
    image = Image.new("RGB", (100, 50), "grey")
    pictures = word_pictures(image, SMALL)
    assert [(word, picture.size) for word, picture in pictures] == [("a", (512, 256)), ("t2-weighted", (512, 256))]
    assert word_pictures(Image.new("RGB", (4000, 10)), SMALL)[0][1].size == (2048, 5)
    page = overview(image, SMALL)
    assert page.width > 3 * 100
    assert page.getpixel((0, 0)) == (255, 255, 255)
    many = Attention((1,) * 12, RNG.random((12, 2, 2)).astype(np.float16), ("w" * 90,) * 12, tuple(range(12)), (0,))
    assert overview(image, many).width < 6 * 112 + 12

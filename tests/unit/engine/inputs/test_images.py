"""Finding and reading images: manifests, formats, damaged files and ids."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from engine.errors import DataError, ImageError
from engine.inputs.images import RepeatedIdError, describe_ignored, find_images, find_images_of, order_by_manifest
from engine.inputs.pixels import read_image
from tests.helpers.tiny import random_pictures


def test_images_are_sorted_and_other_files_listed(tmp_path):
    for name in ("b.JPG", "a.png", "c.txt", "d.jpeg"):
        (tmp_path / name).touch()
    found = find_images(tmp_path)
    assert [image.id for image in found.images] == ["a", "b", "d"]
    assert found.ignored == ["c.txt"]


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ("ID\nb\na\n", ["b", "a"]),
        ("b\na", ["b", "a"]),
        ("\ufeffID,Caption\r\nb,x\r\n", ["b"]),
        ("\n\na\n\n", ["a"]),
        ("ID\tCaption\nb\tx\na\ty\n", ["b", "a"]),
        ("ID|Caption\nb|x, y\n", ["b"]),
        ('"ID","Caption"\na,"two\nlines, \u2028 more"\nb,x\n', ["a", "b"]),
    ],
)
def test_manifests_select_and_order_images(content, ids, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    manifest = tmp_path / "ids.csv"
    manifest.write_bytes(content.encode())
    assert [image.id for image in order_by_manifest(find_images(tmp_path).images, manifest)] == ids


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("ID\n", "lists no ids"),
        ("a\na\n", "more than once: a"),
        ("a\nz\n", "without an image: z"),
        ('ID,Caption\na,"open\n', "line 2: unexpected end of data"),
    ],
)
def test_invalid_manifests_are_refused(content, sentence, tmp_path):
    (tmp_path / "a.png").touch()
    manifest = tmp_path / "ids.csv"
    manifest.write_text(content)
    with pytest.raises(DataError, match=sentence):
        order_by_manifest(find_images(tmp_path).images, manifest)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tif", "webp"])
def test_formats_are_read_as_rgb_of_the_requested_size(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    random_pictures(1)[0].save(path)
    pixels = read_image(path, 20, 30, "bicubic")
    assert pixels.shape == (20, 30, 3)
    assert pixels.dtype == np.uint8


def test_files_images_and_arrays_give_the_same_bytes(tmp_path):
    image = random_pictures(1)[0]
    image.save(tmp_path / "x.png")
    expected = read_image(image, 32, 32, "bicubic")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", 32, 32, "bicubic"), expected)
    np.testing.assert_array_equal(read_image(str(tmp_path / "x.png"), 32, 32, "bicubic"), expected)
    np.testing.assert_array_equal(read_image(np.asarray(image), 32, 32, "bicubic"), expected)


def test_format_outside_the_list_is_not_decoded(tmp_path):
    random_pictures(1)[0].save(tmp_path / "x.sgi")
    (tmp_path / "x.sgi").rename(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"x\.png: not an image, or damaged"):
        read_image(tmp_path / "x.png", 32, 32, "bicubic")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("share", [0.01, 0.6, 0.99])
def test_decompression_bombs_are_refused(share, tmp_path, monkeypatch):
    """Pillow itself only warns up to twice its limit."""
    picture = random_pictures(1)[0]
    picture.save(tmp_path / "x.png")
    pixels = picture.width * picture.height
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    read_image(tmp_path / "x.png", 32, 32, "bicubic")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(share * pixels))
    with pytest.raises(ImageError, match="decompression bomb"):
        read_image(tmp_path / "x.png", 32, 32, "bicubic")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"just text"])
def test_error_of_a_damaged_file_names_it(content, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.jpg"):
        read_image(tmp_path / "x.jpg", 32, 32, "bicubic")


@pytest.mark.parametrize("recursive", [False, True])
def test_files_renamed_while_a_folder_is_listed_are_skipped(recursive, tmp_path, monkeypatch):
    """As downloads are, when they are complete; folders may be deleted, too."""
    random_pictures(1)[0].save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    listdir, walk = os.listdir, os.walk
    monkeypatch.setattr("os.listdir", lambda path: [*listdir(path), "b.jpg.part", "c.jpg"])

    def walk_slowly(path, **more):
        for folder, folders, files in walk(path, **more):
            yield folder, folders, [*files, "b.jpg.part", "c.jpg"]
            for name in folders:
                (tmp_path / name).rmdir()

    monkeypatch.setattr("os.walk", walk_slowly)
    assert [image.id for image in find_images(tmp_path, recursive=recursive).images] == ["a"]


def test_hidden_files_directories_and_pipes_are_skipped(tmp_path):
    random_pictures(1)[0].save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    (tmp_path / "b.png").mkdir()
    os.mkfifo(tmp_path / "c.png")
    found = find_images(tmp_path)
    assert [image.id for image in found.images] == ["a"]
    assert found.ignored == ["._a.png", "b.png/", "c.png"]


@pytest.mark.parametrize("mode", ["I;16", "1", "CMYK", "P", "LA", "F"])
def test_unusual_modes_are_read(mode, tmp_path):
    image = random_pictures(1)[0]
    image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    suffix = "tif" if mode in ("CMYK", "F") else "png"
    image.save(tmp_path / f"x.{suffix}")
    assert read_image(tmp_path / f"x.{suffix}", 8, 8, "bicubic").shape == (8, 8, 3)


def test_first_frame_of_an_animation_is_read(tmp_path):
    first, second = random_pictures(2)
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "y.gif")
    animated, still = (read_image(tmp_path / name, 16, 16, "bicubic") for name in ("x.gif", "y.gif"))
    assert np.abs(animated.astype(int) - still.astype(int)).mean() < 4


def test_images_are_recognised_by_content(tmp_path):
    image = random_pictures(1)[0]
    for name, form in {
        "a.jpg": "JPEG",
        "b.jfif": "JPEG",
        "c.jpe": "JPEG",
        "IM-0001": "PNG",
        "1.2.840.1": "JPEG",
        "d.avif": "AVIF",
        "e.jp2": "JPEG2000",
        "f.ppm": "PPM",
        "g.jpg": "AVIF",
    }.items():
        image.save(tmp_path / name, form)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "strange").write_bytes(b"no picture")
    (tmp_path / "h.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 200)
    found = find_images(tmp_path)
    assert [image.id for image in found.images] == ["1.2.840.1", "IM-0001", "a", "b", "c", "d", "e", "f", "g"]
    assert describe_ignored(found.ignored).startswith("1 .db, 1 .heic, 1 .txt, 1 without a suffix")
    for image in found.images:
        assert read_image(image.path, 32, 32, "bicubic").shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"\0\0\0\x18ftypheic", "HEIC"), (b"\xff\x0a", "JPEG XL"), (b"8BPS", "Photoshop")],
)
def test_error_names_the_undecodable_format(head, kind, tmp_path):
    (tmp_path / "x.jpg").write_bytes(head + b"\0" * 200)
    with pytest.raises(ImageError, match=f"{kind}, which is not decoded: .*convert it to JPEG or PNG"):
        read_image(tmp_path / "x.jpg", 32, 32, "bicubic")


def test_repeated_names_in_folders_get_ids_by_path(tmp_path):
    for name in ("s1/0001.png", "s2/0001.png", "__MACOSX/0001.png", "@eaDir/0001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        random_pictures(1)[0].save(tmp_path / name)
    with pytest.raises(RepeatedIdError, match="--ids path makes ids of paths"):
        find_images(tmp_path, recursive=True)
    images = find_images(tmp_path, recursive=True, ids="path").images
    assert [image.id for image in images] == ["s1/0001", "s2/0001"]
    assert list(find_images_of(["s2/0001"], tmp_path, recursive=True)) == ["s2/0001"]
    (tmp_path / "ids.txt").write_text("s2\\0001.png\n")
    assert [image.id for image in order_by_manifest(images, tmp_path / "ids.txt")] == ["s2/0001"]


def test_names_that_differ_in_suffix_get_ids_with_suffix(tmp_path):
    for name in ("IMG_1.jpg", "IMG_1.png", "s/IMG_1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        random_pictures(1)[0].save(tmp_path / name)
    for how in ("stem", "path"):
        with pytest.raises(
            RepeatedIdError, match=r"IMG_1\.jpg and IMG_1\.png; --ids file makes ids of paths with suffix"
        ):
            find_images(tmp_path, ids=how)
    images = find_images(tmp_path, ids="file", recursive=True).images
    assert [image.id for image in images] == ["IMG_1.jpg", "IMG_1.png", "s/IMG_1.png"]
    found = find_images_of(["IMG_1.png", "IMG_1.jpg"], tmp_path)
    assert [image.path.name for image in found.values()] == ["IMG_1.png", "IMG_1.jpg"]
    (tmp_path / "ids.txt").write_text("s/IMG_1.png\nIMG_1.jpg\n")
    assert [image.id for image in order_by_manifest(images, tmp_path / "ids.txt")] == ["s/IMG_1.png", "IMG_1.jpg"]
    (tmp_path / "ids.txt").write_text("IMG_1\n")
    with pytest.raises(DataError, match="without an image: IMG_1"):
        order_by_manifest(images, tmp_path / "ids.txt")

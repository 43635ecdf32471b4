"""DICOM: windows, inversions and frames of generated files, and the files of pydicom-data."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import data_store
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from engine.errors import EngineError, ImageError, UsageError
from engine.inputs import dicom
from engine.inputs.images import describe_ignored, find_images
from engine.inputs.paths import find_inputs
from engine.inputs.pixels import FRAMES, ImageNote, decode_image
from tests.helpers.datasets import imageless


def make_dicom(path: Path, frames: np.ndarray, **tags: object) -> Path:
    """Write grey frames u8 or u16 [frames,rows,columns] with further tags."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    header.PatientName, header.PatientID = "Secret^Name", "secret-4711"
    header.NumberOfFrames, header.Rows, header.Columns = frames.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = frames.dtype.itemsize * 8
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = 0
    header.PixelData = frames.tobytes()
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)
    return path


def grey(path: Path, frame: int = 0) -> list[int]:
    """The first row of an image, one number per pixel."""
    pixels = np.asarray(decode_image(path, frame=frame))
    assert (pixels == pixels[..., :1]).all(), "not grey"
    return pixels[0, :, 0].tolist()


RAMP = np.array([[[0, 100, 200, 300]]], np.uint16)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, [0, 85, 170, 255]),
        ({"PhotometricInterpretation": "MONOCHROME1"}, [255, 170, 85, 0]),
        ({"PresentationLUTShape": "INVERSE"}, [255, 170, 85, 0]),
        # PS3.3 C.11.2.1.2: (x - (c - 0.5)) / (w - 1) + 0.5
        ({"WindowCenter": 150.5, "WindowWidth": 101}, [0, 0, 255, 255]),
        ({"WindowCenter": 150.5, "WindowWidth": 301}, [0, 85, 170, 255]),
        ({"WindowCenter": [150.5, 9], "WindowWidth": [301, 1]}, [0, 85, 170, 255]),
        ({"WindowCenter": 100, "WindowWidth": 200, "VOILUTFunction": "LINEAR_EXACT"}, [0, 128, 255, 255]),
        ({"WindowCenter": 100, "WindowWidth": 100, "VOILUTFunction": "SIGMOID"}, [5, 128, 250, 255]),
        ({"WindowCenter": 100, "WindowWidth": 1}, [0, 255, 255, 255]),
        ({"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 200.5, "WindowWidth": 601}, [0, 85, 170, 255]),
        ({"PixelPaddingValue": 300}, [0, 128, 255, 255]),
        ({"PixelPaddingValue": 300, "RescaleSlope": 2, "RescaleIntercept": -100}, [0, 128, 255, 255]),
        ({"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 100}, [0, 0, 0, 255]),
        (
            {"WindowCenter": None, "WindowWidth": None, "RescaleSlope": None, "RescaleIntercept": None},
            [0, 85, 170, 255],
        ),
    ],
)
def test_windows_and_inversions(tags, expected, tmp_path):
    assert grey(make_dicom(tmp_path / "x.dcm", RAMP, **tags)) == expected


def table(entries: list[int], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return item


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_voi_tables_of_any_depth(bits, tmp_path):
    most = 2**bits - 1
    entries = [round(i / 400 * most) for i in range(401)]
    path = make_dicom(tmp_path / "x.dcm", RAMP, VOILUTSequence=[table(entries, 0, bits)])
    assert grey(path) == pytest.approx([0, 64, 128, 191], abs=1)


def test_modality_tables_of_any_depth(tmp_path):
    path = make_dicom(
        tmp_path / "x.dcm",
        RAMP,
        ModalityLUTSequence=[table([i * 2 for i in range(301)], 0, 12)],
        WindowCenter=300.5,
        WindowWidth=601,
    )
    assert grey(path) == [0, 85, 170, 255]


def test_signed_values(tmp_path):
    frames = np.array([[[-100, 0, 100, 200]]], np.int16)
    path = make_dicom(tmp_path / "x.dcm", frames, PixelRepresentation=1, WindowCenter=50.5, WindowWidth=301)
    assert grey(path) == [0, 85, 170, 255]


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        ({"HighBit": 14}, "do not begin at the lowest bit"),
        ({"PhotometricInterpretation": "HSV", "SamplesPerPixel": 3, "PlanarConfiguration": 0}, "unsupported colours"),
    ],
)
def test_unsupported_encodings_are_refused(tags, sentence, tmp_path):
    frames = np.zeros((1, 2, 6), np.uint8) if "SamplesPerPixel" in tags else RAMP
    if "SamplesPerPixel" in tags:
        tags = tags | {"Columns": 2}
    with pytest.raises(ImageError, match=sentence):
        decode_image(make_dicom(tmp_path / "x.dcm", frames, **tags))


def test_flat_image_is_not_divided_by_zero(tmp_path):
    assert grey(make_dicom(tmp_path / "x.dcm", np.full((1, 1, 3), 7, np.uint16))) == [0, 0, 0]


def test_first_frame_is_the_default(tmp_path):
    frames = np.array([[[0, 255]], [[255, 0]]], np.uint8)
    path = make_dicom(tmp_path / "x.dcm", frames)
    assert grey(path) == [0, 255]
    assert grey(path, 1) == [255, 0]
    with pytest.raises(ImageError, match="frame 2 does not exist: the file has 2, counted from 0"):
        decode_image(path, frame=2)
    (image,) = find_images(tmp_path, dicom_frame=1).images
    assert image.frame == 1


def test_windows_of_frames_come_from_functional_groups(tmp_path):
    def group(center: float) -> Dataset:
        view, item = Dataset(), Dataset()
        view.WindowCenter, view.WindowWidth = center, 101
        item.FrameVOILUTSequence = [view]
        return item

    frames = np.repeat(RAMP, 2, 0)
    path = make_dicom(tmp_path / "x.dcm", frames, PerFrameFunctionalGroupsSequence=[group(50.5), group(250.5)])
    assert grey(path, 0) == [0, 255, 255, 255]
    assert grey(path, 1) == [0, 0, 0, 255]


def test_private_tags_are_neither_read_nor_reported(tmp_path, monkeypatch):
    path = make_dicom(tmp_path / "x.dcm", RAMP)
    seen = []
    read = pydicom.dcmread

    def spy(*arguments, **options):
        seen.append(read(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(pydicom, "dcmread", spy)
    decode_image(path)
    assert "Rows" in seen[0]
    assert "PatientName" not in seen[0]
    whole = path.read_bytes()
    for cut in range(132, len(whole), 7):
        path.write_bytes(whole[:cut])
        try:
            decode_image(path)
        except ImageError as error:
            assert "ecret" not in str(error)


def test_too_large_frame_is_refused_before_decoding(tmp_path):
    path = make_dicom(tmp_path / "x.dcm", RAMP, Rows=60_000, Columns=60_000)
    with pytest.raises(ImageError, match="a frame of more than 40000000 pixels, refused"):
        decode_image(path)


def test_missing_pydicom_names_the_extra(tmp_path, monkeypatch):
    make_dicom(tmp_path / "x.dcm", RAMP)
    monkeypatch.setitem(__import__("sys").modules, "pydicom.pixels", None)
    with pytest.raises(EngineError, match="pip install 'pydicom"):
        find_images(tmp_path)


FOLDERS = (Path(data_store.__file__).parent / "data", Path(pydicom.__file__).parent / "data" / "test_files")
"""The files of pydicom-data, and the test files in pydicom itself."""
DAMAGED = {
    "image_dfl",
    *("MR_truncated", "badVR", "JPEG2000-embedded-sequence-delimiter", "GDCMJ2K_TextGBR"),
    *("JPEG-lossy", "JPGExtended"),  # 12 bits, which Pillow's JPEG decoder does not support
}
"""Broken on purpose, or in an encoding that neither pydicom nor Pillow can decode."""
DICOM_FILES = [path for folder in FOLDERS for path in sorted(folder.glob("*.dcm")) if path.stat().st_size < 3_000_000]


def test_files_of_pydicom_data():
    """Each file gives an image that is not flat, or is refused with a reason."""
    assert len(DICOM_FILES) > 60
    read, refused = {}, {}
    for path in DICOM_FILES:
        try:
            read[path.stem] = np.asarray(decode_image(path))
        except ImageError as error:
            refused[path.stem] = error.reason
    flat = [name for name, pixels in read.items() if pixels.max() - pixels.min() < 50]
    assert not flat
    assert len(read) >= 60, refused
    assert all(reason for reason in refused.values())
    known = ("no decoder for", "without an image", "not a DICOM file")
    others = {name for name, reason in refused.items() if not reason.startswith(known) and "without" not in reason}
    assert others <= DAMAGED, refused


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("OBXXXX1A", "OBXXXX1A_rle"),
        ("OBXXXX1A", "OBXXXX1A_expb"),
        ("emri_small", "emri_small_RLE"),
        ("emri_small", "emri_small_big_endian"),
        ("MR2_UNCR", "MR2_J2KR"),
        ("US1_UNCR", "US1_J2KR"),
    ],
)
def test_two_encodings_of_an_image_give_equal_pixels(name, other):
    paths = {path.stem: path for path in DICOM_FILES}
    np.testing.assert_array_equal(
        np.asarray(decode_image(paths[name]), int), np.asarray(decode_image(paths[other]), int)
    )


def test_stream_that_is_not_dicom_is_refused():
    with pytest.raises(ValueError, match="not a DICOM file"):
        dicom.read_dicom(io.BytesIO(b"x" * 500))


@pytest.mark.parametrize("name", ["IM-0001-0001", "1.2.840.113619.2.55.3", "x.IMA", "y.dcm"])
@pytest.mark.parametrize("form", ["whole", "without preamble", "without header", "implicit"])
def test_dicom_is_recognised_by_its_bytes(form, name, tmp_path):
    frames = np.array([[[0, 100, 200, 250], [1, 2, 3, 4]]], np.uint8)
    tags = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT", "WindowCenter": 128, "WindowWidth": 256}
    whole = make_dicom(tmp_path / "whole", frames, **tags)
    content = whole.read_bytes()
    file = tmp_path / "in" / name
    file.parent.mkdir()
    if form == "without preamble":
        content = content[132:]
    elif form == "without header":
        length = int.from_bytes(content[140:144], "little")
        content = content[144 + length :]
    elif form == "implicit":
        header = pydicom.dcmread(whole)
        stream = io.BytesIO()
        writer = pydicom.filebase.DicomIO(stream)
        writer.is_little_endian, writer.is_implicit_VR = True, True
        pydicom.filewriter.write_dataset(writer, Dataset({element.tag: element for element in header}))
        content = stream.getvalue()
    file.write_bytes(content)
    (image,) = find_images(file.parent).images
    assert image.id == name.removesuffix(".IMA").removesuffix(".dcm")
    assert grey(file) == grey(whole)


NOT_IMAGES = {
    "DICOMDIR": "1.2.840.10008.1.3.10",
    "dose.dcm": "1.2.840.10008.5.1.4.1.1.88.67",
    "PR000001": "1.2.840.10008.5.1.4.1.1.11.1",
    "plan.dcm": "1.2.840.10008.5.1.4.1.1.481.5",
    "unknown.dcm": "1.2.3.4.5",
}


@pytest.fixture
def disc(tmp_path):
    """A folder with one image, and the other files that a DICOM disc has."""
    make_dicom(tmp_path / "ct.dcm", RAMP)
    for name, sop_class in NOT_IMAGES.items():
        imageless(tmp_path / name, sop_class)
    return tmp_path


def test_dicom_files_without_an_image_are_skipped_and_counted(disc):
    (disc / "notes.txt").touch()
    found = find_images(disc)
    assert [image.id for image in found.images] == ["ct"]
    assert found.imageless == set(NOT_IMAGES)
    assert describe_ignored(found.ignored, found.imageless) == "1 .txt, 5 DICOM files without an image"
    for location, names in ((disc / "*", {str(disc / name) for name in NOT_IMAGES}), (disc, set(NOT_IMAGES))):
        inputs = find_inputs([location])
        assert [image.id for image in inputs.images] == ["ct"]
        assert inputs.imageless == names
    (disc / "ct.dcm").unlink()
    with pytest.raises(UsageError, match=r"holds no images, but 1 \.txt, 5 DICOM files without an image"):
        find_images(disc)


def test_named_dicom_file_without_an_image_is_an_error(disc):
    (image,) = find_inputs([disc / "dose.dcm"]).images
    with pytest.raises(ImageError, match=r"dose\.dcm: a DICOM file without an image"):
        decode_image(image.path)


def test_images_of_other_sop_classes_are_found(tmp_path):
    """A dose grid has pixels although its SOP class is not an image class. An unknown class may have pixels too."""
    for name, sop_class in (("dose.dcm", "1.2.840.10008.5.1.4.1.1.481.2"), ("new.dcm", "1.2.3")):
        path = make_dicom(tmp_path / name, RAMP)
        header = pydicom.dcmread(path)
        header.file_meta.MediaStorageSOPClassUID = sop_class
        header.save_as(path)
    assert [image.id for image in find_images(tmp_path).images] == ["dose", "new"]


def test_damaged_dicom_file_is_reported_when_read(tmp_path):
    (tmp_path / "x.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 50)
    (image,) = find_images(tmp_path).images
    with pytest.raises(ImageError, match=r"x\.dcm"):
        decode_image(image.path)


def test_deflated_file_is_refused_before_inflation(tmp_path):
    path = imageless(tmp_path / "x.dcm", "1.2.840.10008.5.1.4.1.1.7", Rows=1, Columns=1)
    whole = path.read_bytes()
    syntax = b"1.2.840.10008.1.2.1\0"
    assert whole.count(syntax) == 1
    start = whole.index(b"\x08\0\x16\0")  # the first tag after the header
    header = whole[:start].replace(struct.pack("<H", len(syntax)) + syntax, b"\x16\0" + b"1.2.840.10008.1.2.1.99")
    length = struct.unpack("<I", header[140:144])[0] + 2
    squeezer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<I", 50_000_000) + bytes(50_000_000)
    content = squeezer.compress(whole[start:] + bomb) + squeezer.flush()
    path.write_bytes(header[:140] + struct.pack("<I", length) + header[144:] + content)
    tracemalloc.start()
    assert len(find_images(tmp_path).images) == 1
    with pytest.raises(ImageError, match="deflated as a whole"):
        decode_image(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_tags_in_another_encoding_than_the_header_are_read(tmp_path):
    """The header says explicit, but the tags are implicit.

    pydicom detects that when it reads the tags, but not when it seeks the pixels.
    """
    path = make_dicom(tmp_path / "x.dcm", RAMP, WindowCenter=150.5, WindowWidth=301)
    header = pydicom.dcmread(path)
    stream = io.BytesIO()
    writer = pydicom.filebase.DicomIO(stream)
    writer.is_little_endian, writer.is_implicit_VR = True, True
    pydicom.filewriter.write_dataset(writer, Dataset({element.tag: element for element in header}))
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\x10\0\x10\0PN")] + stream.getvalue())
    assert grey(path) == [0, 85, 170, 255]


def test_further_frames_of_a_dicom_file_are_noted(tmp_path):
    notes: list[ImageNote] = []
    decode_image(make_dicom(tmp_path / "one.dcm", RAMP), notes=notes)
    assert notes == []
    decode_image(make_dicom(tmp_path / "x.dcm", np.repeat(RAMP, 3, 0)), frame=1, notes=notes)
    assert notes == [(FRAMES, str(tmp_path / "x.dcm"))]

"""Bytes from strangers, by the hundred: every reader answers with a value or with the engine's own error.

CI runs seconds of it; HYPOTHESIS_PROFILE=long runs minutes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.faults import UNUSUAL, encoded
from engine.bundle.manifest import Bundle
from engine.errors import BundleError, DataError, ImageError, UsageError
from engine.inputs.images import ImageFile, order_by_manifest
from engine.inputs.pixels import read_image
from engine.run.record import RunRecord

DICOM = [path.read_bytes() for path in sorted(Path(pydicom.__file__).parent.glob("data/test_files/MR_small*.dcm"))[:4]]
SEEDS = (
    [*DICOM]
    + [encoded(kind) for kind in ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")]
    + [c for _, c in UNUSUAL.values()]
)
here = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid file with some bytes changed, and perhaps cut short or with bytes put in."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 8))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    place = draw(st.integers(0, len(content)))
    return bytes(content[: draw(st.sampled_from([place, len(content)]))]) + draw(st.binary(max_size=16))


@here
@given(content=damaged(SEEDS), extension=st.sampled_from([".png", ".jpg", ".webp", ".dcm"]))
def test_a_damaged_picture_is_pixels_or_one_reason(content, extension, tmp_path):
    path = tmp_path / f"x{extension}"
    path.write_bytes(content)
    try:
        pixels = read_image(path, 8, 8, "bicubic")
    except ImageError as error:
        assert error.path == str(path)
        assert "\n" not in str(error)
    else:
        assert pixels.shape == (8, 8, 3)
        assert pixels.dtype == np.uint8


@here
@given(
    content=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "ignore")))
)
def test_any_bytes_as_a_manifest_are_a_choice_of_images_or_one_sentence(content, tmp_path):
    images = [ImageFile(str(i), tmp_path / f"{i}.png") for i in range(10)]
    manifest = tmp_path / "ids.csv"
    manifest.write_bytes(content)
    try:
        chosen = order_by_manifest(images, manifest)
    except DataError as error:
        assert str(manifest) in str(error)
    else:
        assert len(set(chosen)) == len(chosen) > 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def bundle_copy(tiny_bundle, tmp_path_factory):
    return shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("fuzz") / "bundle")


@here
@given(data=st.data())
def test_a_bundle_with_any_manifest_is_a_bundle_or_refused(data, bundle_copy, tiny_bundle):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    place = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(JSON)
        break
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    try:
        bundle = Bundle.load(bundle_copy)
    except BundleError as error:
        assert "\n" not in str(error)
    else:
        assert bundle.model.num_layers > 0


@here
@given(data=st.data())
def test_a_damaged_journal_never_gives_a_caption_nobody_wrote(data, tmp_path_factory):
    from engine.captions import Alternative, Caption

    directory = tmp_path_factory.getbasetemp() / "damaged journal"  # one name, so that journals have one length
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    images = [ImageFile(f"image {i}", directory / f"{i}.png") for i in range(4)]
    for image in images:
        image.path.touch()
    out = directory / "run.csv"
    written = {image.id: Caption(image.id, (Alternative(image.id, "raw", (1, 2), -1.0, -0.5),)) for image in images}
    with RunRecord(images, out, "made with") as record:
        for caption in written.values():
            record.add(caption)
    journal = directory / "run.csv.journal"
    content = data.draw(damaged([journal.read_bytes()]))
    journal.write_bytes(content)
    try:
        resumed = RunRecord(images, out, "made with")
    except UsageError:  # nothing of a journal is left in it
        assert journal.read_bytes() == content
        return
    with resumed as record:
        assert all(written[name] == caption for name, caption in record.captions.items())
        for image in record.remaining():
            record.add(written[image.id])
    with RunRecord(images, out, "made with") as record:
        assert record.captions == written

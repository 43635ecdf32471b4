"""Fuzz tests of the readers: any bytes give a value or one of the engine's own errors.

CI runs them for seconds. HYPOTHESIS_PROFILE=long runs them for minutes.
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
    """A valid file with some bytes changed, possibly cut short or with bytes appended."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 8))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    end = draw(st.integers(0, len(content)))
    return bytes(content[: draw(st.sampled_from([end, len(content)]))]) + draw(st.binary(max_size=16))


@here
@given(content=damaged(SEEDS), extension=st.sampled_from([".png", ".jpg", ".webp", ".dcm"]))
def test_damaged_image_gives_pixels_or_one_reason(content, extension, tmp_path):
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
def test_any_bytes_as_id_list_select_images_or_one_error(content, tmp_path):
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
def test_bundle_with_any_manifest_loads_or_is_refused(data, bundle_copy, tiny_bundle):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    node = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(node)))
        if isinstance(node[key], dict) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(JSON)
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
def test_damaged_journal_never_gives_a_false_caption(data, tmp_path_factory):
    from engine.captions import Alternative, Caption

    directory = (
        tmp_path_factory.getbasetemp() / "damaged journal"
    )  # always the same name, so that all journals have the same length
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
    except UsageError:  # no longer recognised as a journal
        assert journal.read_bytes() == content
        return
    with resumed as record:
        assert all(written[name] == caption for name, caption in record.captions.items())
        for image in record.remaining():
            record.add(written[image.id])
    with RunRecord(images, out, "made with") as record:
        assert record.captions == written

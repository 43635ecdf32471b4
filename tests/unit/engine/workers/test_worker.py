"""Messages between driver and workers, and a CaptionWorker in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.backends.ort import OrtBackend
from engine.bundle.manifest import BundleWatch
from engine.bundle.open import BundleRef
from engine.bundle.signature import environment
from engine.bundle.tokenizer import CaptionTokenizer
from engine.captioner import resolve
from engine.captions import Alternative, Caption
from engine.errors import BundleError, EngineError, OutOfMemoryError, UsageError
from engine.inputs.images import ImageFile, find_images
from engine.inputs.pixels import ImageNote
from engine.inputs.remote import RemoteFolder
from engine.runtime import Runtime
from engine.workers.messages import (
    Answer,
    WorkOrder,
    pack_captions,
    pack_error,
    pack_failures,
    pack_image_notes,
    pack_images,
    pack_note,
    pack_ready,
    unpack_answer,
    unpack_images,
)
from engine.workers.worker import CaptionWorker
from tests.helpers.tiny import save_pictures

CAPTION = Caption(
    "a", (Alternative("A b.", "a b .", (3, 4), -0.1 - 0.2, float.fromhex("-0x1.fffffffffffffp-3")),), 0.1 + 0.2, "5d41"
)


def test_messages_round_trip():
    (back,) = unpack_answer(pack_captions([CAPTION])).captions
    assert (back, back.latency_s, back.file_sha256) == (CAPTION, 0.1 + 0.2, "5d41")
    assert unpack_answer(pack_failures({"x": "truncated"})).failures == {"x": "truncated"}
    notes = [ImageNote("clipped", "x.png"), ImageNote("frames", "\udcff.gif")]
    assert unpack_answer(pack_image_notes(notes)).image_notes == tuple(notes)
    assert unpack_answer(pack_note("less memory")).note == "less memory"
    assert unpack_answer(pack_ready(48)).wants == 48
    images = [
        ImageFile("odd", Path("/images/\udcff.png"), 2, depth="0,4095"),
        ImageFile("far", Path("a/b.png"), 0, RemoteFolder("s3://b/c")),
    ]
    assert unpack_images(pack_images(images)) == images
    assert unpack_images(pack_images([ImageFile("near", Path("near.png"))]))[0].path.is_absolute()


@pytest.mark.parametrize(("error", "code"), [(UsageError("no"), 2), (OutOfMemoryError("no"), 1)])
def test_error_keeps_message_and_exit_code(error, code):
    with pytest.raises(EngineError, match=r"^no$") as caught:
        unpack_answer(pack_error(error))
    assert caught.value.exit_code == code
    with pytest.raises(EngineError, match=r"^no \(on the node far\)$"):
        unpack_answer(pack_error(error, " (on the node far)"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[ImageFile]:
    directory = save_pictures(tmp_path_factory.mktemp("stream"), 24, name="{:02}.png")
    (directory / "05.png").write_bytes(b"no picture")
    return find_images(directory).images


@pytest.fixture
def worker(tiny_bundle: Path) -> CaptionWorker:
    ref = BundleRef((tiny_bundle,))
    bundle = ref.open()
    decoding = resolve(bundle, CaptionTokenizer(bundle), bundle.options(num_beams=3))
    runtime = Runtime("cpu", threads=1)
    return CaptionWorker(WorkOrder(ref, bundle.digest, runtime, decoding, 12, environment("cpu")))


def answers_of(worker: CaptionWorker, images: list[ImageFile]) -> Iterator[Answer]:
    """Submit the images once the worker is ready, and yield its answers up to the last image's."""
    answers = map(unpack_answer, worker.answers())
    assert next(answers).wants > len(images)
    worker.submit(pack_images(images))
    missing = len(images)
    while missing:
        answer = next(answers)
        missing -= len(answer.captions) + len(answer.failures)
        yield answer


def test_worker_captions_in_order_and_reports_unreadable_images(worker, images, tiny_captioner):
    readable = [image for image in images if image.id != "05"]
    expected = {caption.id: caption.text for caption in tiny_captioner.caption(readable, num_beams=3)}
    answers = list(answers_of(worker, images))
    made = [caption for answer in answers for caption in answer.captions]
    assert [(caption.id, caption.text) for caption in made] == list(expected.items())
    assert [answer.failures for answer in answers if answer.failures] == [{"05": "not an image, or damaged"}]


def test_an_overwritten_bundle_ends_a_worker(worker, images, monkeypatch):
    checks = iter([None, None])

    def check(_: object) -> None:
        if next(checks, "overwritten") is not None:
            raise BundleError("overwritten")

    monkeypatch.setattr(BundleWatch, "check", check)
    made: list[Answer] = []
    with pytest.raises(EngineError, match="overwritten"):
        made.extend(answers_of(worker, images[6:]))
    assert [caption.id for answer in made for caption in answer.captions] == ["06", "07"]


def test_out_of_memory_loses_no_image(worker, images, monkeypatch):
    step = OrtBackend.step

    def tight(backend, cache, inputs, **named):
        if len(inputs.scores) > 2:
            raise OutOfMemoryError("bad_alloc")
        return step(backend, cache, inputs, **named)

    monkeypatch.setattr(OrtBackend, "step", tight)
    answers = list(answers_of(worker, images))
    assert "note: memory is short with 4 images in parallel: continuing with 2" in [answer.note for answer in answers]
    made = [caption.id for answer in answers for caption in answer.captions]
    assert sorted(made) == [image.id for image in images if image.id != "05"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "0" * 64}, "differs from the bundle of the run: copy it again"),
        (
            {"environment": "numpy:0"},
            "has other package versions .* than the driver .*numpy:0.*: install the same versions",
        ),
        (
            {"engine_version": "0"},
            "has other package versions .* than the driver .*engine:0.*: install the same versions",
        ),
        ({"num_nodes": 2, "digest": ""}, r"copy it again \(on the node .*\)$"),
    ],
)
def test_worker_of_another_bundle_or_version_is_refused(worker, change, said):
    with pytest.raises(EngineError, match=said):
        list(map(unpack_answer, CaptionWorker(replace(worker._order, **change)).answers()))

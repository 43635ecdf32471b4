"""Messages between driver and workers, and a CaptionStream with several callers; without a cluster."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.captions import Alternative, Caption
from engine.errors import BundleError, EngineError, OutOfMemoryError, UsageError
from engine.inputs.images import ImageFile, find_images
from engine.inputs.pixels import ImageNote
from engine.inputs.remote import RemoteFolder
from engine.workers.messages import (
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
from engine.workers.worker import CaptionStream, Unreadable
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


def test_concurrent_callers_get_their_images_in_order(images, tiny_captioner):
    options = tiny_captioner.bundle.options(num_beams=3)
    readable = [image for image in images if image.id != "05"]
    expected = {caption.id: caption.text for caption in tiny_captioner.caption(readable, options)}
    stream = CaptionStream(tiny_captioner, options, rows=12)
    answers: dict[int, list] = {}

    def ask(caller: int) -> None:
        answers[caller] = list(stream.caption(images[caller::3]))

    callers = [threading.Thread(target=ask, args=(caller,)) for caller in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    for caller in range(3):
        said = [answer for answer in answers[caller] if isinstance(answer, Caption)]
        assert [caption.id for caption in said] == [i.id for i in images[caller::3] if i.id != "05"]
        assert all(caption.text == expected[caption.id] for caption in said)
    assert [(a.id, str(a.error)) for caller in range(3) for a in answers[caller] if isinstance(a, Unreadable)] == [
        ("05", f"{images[5].path}: not an image, or damaged")
    ]


def test_an_overwritten_bundle_ends_a_stream(images, tiny_captioner):
    checks = iter([None, None])

    def check() -> None:
        if next(checks, "overwritten") is not None:
            raise BundleError("overwritten")

    stream = CaptionStream(tiny_captioner, tiny_captioner.bundle.options(), rows=4, check_bundle=check)
    answers = stream.caption(images[6:])
    assert [next(answers).id, next(answers).id] == ["06", "07"]
    with pytest.raises(BundleError, match="overwritten"):
        next(answers)


def test_stream_out_of_memory_loses_no_image(images, tiny_captioner, monkeypatch):
    step, options = tiny_captioner.backend.step, tiny_captioner.bundle.options(num_beams=3)

    def tight(cache, inputs):
        if len(inputs.scores) > 2:
            raise OutOfMemoryError("bad_alloc")
        return step(cache, inputs)

    monkeypatch.setattr(tiny_captioner.backend, "step", tight)
    said = list(CaptionStream(tiny_captioner, options, rows=12).caption(images))
    assert "memory is short with 4 images in parallel: continuing with 2" in said
    assert sorted(answer.id for answer in said if isinstance(answer, Caption)) == [
        image.id for image in images if image.id != "05"
    ]
    assert len([answer for answer in said if isinstance(answer, Unreadable)]) == 1


def test_error_reaches_the_caller_and_the_next_is_served(images, tiny_captioner, monkeypatch):
    stream = CaptionStream(tiny_captioner, tiny_captioner.bundle.options(num_beams=3), rows=12)
    with monkeypatch.context() as patch:
        patch.setattr(tiny_captioner.backend, "step", lambda *_: (_ for _ in ()).throw(EngineError("broken")))
        with pytest.raises(EngineError, match="broken"):
            list(stream.caption(images))
    assert len(list(stream.caption(images))) == len(images)

"""The captioner's own work: order, repeats, and when a caption is handed out."""

from __future__ import annotations

import numpy as np
import pytest

from engine import backends
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import UsageError
from engine.options import DecodeOptions
from engine.runtime import Runtime
from tests.helpers.tiny import random_pictures


def test_equal_images_are_captioned_once_and_handed_out_while_others_are_read(tiny_captioner):
    one, other = random_pictures(2)
    read = 0

    def images(count):
        nonlocal read
        for place in range(count):
            read += 1
            yield other if place == 200 else one

    encoded = []
    encode = tiny_captioner.backend.encode
    try:
        tiny_captioner.backend.encode = lambda pixels: (encoded.append(len(pixels)), encode(pixels))[1]
        captions = tiny_captioner.caption(images(400), num_beams=2, rows=8)
        found = [next(captions)]
        assert read < 200, f"{read} images were read before the first caption came"
        found += captions
    finally:
        del tiny_captioner.backend.encode
    assert [caption.id for caption in found] == [str(place) for place in range(400)]
    assert sum(encoded) == 2
    alone = {caption.ids for caption in tiny_captioner.caption([one, other], num_beams=2)}
    assert found[200].ids in alone
    assert len({caption.ids for place, caption in enumerate(found) if place != 200}) == 1
    assert np.array_equal([caption.latency_s == 0 for caption in found[300:]], [True] * 100)


@pytest.mark.parametrize(("threads", "streams", "shares"), [(2, None, [2]), (16, None, [8, 8]), (5, 2, [3, 2])])
def test_streams_share_the_threads(threads, streams, shares, tiny_bundle, monkeypatch):
    opened = []
    monkeypatch.setattr(backends, "open_backend", lambda _, runtime: opened.append(runtime.threads))
    backends.open_backends(Bundle.load(tiny_bundle), Runtime("cpu", threads=threads, streams=streams))
    assert opened == shares


def test_several_streams_say_what_one_says(tiny_bundle):
    pictures = random_pictures(19, seed=4)
    one, three = (Captioner.load(str(tiny_bundle), backend="cpu", threads=3, streams=count) for count in (1, 3))
    for given in ({"num_beams": 3, "no_repeat_ngram_size": 2}, {"do_sample": True, "num_return_sequences": 2}):
        expected, found = (
            [(caption.id, caption.ids) for caption in captioner.caption(pictures, rows=12, max_new_tokens=12, **given)]
            for captioner in (one, three)
        )
        assert found == expected
    assert three.scheduler(three.search(DecodeOptions()), 12).num_sets == 3


@pytest.mark.parametrize(
    ("wrong", "said"), [({"backend": "cuda"}, "for the backend cpu"), ({"threads": 2}, "2 threads")]
)
def test_streams_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        Runtime(**({"backend": "cpu", "streams": 4} | wrong))


def test_with_streams_one_iteration_at_a_time(tiny_bundle):
    captioner = Captioner.load(str(tiny_bundle), backend="cpu", threads=2, streams=2)
    pictures = random_pictures(9, seed=5)
    first = captioner.caption(pictures, rows=2)
    next(first)
    with pytest.raises(UsageError, match="captioning already"):
        next(captioner.caption(pictures, rows=2))
    first.close()
    assert len(list(captioner.caption(pictures, rows=2))) == 9

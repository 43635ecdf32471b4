"""The captioner's own work: order, repeats, and when a caption is handed out."""

from __future__ import annotations

import numpy as np

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

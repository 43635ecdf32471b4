"""Captioner: order, repeated images, and when a caption is returned."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from queue import Empty

import numpy as np
import pytest
from PIL import Image

from engine import backends
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import BundleError, UsageError
from engine.options import DecodeOptions
from engine.runtime import Runtime
from tests.helpers.tiny import random_pictures


def test_equal_images_are_captioned_once(tiny_captioner):
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


@pytest.mark.parametrize(
    ("threads", "streams", "many_images", "shares"),
    [
        (2, None, False, [2]),
        (2, None, True, [1, 1]),
        (2, 1, True, [2]),
        (3, None, True, [3]),
        (16, None, True, [8, 8]),
        (5, 2, False, [3, 2]),
    ],
)
def test_streams_share_the_threads(threads, streams, many_images, shares, tiny_bundle, monkeypatch):
    monkeypatch.setattr(backends, "open_backend", lambda _, runtime: [runtime.threads])
    runtime = Runtime("cpu", threads=threads, streams=streams)
    opened = backends.open_backends(Bundle.load(tiny_bundle), runtime, many_images=many_images)
    assert [count for (count,) in opened] == shares
    assert len({id(backend) for backend in opened}) == (1 if shares == [1, 1] else len(shares))


def test_streams_of_one_thread_need_no_more_memory(tiny_bundle):
    one, two = (Captioner.load(str(tiny_bundle), backend="cpu", threads=2, streams=count) for count in (1, 2))
    search = one.search(DecodeOptions(num_beams=4))
    assert two.scheduler(search).concurrency == one.scheduler(search).concurrency
    assert two.scheduler(search).num_sets == 2


def test_several_streams_give_the_same_captions(tiny_bundle):
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
    ("wrong", "said"),
    [({"backend": "cuda"}, "for the backend cpu"), ({"threads": 2}, "at least as many threads, not 2")],
)
def test_impossible_streams_are_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        Runtime(**({"backend": "cpu", "streams": 4} | wrong))


def test_streams_allow_one_iteration_at_a_time(tiny_bundle):
    captioner = Captioner.load(str(tiny_bundle), backend="cpu", threads=2, streams=2)
    pictures = random_pictures(9, seed=5)
    first = captioner.caption(pictures, rows=2)
    next(first)
    with pytest.raises(UsageError, match="already captioning"):
        next(captioner.caption(pictures, rows=2))
    first.close()
    assert len(list(captioner.caption(pictures, rows=2))) == 9


GREY = np.linspace(0, 4095, 32 * 32).reshape(32, 32)


def test_arrays_of_unclear_range_need_high_bit_depth(tiny_captioner):
    good, deep = random_pictures(1)[0], GREY.astype(np.float32) / 4095
    failed = []
    captions = list(
        tiny_captioner.caption([good, deep, Image.fromarray(GREY.astype(np.uint16))], on_error=failed.append)
    )
    assert [caption.id for caption in captions] == ["0"]
    assert [str(error)[:50] for error in failed] == [
        "image 1: an array of float32 instead of uint8: giv",
        "image 2: a Pillow image of mode I;16 instead of ui",
    ]
    eight_bits = (GREY / 4095 * 255 + 0.5).astype(np.uint8)
    scaled, expected = tiny_captioner.caption([deep, eight_bits], high_bit_depth="scale", num_beams=2)
    assert scaled.alternatives == expected.alternatives
    with pytest.raises(UsageError, match="give clip, scale, or two numbers"):
        tiny_captioner.caption([deep], high_bit_depth="0-255")


def test_notes_on_dropped_content_are_per_call(tiny_captioner, tmp_path):
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "deep.png")
    rgba = np.full((8, 8, 4), 9, np.uint8)
    for _ in range(2):
        notes = []
        list(tiny_captioner.caption([tmp_path / "deep.png", rgba], on_note=notes.append))
        assert notes == [("clipped", str(tmp_path / "deep.png")), ("transparent", "1")]
        assert tiny_captioner.clipped == [str(tmp_path / "deep.png")]
    list(tiny_captioner.caption([rgba]))
    assert tiny_captioner.clipped == []


@pytest.mark.parametrize("streams", [1, 2])
def test_a_live_source_may_wait_for_each_caption(streams, tiny_bundle):
    captioner = Captioner.load(str(tiny_bundle), backend="cpu", threads=2, streams=streams)
    one, *others = random_pictures(5, seed=3)
    pictures, answered = [one, one, *others, one], threading.Event()
    answered.set()

    def feed():
        for picture in pictures:
            assert answered.wait(60), "no caption came for the image before this one"
            answered.clear()
            yield picture

    found = []
    for caption in captioner.caption(feed(), live=True, num_beams=2, max_new_tokens=5):
        found.append((caption.id, caption.ids))
        answered.set()
    expected = captioner.caption(pictures, num_beams=2, max_new_tokens=5)
    assert found == [(caption.id, caption.ids) for caption in expected]


def test_images_of_a_live_source_are_decoded_together(tiny_captioner):
    """Images that arrive while others are decoded join them, and an unreadable image delays no other."""
    arrived = threading.Event()

    def feed():
        yield from random_pictures(3, seed=6)
        yield np.zeros((2, 2, 9), np.uint8)
        arrived.wait(60)
        yield from random_pictures(2, seed=7)

    failed = []
    captions = tiny_captioner.caption(feed(), live=True, on_error=failed.append, rows=8)
    assert [next(captions).id for _ in range(3)] == ["0", "1", "2"]
    arrived.set()
    assert [caption.id for caption in captions] == ["4", "5"]
    assert len(failed) == 1


def test_live_source_ends_on_errors_and_early_exit(tiny_captioner):
    def feed(error):
        yield random_pictures(1)[0]
        raise error

    for error in (Empty("of the source's own queue"), RuntimeError("broken")):
        with pytest.raises(type(error)):
            list(tiny_captioner.caption(feed(error), live=True))
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield random_pictures(1)[0]
        finally:
            closed.set()

    captions = tiny_captioner.caption(endless(), live=True)
    next(captions)
    captions.close()
    assert closed.wait(20), "the source is still read"


def test_pickled_captioner_gives_the_same_captions(tiny_bundle, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    monkeypatch.chdir(tmp_path)
    captioner = Captioner.load("bundle", backend="cpu", threads=1)
    expected = [caption.ids for caption in captioner.caption(random_pictures(2))]
    monkeypatch.chdir("/")
    parcel = pickle.dumps(captioner)
    for other in (pickle.loads(parcel), copy.deepcopy(captioner)):
        assert [caption.ids for caption in other.caption(random_pictures(2))] == expected
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(BundleError, match="is not the bundle that was pickled"):
        pickle.loads(parcel)


def test_captioner_of_open_parts_cannot_be_pickled(tiny_captioner):
    with pytest.raises(TypeError, match=r"cannot be pickled: use Captioner\.load"):
        pickle.dumps(tiny_captioner)


def test_a_closed_captioner_frees_its_backend_and_is_refused(tiny_bundle):
    with Captioner.load(str(tiny_bundle), backend="cpu", threads=1) as captioner:
        backend = weakref.ref(captioner.backend)
        assert len(list(captioner.caption(random_pictures(1)))) == 1
    gc.collect()
    assert backend() is None
    with pytest.raises(UsageError, match="this captioner is closed: load it again"):
        captioner.caption(random_pictures(1))
    captioner.close()


def test_captions_of_a_captioner_closed_before_they_are_read(tiny_bundle):
    captioner = Captioner.load(tiny_bundle, backend="cpu")
    captions = captioner.caption(random_pictures(2))
    captioner.close()
    with pytest.raises(UsageError, match="this captioner is closed: load it again"):
        next(captions)


@pytest.mark.parametrize("nothing", [[], (), "", [""]])
def test_no_bundle_is_not_the_demo(nothing):
    with pytest.raises(UsageError, match="no bundle is given: pass its folder, or None for the embedded demo"):
        Captioner.load(nothing)


def test_keyword_of_none_is_not_given(tiny_bundle):
    bundle = Bundle.load(tiny_bundle)
    bundle = replace(bundle, generation={**bundle.generation, "num_beams": 3, "no_repeat_ngram_size": 1})
    captioner, pictures = Captioner.of(bundle, Runtime("cpu")), random_pictures(3)
    usual, none, other = (
        [caption.ids for caption in captioner.caption(pictures, max_new_tokens=12, **given)]
        for given in ({}, {"num_beams": None, "no_repeat_ngram_size": None}, {"no_repeat_ngram_size": 0})
    )
    assert usual == none != other


def test_one_opened_image_several_times(tiny_captioner, tmp_path):
    """Pillow decodes it when it is first used, and cannot do so in several threads at once."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (1200, 1500, 3), np.uint8)).save(tmp_path / "a.png")
    for _ in range(3):
        opened = Image.open(tmp_path / "a.png")
        captions = list(tiny_captioner.caption([opened] * 6, prompts={str(i): "a" * (i % 2) for i in range(6)}))
        assert {caption.ids for caption in captions[::2]} == {captions[0].ids}
        assert captions[0].ids == next(tiny_captioner.caption([tmp_path / "a.png"])).ids


def test_sampled_captions_do_not_depend_on_prompts_of_others(tiny_captioner):
    pictures, given = random_pictures(3), {"do_sample": True, "seed": 3}
    few, more = (
        [caption.ids for caption in tiny_captioner.caption(pictures, prompts={"0": "a", "1": last, "2": ""}, **given)]
        for last in ("a", "a picture of the chest")
    )
    assert (few[0], few[2]) == (more[0], more[2])
    assert few[1] != more[1]
    assert few[0] == next(tiny_captioner.caption(pictures, prompt="a", **given)).ids
    assert few[2] == [caption.ids for caption in tiny_captioner.caption(pictures, **given)][2]


@pytest.mark.parametrize("wrong", [[], (), 0, "0", [True], [0.0]])
def test_wrong_attention_layers(wrong, tiny_captioner):
    with pytest.raises(UsageError, match="attention layers are a list of numbers from 0 to"):
        tiny_captioner.caption(random_pictures(1), attention=wrong)
    (caption,) = tiny_captioner.caption(random_pictures(1), attention=None)
    assert caption.attention is None


def test_two_iterations_with_other_attention_layers(tiny_bundle):
    captioner, pictures = Captioner.load(tiny_bundle, backend="cpu"), random_pictures(3)
    first = captioner.caption(pictures, attention=[0], rows=1)
    next(first)
    with pytest.raises(UsageError, match="already gives attention of other layers"):
        next(captioner.caption(pictures, attention=[1]))
    assert len(list(captioner.caption(pictures, attention=[0]))) == 3
    assert len(list(first)) == 2
    assert len(list(captioner.caption(pictures, attention=[1]))) == 3

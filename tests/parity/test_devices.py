"""The step loop with padded shapes, bound memory and raw addresses gives the captions of the CPU backend."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from benchmarks.host import INSTANT
from benchmarks.host_worker import Device as Words
from benchmarks.host_worker import pictures
from engine.backends.ort import OrtBackend
from engine.backends.shapes import FEWEST_MARKS, FEWEST_SETTLED, Bounds, PaddedBackend, bucket_size, profiles
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.decoding.backend import BatchSizes, StepInputs
from engine.decoding.beam import Search
from engine.decoding.scheduler import Scheduler
from engine.errors import BackendError, OutOfMemoryError
from engine.options import DecodeOptions
from tests.helpers.stand_in import stand_in_backend
from tests.helpers.tiny import random_pictures

PICTURES = random_pictures(13, seed=11)
SEARCHES = {
    "greedy": DecodeOptions(max_new_tokens=30),
    "4 beams, ban": DecodeOptions(num_beams=4, no_repeat_ngram_size=2, max_new_tokens=30, num_return_sequences=4),
    "10 beams": DecodeOptions(num_beams=10, max_new_tokens=25, length_penalty=0.3),
    "prompt": DecodeOptions(num_beams=3, prompt="a picture of the chest", max_new_tokens=20, no_repeat_ngram_size=3),
    "least length": DecodeOptions(num_beams=2, min_new_tokens=20, max_new_tokens=40, no_repeat_ngram_size=1),
    "drawn": DecodeOptions(do_sample=True, num_return_sequences=3, top_k=40, seed=5, max_new_tokens=20),
}
SEARCH = Search(
    prompt=(30522,),
    num_beams=4,
    max_length=64,
    min_length=0,
    length_penalty=1.0,
    early_stopping=False,
    no_repeat_ngram_size=3,
    num_return_sequences=1,
    eos=102,
    vocab_size=30524,
)
TOLERANCE = 1e-4
"""Float32 sums in other shapes are rounded differently; measured 2e-6 on the tiny model."""


@pytest.fixture(scope="module")
def bundle(tiny_bundle) -> Bundle:
    return Bundle.load(tiny_bundle)


@pytest.fixture(scope="module")
def fp16_bundle(rounded_bundles) -> Bundle:
    return Bundle.load(rounded_bundles["fp16"])


def captions(bundle: Bundle, backend, options: DecodeOptions, rows: int = 20):
    found = Captioner(bundle, backend).caption(PICTURES, options, rows=rows)
    return [[(one.ids, one.score) for one in caption.alternatives] for caption in found]


def assert_same(found, expected) -> None:
    assert [[ids for ids, _ in several] for several in found] == [[ids for ids, _ in several] for several in expected]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose([s for _, s in mine], [s for _, s in theirs], atol=TOLERANCE)


class ShapeRecorder:
    """Wraps a backend and records the shapes of its steps."""

    def __init__(self, inner) -> None:
        self._inner, self.name, self.batch_sizes, self.shapes = inner, inner.name, inner.batch_sizes, set()

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def step(self, cache, inputs: StepInputs, at: int):
        past = (cache.settled[0].shape()[2], cache.recent[0].shape()[2])
        self.shapes.add((*inputs.marked_ids.shape, *past))
        return self._inner.step(cache, inputs, at)


@pytest.mark.parametrize("name", SEARCHES)
def test_padded_shapes_change_no_caption_and_are_few(name, bundle, tiny_captioner):
    options = SEARCHES[name]
    expected = captions(bundle, tiny_captioner.backend, options)
    recorder = ShapeRecorder(OrtBackend(bundle, "cpu", threads=1))
    assert_same(captions(bundle, PaddedBackend(recorder), options), expected)
    slots, _, bans, settled, recent = (set(sizes) for sizes in zip(*recorder.shapes, strict=True))
    assert all(size == bucket_size(size, FEWEST_MARKS) for size in bans)
    assert all(size == bucket_size(size, FEWEST_SETTLED) for size in settled)
    assert recent == {8 * options.num_beams}
    assert len(slots) <= 3
    assert len(recorder.shapes) <= 8


def test_two_thousand_images_need_few_shapes():
    for beams in (1, 3, 4, 5, 10):
        slots = 1024 // beams
        device = Words(BatchSizes(rows=2048, encode_batch=16, sets=2), 30524, 102, beams, INSTANT)
        backend = PaddedBackend(device)
        search = replace(SEARCH, num_beams=beams)
        scheduler = Scheduler(backend, search, num_slots=slots, num_sets=2, encode_batch=16)
        found = dict(scheduler.run(enumerate(pictures(2000, 8, 8))))
        assert len(found) == 2000
        assert len(backend.shapes) <= 8, sorted(backend.shapes)
        assert {shape[0] for shape in backend.shapes} <= {slots, -(-slots // 4), -(-slots // 16)}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("uses_cuda_graphs", [False, True])
def test_plans_give_the_captions_of_the_graphs(name, uses_cuda_graphs, bundle, tiny_captioner):
    options = SEARCHES[name]
    bounds = Bounds.of(bundle, beams=options.num_beams, max_new_tokens=45, rows=40)
    backend = stand_in_backend(bundle, bounds, uses_cuda_graphs=uses_cuda_graphs)
    expected = captions(bundle, tiny_captioner.backend, options)
    assert_same(captions(bundle, PaddedBackend(backend), options), expected)
    few = 2 * options.num_beams  # few images at a time, so that shapes and addresses repeat
    assert_same(captions(bundle, PaddedBackend(backend), options, rows=few), expected)
    captured = backend._graphs["decoder"].captured
    assert bool(captured) == uses_cuda_graphs
    if uses_cuda_graphs:
        assert any(captured.values())


def test_plans_in_half_precision(fp16_bundle):
    options = SEARCHES["4 beams, ban"]
    expected = captions(fp16_bundle, OrtBackend(fp16_bundle, "cpu", threads=1), options)
    backend = stand_in_backend(fp16_bundle, Bounds.of(fp16_bundle, beams=4, max_new_tokens=30, rows=40))
    found = captions(fp16_bundle, PaddedBackend(backend), options)
    assert [several[0][0] for several in found] == [several[0][0] for several in expected]


STATIC = {"penalties": (2,)}
"""Inputs with a fixed shape, which profiles do not list."""


def test_every_shape_is_within_its_profile(bundle):
    options = SEARCHES["4 beams, ban"]
    bounds = Bounds.of(bundle, beams=4, max_new_tokens=30, rows=20)
    backend = stand_in_backend(bundle, bounds)
    captions(bundle, PaddedBackend(backend), options)
    for graph, profile in profiles(bundle, bounds).items():
        runs = backend._graphs[graph].contexts[0].runs
        assert runs
        for shapes in runs:
            for name, shape in shapes:
                least, _, most = profile.get(name, [STATIC.get(name)] * 3)
                assert all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)), name


@pytest.mark.parametrize(
    ("built_for", "asked"),
    [
        ({"beams": 2}, {"num_beams": 4}),
        (
            {"beams": 4, "max_new_tokens": 3},
            {"num_beams": 4, "min_new_tokens": 58, "max_new_tokens": 60, "no_repeat_ngram_size": 1},
        ),
        ({"beams": 4, "rows": 8}, {"num_beams": 4}),
    ],
)
def test_searches_beyond_the_plans_are_refused(built_for, asked, bundle):
    backend = PaddedBackend(stand_in_backend(bundle, Bounds.of(bundle, **built_for)))
    with pytest.raises(BackendError, match=r"the maximum is \d+: .* `engine plan`"):
        captions(bundle, backend, DecodeOptions(**asked), rows=40)


def test_default_slots_fit_the_plans(bundle):
    backend = PaddedBackend(stand_in_backend(bundle, Bounds.of(bundle, beams=4, rows=12)))
    captioner = Captioner(bundle, backend)
    assert captioner.scheduler(captioner.search(DecodeOptions(max_new_tokens=10))).num_slots == 3


def test_memory_is_freed_with_its_cache(bundle):
    backend = stand_in_backend(bundle, Bounds.of(bundle, beams=1, rows=4))
    captions(bundle, PaddedBackend(backend), DecodeOptions(max_new_tokens=10), rows=4)
    gc.collect()
    held = len(backend._device._owned)
    for _ in range(2):
        captions(bundle, PaddedBackend(backend), DecodeOptions(max_new_tokens=10), rows=4)
        gc.collect()
        assert len(backend._device._owned) == held


def test_memory_of_onnxruntime_is_freed_with_its_cache(bundle):
    backend = OrtBackend(bundle, "cpu", threads=1)
    for padded in (PaddedBackend(backend), backend):
        captions(bundle, padded, DecodeOptions(max_new_tokens=10), rows=4)
        gc.collect()
        assert not backend._device._owned


def test_pools_shrink_once_after_out_of_memory(bundle, monkeypatch):
    """The first step fails. In the next attempt each session returns memory after its first run."""
    backend = PaddedBackend(OrtBackend(bundle, "cpu", threads=1))
    expected, failures = captions(bundle, backend, SEARCHES["4 beams, ban"]), ["std::bad_alloc"]
    runs: dict[int, list[str | None]] = {}
    run = onnxruntime.InferenceSession.run_with_iobinding

    def recording(session, binding, options=None):
        if failures and session is backend.inner._decoder:
            raise RuntimeError(failures.pop())
        entry = options and options.get_run_config_entry("memory.enable_memory_arena_shrinkage")
        runs.setdefault(id(session), []).append(entry)
        run(session, binding, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", recording)
    with pytest.raises(OutOfMemoryError, match="bad_alloc"):
        captions(bundle, backend, SEARCHES["4 beams, ban"])
    assert not any(any(entries) for entries in runs.values())
    runs.clear()
    assert_same(captions(bundle, backend, SEARCHES["4 beams, ban"]), expected)
    assert len(runs) == 3
    for entries in runs.values():
        assert entries[0] == "cpu:0"
        assert len(entries) > 1
        assert not any(entries[1:])


def test_fewer_slots_encode_fewer_images(tiny_captioner):
    search = tiny_captioner.search(DecodeOptions(num_beams=2))
    sizes = replace(tiny_captioner.backend.batch_sizes, encode_batch=64)
    backend = ShapeRecorder(tiny_captioner.backend)
    backend.batch_sizes = sizes
    captioner = Captioner(tiny_captioner.bundle, backend)
    assert [captioner.scheduler(search, rows).encode_batch for rows in (400, 128, 20, 1)] == [64, 64, 10, 1]


def test_unmasked_padding_changes_captions(bundle, tiny_captioner, monkeypatch):
    """Negative control: masks that do not hide padding change captions."""
    options = SEARCHES["4 beams, ban"]
    expected = captions(bundle, tiny_captioner.backend, options)
    real = OrtBackend.step

    def careless(self, cache, inputs, at):
        ancestry = inputs.ancestry.copy()
        ancestry[:, :, 0] = True
        return real(self, cache, replace(inputs, ancestry=ancestry), at)

    monkeypatch.setattr(OrtBackend, "step", careless)
    found = captions(bundle, PaddedBackend(OrtBackend(bundle, "cpu", threads=1)), options)
    assert [several[0][0] for several in found] != [several[0][0] for several in expected]

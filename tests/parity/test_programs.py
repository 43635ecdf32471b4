"""The programs of the benchmark give the engine's captions, so that their times can be compared."""

from __future__ import annotations

import pytest

from benchmarks.programs import Conventional, export_conventional
from engine.options import DecodeOptions
from tests.helpers.tiny import random_pictures

SETTINGS = [
    DecodeOptions(num_beams=1, no_repeat_ngram_size=2, max_new_tokens=12),
    DecodeOptions(num_beams=4, no_repeat_ngram_size=3, max_new_tokens=16),
]


@pytest.fixture(scope="module")
def pictures():
    return random_pictures(5)


def engine_ids(captioner, pictures, options):
    return [caption.ids for caption in captioner.caption(pictures, options)]


@pytest.fixture(scope="module")
def conventional_graphs(tiny_reference, tmp_path_factory):
    return export_conventional(tiny_reference, tmp_path_factory.mktemp("conventional"))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", SETTINGS)
def test_conventional_onnx_loop_equals_engine(tiny_captioner, tiny_reference, conventional_graphs, pictures, options):
    program = Conventional(conventional_graphs, tiny_captioner.search(options), threads=1)
    found = program.caption(tiny_reference.pixels(pictures).numpy())
    assert [hypothesis.ids for hypothesis in found] == engine_ids(tiny_captioner, pictures, options)


@pytest.mark.parametrize("options", SETTINGS)
def test_generate_without_scores_gives_same_ids(tiny_reference, pictures, options):
    pixel_values = tiny_reference.pixels(pictures)
    with_scores, without = (
        tiny_reference.generate(pixel_values, options, with_scores=asked) for asked in (True, False)
    )
    assert [[c.ids for c in one] for one in with_scores] == [[c.ids for c in one] for one in without]

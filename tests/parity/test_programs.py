"""The programs of the benchmark give the engine's captions, so that their times can be compared."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from benchmarks import workload as workloads
from benchmarks.programs import EXACT, ROUNDED, Comparison, Conventional, export_conventional
from benchmarks.workload import Workload
from engine.options import DecodeOptions
from tests.helpers.tiny import random_pictures, save_pictures

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


@pytest.fixture(scope="module")
def comparison(tiny_checkpoint, tiny_bundle, rounded_bundles, tmp_path_factory):
    build = tmp_path_factory.mktemp("workload")
    (build / "tiny").mkdir()
    for precision, bundle in rounded_bundles.items():
        (build / f"tiny/bundle-{precision}").symlink_to(bundle)
    pictures = save_pictures(build / "pictures", 5, name="{:02}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "BUILD", build)
        yield Comparison(Workload("tiny", tiny_checkpoint, tiny_bundle, pictures, 12), SETTINGS[0].over({}), None, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", ROUNDED)
def test_lower_precision_is_near_float32(name, comparison):
    exact, _ = EXACT["engine"](comparison)(5, 2)
    ids, unfilled_s = ROUNDED[name](comparison)(5, 2)
    assert sum(mine == other for mine, other in zip(exact, ids, strict=True)) >= 3
    assert (unfilled_s is None) == name.startswith("generate")


def test_time_with_empty_slots_begins_with_the_last_image(comparison):
    caption = EXACT["engine"](replace(comparison, rows=2))
    (many, unfilled), start = caption(5, 1), time.perf_counter()
    assert (len(many), len(caption(2, 1)[0])) == (5, 2)
    assert unfilled > 0
    assert caption(2, 1)[1] < time.perf_counter() - start

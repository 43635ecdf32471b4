"""Sampling: Hugging Face's warpers, draws that do not depend on other slots, and true probabilities."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.cli.app import main
from engine.decoding.processors import Sampling, draw, probabilities
from engine.errors import UsageError
from engine.options import DecodeOptions
from tests.helpers.tiny import random_pictures, save_pictures


@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.1, 3.0),
    st.integers(1, 30),
    st.floats(0.05, 1.0),
)
@settings(deadline=None)
def test_probabilities_equal_hugging_faces_warpers(seed, temperature, top_k, top_p):
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)) * 3
    warped = logits.clone()
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        warped = warper(None, warped)
    expected = torch.softmax(warped.double(), -1).sort(-1, descending=True).values[:, :top_k].numpy()
    log_probs = torch.log_softmax(logits, -1).sort(-1, descending=True).values[:, :top_k].numpy()
    found = probabilities(log_probs, Sampling(temperature, top_k, top_p, 0, 1))
    uncut = probabilities(log_probs, Sampling(temperature, top_k, 1.0, 0, 1))
    if top_p < 1 and np.abs(np.cumsum(uncut, 1) - top_p).min() < 1e-6:
        return  # rounding decides whether a word stays
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_frequencies_of_drawn_tokens():
    sampling = Sampling(0.7, 4, 0.95, 0, 1)
    log_probs = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))
    count = 40_000
    uniform = np.random.default_rng(0).random(count)
    drawn = draw(np.repeat(log_probs, count, 0), uniform, sampling)
    expected = probabilities(log_probs, sampling)[0] * count
    found = np.bincount(drawn, minlength=4)
    kept = expected > 0
    assert found[~kept].sum() == 0
    assert ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 16.3  # chi square, 3 degrees, p = 0.001


def test_banned_tokens_are_never_drawn():
    log_probs = np.array([[0.0, -np.inf, -np.inf]], np.float32)
    assert draw(log_probs, np.array([0.999999]), Sampling(5.0, 3, 1.0, 0, 1)).tolist() == [0]


OPTIONS = DecodeOptions(do_sample=True, num_return_sequences=3, max_new_tokens=12, no_repeat_ngram_size=2, seed=7)


def test_draw_does_not_depend_on_slots_or_other_images(tiny_captioner):
    pictures = random_pictures(9)
    together = {c.id: c for c in tiny_captioner.caption(pictures, OPTIONS, rows=20)}
    few = {c.id: c for c in tiny_captioner.caption(pictures, OPTIONS, rows=2)}
    for name, caption in together.items():
        assert [a.ids for a in caption.alternatives] == [a.ids for a in few[name].alternatives]
    (alone,) = tiny_captioner.caption(pictures[4:5], OPTIONS)
    assert [a.ids for a in alone.alternatives] == [a.ids for a in together["4"].alternatives]


def test_other_seeds_draw_other_captions_with_true_scores(tiny_captioner, tiny_reference):
    picture = random_pictures(1)
    (one,) = tiny_captioner.caption(picture, OPTIONS)
    (other,) = tiny_captioner.caption(picture, OPTIONS.replace(seed=8))
    assert [a.ids for a in one.alternatives] != [a.ids for a in other.alternatives]
    assert len({a.ids for a in one.alternatives}) > 1
    pixels = tiny_reference.pixels(picture)
    for alternative in one.alternatives:
        ids = alternative.ids
        assert alternative.sum_log_prob == pytest.approx(tiny_reference.caption_log_prob(pixels, ids, 1), abs=1e-4)
    scores = [a.score for a in one.alternatives]
    assert scores == sorted(scores, reverse=True)


def test_one_likely_word_is_greedy(tiny_captioner):
    pictures = random_pictures(5)
    greedy = [c.ids for c in tiny_captioner.caption(pictures, DecodeOptions(max_new_tokens=12))]
    drawn = tiny_captioner.caption(pictures, DecodeOptions(do_sample=True, top_k=1, max_new_tokens=12))
    assert [c.ids for c in drawn] == greedy


def test_prompts_begin_drawn_captions(tiny_captioner):
    options = DecodeOptions(do_sample=True, num_return_sequences=2, max_new_tokens=8, prompt="a chest x ray")
    for caption in tiny_captioner.caption(random_pictures(3), options):
        assert all(one.raw_text.startswith("a chest x ray") for one in caption.alternatives)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 0}, {"num_beams": 2}, {"seed": -1}]
)
def test_impossible_sampling_options_are_refused(wrong):
    with pytest.raises(UsageError):
        DecodeOptions(do_sample=True, **wrong)


def test_the_command_draws_the_same_for_the_same_seed(tiny_bundle, tmp_path):
    save_pictures(tmp_path / "images", 4)
    found = []
    for name, rows in (("a", 2), ("b", 30)):
        arguments = [
            "caption",
            "--input",
            tmp_path / "images",
            "--bundle",
            tiny_bundle,
            "--out",
            tmp_path / f"{name}.csv",
        ]
        arguments += [
            "--sample",
            "--beams",
            1,
            "--n-best",
            4,
            "--n-best-out",
            tmp_path / f"{name}.jsonl",
            "--rows",
            rows,
        ]
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        found.append([[one["ids"] for one in json.loads(line)["hypotheses"]] for line in lines])
    assert found[0] == found[1]
    assert all(len(several) == 4 for several in found[0])
    assert "do_sample:True" in result.stderr

"""Parity of the parts below `generate`: pixels, encoder, prefill, and cached steps against uncached forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from engine.decoding.backend import StepInputs
from engine.decoding.scheduler import Scheduler
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions
from export.reference.huggingface import UncachedBackend
from tests.helpers.tiny import IMAGE_SIZE, random_pictures

LAYER_TOLERANCE = 2e-5
"""Float32 sums of a few dozen terms in another order; measured 3e-6 on the tiny model."""
LOG_PROB_TOLERANCE = 5e-5
"""The same after all layers and the softmax over logits of size 10; measured 7e-6."""


def engine_pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([read_image(picture, IMAGE_SIZE, IMAGE_SIZE, "bicubic") for picture in pictures])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_pixels_equal_the_slow_image_processor(mode, tiny_reference):
    picture = random_pictures(1)[0].convert(mode)
    theirs = tiny_reference.image_processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")[
        "pixel_values"
    ][0]
    ours = engine_pixels([picture])[0]
    np.testing.assert_array_equal(ours.transpose(2, 0, 1), theirs)


def test_cross_keys_and_values_equal_hugging_face(tiny_captioner, tiny_reference):
    pictures = random_pictures(3)
    cross = tiny_captioner.backend.encode(engine_pixels(pictures))
    model = tiny_reference.model
    with torch.inference_mode():
        encoded = model.vision_model(tiny_reference.pixels(pictures))[0]
        for i, layer in enumerate(model.text_decoder.bert.encoder.layer):
            for project, ours in zip(
                (layer.crossattention.self.key, layer.crossattention.self.value),
                cross[2 * i : 2 * i + 2],
                strict=True,
            ):
                theirs = project(encoded).unflatten(-1, (4, 8)).transpose(1, 2).numpy()
                np.testing.assert_allclose(ours, theirs, atol=LAYER_TOLERANCE)


class Lockstep:
    """A backend that runs two others in lockstep and asserts that both return the same candidates at every step."""

    name = "lockstep"

    def __init__(self, ours, theirs):
        self.ours, self.theirs, self.steps = ours, theirs, 0

    def encode(self, pixel_values):
        return self.ours.encode(pixel_values), self.theirs.encode(pixel_values)

    def allocate(self, num_slots):
        return self.ours.allocate(num_slots), self.theirs.allocate(num_slots)

    def admit(self, cache, slot, encoded, image):
        self.ours.admit(cache[0], slot, encoded[0], image)
        self.theirs.admit(cache[1], slot, encoded[1], image)

    def step(self, cache, inputs: StepInputs):
        scores, ids = self.ours.step(cache[0], inputs)
        expected_scores, expected_ids = self.theirs.step(cache[1], inputs)
        running = np.isfinite(inputs.scores).any(1)  # finished images are still fed, but their results are not used
        np.testing.assert_allclose(scores[running], expected_scores[running], atol=LOG_PROB_TOLERANCE)
        np.testing.assert_array_equal(ids[running], expected_ids[running])
        self.steps += 1
        return scores, ids

    def regroup(self, cache, slots, columns):
        self.ours.regroup(cache[0], slots, columns)
        self.theirs.regroup(cache[1], slots, columns)


@pytest.mark.parametrize("prompt", [None, "a picture of the chest"])
@pytest.mark.parametrize(("num_beams", "ngram"), [(1, 0), (3, 2), (6, 3)])
def test_cached_steps_equal_uncached_forward(num_beams, ngram, prompt, tiny_captioner, tiny_reference):
    """Includes the prefill, several regroupings, and images that finish while others take their slots."""
    options = DecodeOptions(
        num_beams=num_beams, no_repeat_ngram_size=ngram, min_new_tokens=9, max_new_tokens=26, prompt=prompt
    )
    backend = Lockstep(tiny_captioner.backend, UncachedBackend(tiny_reference))
    scheduler = Scheduler(backend, tiny_captioner.search(options), num_slots=3)
    results = dict(scheduler.decode(engine_pixels(random_pictures(7))))
    assert len(results) == 7
    assert backend.steps > 24


def test_prompts_start_with_dec_and_drop_sep(tiny_captioner, tiny_reference):
    theirs = tiny_reference.tokenizer("a picture of the chest")["input_ids"]
    bos = tiny_captioner.bundle.tokens.bos
    assert tiny_captioner.tokenizer.prompt_ids("a picture of the chest") == (bos, *theirs[1:-1])
    assert tiny_captioner.tokenizer.prompt_ids(None) == (bos,)


def test_raw_text_equals_transformers_decode(tiny_captioner, tiny_reference):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = [tiny_captioner.bundle.tokens.bos, *rng.integers(0, len(tiny_reference.tokenizer), 15).tolist()]
        assert tiny_captioner.tokenizer.decode(ids) == tiny_reference.tokenizer.decode(ids, skip_special_tokens=True)

"""A live torch model gives the captions of its bundle and of Hugging Face."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensor, FakeTensorMode

from engine.bundle.manifest import STEP_INPUTS
from engine.decoding.backend import StepInputs
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions
from export.families.modules import DecoderStep
from export.reference.huggingface import Reference
from export.reference.torch_backend import TorchBackend, caption_live
from tests.helpers.other_device import DEVICE, other_device
from tests.helpers.tiny import IMAGE_SIZE, random_pictures

PICTURES = random_pictures(9, seed=5)


def pixels(reference) -> list[np.ndarray]:
    resample = Image.Resampling(reference.image_processor.resample).name.lower()
    return [read_image(picture, IMAGE_SIZE, IMAGE_SIZE, resample) for picture in PICTURES]


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_new_tokens=20),
        DecodeOptions(num_beams=3, max_new_tokens=20, no_repeat_ngram_size=2, num_return_sequences=3),
        DecodeOptions(num_beams=4, max_new_tokens=12, min_new_tokens=3, length_penalty=2.0),
    ],
)
def test_live_model_equals_generate(tiny_reference, options):
    found = dict(
        caption_live(tiny_reference.model, tiny_reference.image_processor, enumerate(pixels(tiny_reference)), options)
    )
    expected = tiny_reference.generate(tiny_reference.pixels(PICTURES), options)
    assert len(found) == len(PICTURES)
    for i, captions in enumerate(expected):
        assert [one.ids for one in found[i]] == [caption.ids for caption in captions]


def test_live_model_samples_like_its_bundle(tiny_reference, tiny_captioner):
    options = DecodeOptions(do_sample=True, num_return_sequences=3, seed=3, max_new_tokens=15, top_k=30)
    images = list(enumerate(pixels(tiny_reference)))
    live = dict(caption_live(tiny_reference.model, tiny_reference.image_processor, images, options))
    bundle = dict(tiny_captioner.scheduler(tiny_captioner.search(options)).run(images))
    assert {i: [one.ids for one in several] for i, several in live.items()} == {
        i: [one.ids for one in several] for i, several in bundle.items()
    }
    assert len({one.ids for several in live.values() for one in several}) > len(PICTURES)


@pytest.mark.parametrize("beams", [1, 3])
def test_live_model_with_a_prompt_per_image(tiny_reference, beams):
    """Prompts of different lengths, or none, in one batch give the captions of Hugging Face for one image at a time."""
    options = DecodeOptions(num_beams=beams, max_new_tokens=12, no_repeat_ngram_size=2)
    texts = ["axial ct of the", "mri", ""] * 3
    ids = {
        i: tuple(tiny_reference.tokenizer(text, add_special_tokens=False)["input_ids"]) for i, text in enumerate(texts)
    }
    given = {i: one for i, one in ids.items() if one}
    images = enumerate(pixels(tiny_reference))
    found = dict(caption_live(tiny_reference.model, tiny_reference.image_processor, images, options, given))
    for i, (picture, text) in enumerate(zip(PICTURES, texts, strict=True)):
        asked = options.replace(prompt=text or None)
        ((best,),) = tiny_reference.generate(tiny_reference.pixels([picture]), asked)
        assert found[i][0].ids == best.ids
        assert found[i][0].ids[1 : 1 + len(ids[i])] == ids[i]


def test_caption_after_long_prompt_ends_at_last_position(tiny_reference):
    positions = tiny_reference.model.config.text_config.max_position_embeddings
    prompt = tuple(range(10, 20)) * 6
    options = DecodeOptions(
        max_new_tokens=40, min_new_tokens=1, suppress_tokens=(tiny_reference.tokenizer.sep_token_id,)
    )
    images = enumerate(pixels(tiny_reference)[:2])
    found = dict(caption_live(tiny_reference.model, tiny_reference.image_processor, images, options, {0: prompt}))
    assert [len(found[i][0].ids) for i in (0, 1)] == [positions, 41]


def test_caption_live_restores_the_training_mode(tiny_reference):
    model = tiny_reference.model
    model.train()
    try:
        captions = caption_live(
            model, tiny_reference.image_processor, enumerate(pixels(tiny_reference)[:2]), DecodeOptions()
        )
        next(captions)
        assert not model.training
        assert len(list(captions)) == 1
        assert model.training
        assert next(model.parameters()).requires_grad
    finally:
        model.eval()
    assert not torch.is_inference_mode_enabled()


def test_select_on_cuda_tensors(tiny_reference, monkeypatch):
    """TorchBackend.step passes a number of candidates that can be combined with CUDA tensors.

    FakeTensorMode checks devices as CUDA does. In a build of torch without CUDA it runs only simple operators, such as
    those of the selection, so this test replaces the decoder before it.
    """
    selected = []

    def forward(self, *inputs):
        num_candidates, recent = inputs[len(STEP_INPUTS)], inputs[-1]
        log_probs, running = torch.empty(2, 3, 50, device="cuda"), torch.empty(2, 3, device="cuda")
        selected.extend(self._select(log_probs, running, num_candidates))
        return torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.int64), *recent

    monkeypatch.setattr(DecoderStep, "forward", forward)
    monkeypatch.setattr(FakeTensor, "numpy", lambda tensor: np.zeros(tensor.shape))
    backend = TorchBackend(tiny_reference.model, tiny_reference.image_processor)
    inputs = StepInputs(
        input_ids=np.zeros((2, 3), np.int64),
        positions=np.zeros((2, 3), np.int64),
        scores=np.zeros((2, 3), np.float32),
        marked_ids=np.full((2, 3, 1), -1),
        penalties=np.ones(2, np.float32),
        ancestry=np.ones((2, 3, 3), bool),
        num_candidates=6,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        backend.step(backend.allocate(2), inputs)
    assert [one.device.type for one in selected] == ["cuda", "cuda"]
    assert [one.shape for one in selected] == [(2, 6), (2, 6)]


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(num_beams=3, max_new_tokens=40, no_repeat_ngram_size=2, num_return_sequences=3),
        DecodeOptions(do_sample=True, num_return_sequences=2, max_new_tokens=10, seed=3),
    ],
)
def test_live_model_on_another_device(tiny_checkpoint, tiny_reference, options):
    """Encoding, steps, folding of the cache and selection never mix tensors of the model's device and the CPU."""
    images = list(enumerate(pixels(tiny_reference)[:4]))
    expected = dict(caption_live(tiny_reference.model, tiny_reference.image_processor, images, options))
    moved = Reference.load(tiny_checkpoint)
    with other_device():
        moved.model.to(DEVICE)
        found = dict(caption_live(moved.model, moved.image_processor, images, options))
    assert {i: [one.ids for one in several] for i, several in found.items()} == {
        i: [one.ids for one in several] for i, several in expected.items()
    }

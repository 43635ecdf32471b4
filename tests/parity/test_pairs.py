"""Every pair of VisionEncoderDecoder gives the ids of `generate`: greedy, with beams, penalties, bans and prompts.

A short grid runs for each pair; `make test-families` sets FAMILIES_GRID=full for the whole one.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from engine.captioner import Captioner
from engine.checkpoints.settings import size_before_crop
from engine.decoding.scheduler import Scheduler
from engine.errors import CheckpointError
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions
from export.bundle import export_bundle
from export.reference.huggingface import Reference, UncachedBackend
from export.reference.torch_backend import TorchBackend, caption_live, search_of
from export.reference.trace import SCORE_TOLERANCE, judge, summed_log_prob
from export.restore import restore_checkpoint
from tests.helpers.tiny import random_pictures
from tests.helpers.tiny_pairs import make_pair, pairs

IS_FULL = os.environ.get("FAMILIES_GRID") == "full"
IMAGES = 9
PROMPT = "the chest"
GRID = [
    {
        "num_beams": beams,
        "no_repeat_ngram_size": ngram,
        "length_penalty": penalty,
        "early_stopping": stopping,
        "prompt": prompt,
        "min_new_tokens": least,
    }
    for beams, ngram, prompt, least in itertools.product((1, 3, 4, 5, 10), (0, 2, 3), (None, PROMPT), (None, 6))
    for penalty, stopping in ([(1.0, False)] if beams == 1 else itertools.product((0.6, 2.0), (False, True, "never")))
]
PENALTIES = [
    {"num_beams": beams, "repetition_penalty": penalty, "prompt": prompt, "min_new_tokens": least} | bans
    for beams, penalty, prompt, least in itertools.product((1, 3), (1.0, 1.3, 2.5), (None, PROMPT), (None, 6))
    for bans in ({}, {"bad_words": ("lesion", "brain mass")}, {"suppress_tokens": (9, 10), "bad_words_ids": ((7, 8),)})
]
SHORT = [
    GRID[0],
    GRID[1] | {"prompt": PROMPT, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "no_repeat_ngram_size": 3, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 4, "no_repeat_ngram_size": 2, "prompt": PROMPT, "early_stopping": True, "min_new_tokens": 6},
    {"num_beams": 5, "repetition_penalty": 1.3, "bad_words": ("lesion", "brain mass")},
    {"num_beams": 10, "length_penalty": 0.6},
    {"num_beams": 1, "repetition_penalty": 2.5, "suppress_tokens": (9, 10), "max_length": 11},
]


@pytest.mark.parametrize(("encoder", "decoder"), pairs())
def test_captions_of_a_pair_equal_generate(encoder, decoder, exported):
    checkpoint, bundle = exported(encoder, decoder)
    compare_with_generate(Captioner.load(bundle, backend="cpu", threads=1), Reference.load(checkpoint))


def compare_with_generate(captioner: Captioner, reference: Reference, slots: int | None = None) -> None:
    """Compare ids and scores over the grid of settings; captions may differ only where their scores tie.

    `slots` is the number of images in flight (None: what the captioner chooses).
    """
    pictures = random_pictures(IMAGES)
    pixels = reference.pixels(pictures)
    captions, failures = set(), []
    for setting in GRID + PENALTIES if IS_FULL else SHORT:
        options = DecodeOptions(**{"max_new_tokens": 14} | setting if "max_length" not in setting else setting)
        options = options.replace(num_return_sequences=options.num_beams)
        theirs = reference.generate(pixels, options)
        found = captioner.caption(pictures, options, rows=slots and slots * options.num_beams)
        for mine, expected in zip(found, theirs, strict=True):
            captions.add(mine.ids)
            assert mine.raw_text == reference.tokenizer.decode(mine.ids, skip_special_tokens=True)
            for rank, (ours, one) in enumerate(zip(mine.alternatives, expected, strict=True)):
                if ours.ids != one.ids:
                    verdict, gap = judge(reference, captioner, pictures[int(mine.id)], options, ours, rank)
                    if verdict != "real":  # in the whole grid two of 10 captions tie, 1e-6 apart
                        continue
                    failures.append(f"{setting}, image {mine.id}: {ours} instead of {one}, {gap}")
                elif one.score is not None:
                    np.testing.assert_allclose(ours.score, one.score, rtol=SCORE_TOLERANCE, atol=SCORE_TOLERANCE)
    assert not failures, "\n".join(failures)
    assert len(captions) > 3 * IMAGES, "captions hardly depend on the image: the test shows little"
    assert len({len(ids) for ids in captions}) > 3


FORCED = ("forced_bos_token_id", "forced_eos_token_id")


def assert_same_samples(reference: Reference, captioner: Captioner) -> None:
    """Compare captions that are drawn with the bundle and with the model in torch."""
    options = DecodeOptions(do_sample=True, num_return_sequences=3, seed=3, max_new_tokens=12, num_beams=1)
    options = options.over({name: captioner.bundle.generation.get(name) for name in FORCED})
    spec, pictures = captioner.bundle.image, random_pictures(4)
    pixels = [read_image(one, spec.height, spec.width, spec.resample, resize=spec.resize) for one in pictures]
    given = reference.model, reference.image_processor, enumerate(pixels), options
    live = dict(caption_live(*given, task_ids=reference.task_ids))
    bundle = dict(captioner.scheduler(captioner.search(options)).run(enumerate(pixels)))
    drawn = {number: [one.ids for one in several] for number, several in live.items()}
    assert drawn == {number: [one.ids for one in several] for number, several in bundle.items()}
    assert len({ids for several in drawn.values() for ids in several}) > len(pixels)


REFUSED = [("swin", "bert"), ("beit", "bert")]


@pytest.mark.parametrize(("encoder", "decoder"), [("deit", "gpt2"), ("dinov2", "gpt2"), *REFUSED])
def test_images_of_another_size(encoder, decoder, tmp_path):
    """The position table is resized once, as the encoder resizes it for each image."""
    checkpoint = make_pair(tmp_path / "checkpoint", encoder, decoder)
    side = 2 * Reference.load(checkpoint).sizes.image_size
    if (encoder, decoder) in REFUSED:
        with pytest.raises(CheckpointError, match=f"--image-size {side}: the positions of this {encoder} encoder"):
            Reference.load(checkpoint, side)
        return
    resized, plain = Reference.load(checkpoint, side), Reference.load(checkpoint).model.encoder
    pixels = resized.pixels(random_pictures(2))
    assert pixels.shape[-1] == side
    with torch.inference_mode():
        options = {} if encoder == "dinov2" else {"interpolate_pos_encoding": True}
        expected = plain(pixels, **options).last_hidden_state
        torch.testing.assert_close(resized.model.encoder(pixels).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "decoder", "precision"), [("vit", "gpt2", "int8"), ("swin", "mbart", "fp16"), ("deit", "trocr", "fp32")]
)
def test_precisions_and_restored_checkpoints(encoder, decoder, precision, tmp_path):
    """GPT-2's dense layers are Conv1D, whose weights have another layout; a restored checkpoint lacks the pooler."""
    checkpoint = make_pair(tmp_path / "checkpoint", encoder, decoder)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", lambda _: None, precision=precision)
    reference, pictures = Reference.load(checkpoint), random_pictures(IMAGES)
    options = DecodeOptions(num_beams=3, max_new_tokens=14, no_repeat_ngram_size=3)
    expected = [best.ids for best, *_ in reference.generate(reference.pixels(pictures), options)]
    if precision == "fp32":
        assert_same_samples(reference, Captioner.load(bundle.path, backend="cpu", threads=1))
        restored = Reference.load(restore_checkpoint(bundle.path, tmp_path / "restored"))
        assert restored.sizes == reference.sizes
        found = [best.ids for best, *_ in restored.generate(restored.pixels(pictures), options)]
        assert found == expected
        return
    found = [caption.ids for caption in Captioner.load(bundle.path, backend="cpu").caption(pictures, options)]
    # random logits lie close together: int8 changes about half of these captions; the export compares scores
    least = IMAGES / 2 if precision == "fp16" else IMAGES / 4
    assert sum(a == b for a, b in zip(found, expected, strict=True)) > least
    kinds = [node.op_type for node in onnx.load(bundle.path / "decoder.onnx").graph.node]
    # of two layers: c_attn and c_proj, q_attn and c_proj of cross-attention, c_fc and c_proj of the MLP; and the head
    assert kinds.count("MatMulInteger") == (2 * 6 + 1 if precision == "int8" else 0)


WAVES = {"use_learned_position_embeddings": False, "scale_embedding": True, "layernorm_embedding": False}
VARIANTS = {
    "pad ids in captions of RoBERTa": ("vit", "roberta", {}, "pad"),
    "pad ids in captions of TrOCR with waves": (
        "vit",
        "trocr",
        {"text": WAVES | {"activation_function": "relu"}},
        "pad",
    ),
    "GPT-2 of the encoder's width, head not tied": (
        "vit",
        "gpt2",
        {"text": {"n_embd": 24, "n_head": 3, "tie_word_embeddings": False, "reorder_and_upcast_attn": True}},
        None,
    ),
    "Swin whose patches need padding": ("swin", "bert", {"vision": {"window_size": 3, "image_size": 32}}, None),
    "BEiT without a last norm": ("beit", "bert", {"vision": {"use_mean_pooling": True}}, None),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_generate(variant, tmp_path):
    """The modules that are exported, in torch: other settings of the same models."""
    encoder, decoder, settings, favoured = VARIANTS[variant]
    checkpoint = make_pair(tmp_path, encoder, decoder, favoured=favoured, **settings)
    reference = Reference.load(checkpoint)
    backend = TorchBackend(reference.model, reference.image_processor)
    pictures = random_pictures(IMAGES)
    spec = reference.sizes.image_size
    resample = Image.Resampling(reference.image_processor.resample).name.lower()
    resize = size_before_crop(reference.image_processor.to_dict())
    u8 = np.stack([read_image(picture, spec, spec, resample, resize=resize) for picture in pictures])
    pads = 0
    for setting in ({"num_beams": 1}, {"num_beams": 4, "no_repeat_ngram_size": 3}, {"num_beams": 3}):
        options = DecodeOptions(max_new_tokens=14, **setting)
        theirs = reference.generate(reference.pixels(pictures), options)
        ours = dict(Scheduler(backend, search_of(reference.model, options), num_slots=4).decode(u8))
        for number, (expected, *_) in enumerate(theirs):
            assert ours[number][0].ids == expected.ids, setting
            pads += reference.sizes.tokens.pad in expected.ids[1:-1]
            judged = UncachedBackend(reference)  # its positions must be those of generate's cache
            search, image = search_of(reference.model, options), u8[number]
            log_prob = summed_log_prob(judged, search, image, expected.ids)
            assert abs(log_prob - ours[number][0].sum_log_prob) < 1e-4 * max(1.0, abs(log_prob))
    assert summed_log_prob(judged.in_float64, search, image, expected.ids) == pytest.approx(log_prob, rel=1e-5)
    assert bool(pads) == (favoured == "pad")

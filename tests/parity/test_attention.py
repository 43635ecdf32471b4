"""Attention maps equal Hugging Face's own: teacher forcing of the final ids, eager attention, for every family."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.backends.attention import attention_graph, grid_of, require_attention
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import BundleError, UsageError
from engine.options import DecodeOptions
from export.families.vision_encoder_decoder import CACHE
from export.reference.huggingface import Reference
from tests.helpers.earlier import bundle_of_084ae4d
from tests.helpers.tiny import IMAGE_SIZE, PATCH_SIZE, random_pictures
from tests.helpers.tiny_pairs import pairs

PICTURES = random_pictures(6)
SEARCHES = [
    {"num_beams": 3, "no_repeat_ngram_size": 3, "max_new_tokens": 14, "min_new_tokens": 5},
    {"num_beams": 1, "prompt": "the chest", "max_new_tokens": 9},
]
TOLERANCE = 1e-5
"""Before rounding to float16: both are float32 sums of the same terms in another order."""


def expected_attention(reference: Reference, index: int, ids: tuple[int, ...], layers: list[int]) -> np.ndarray:
    """Return f32[T,S] for all ids but the last by Hugging Face's own code."""
    model, fed = reference.model, torch.tensor([ids[:-1]])
    model.set_attn_implementation("eager")
    pixels = reference.pixels([PICTURES[index]])
    with torch.inference_mode():
        if reference.model.config.model_type == "git":
            # no cross-attention: the text's rows of self-attention, where the image's positions come first
            outputs = model(pixel_values=pixels, input_ids=fed, output_attentions=True, use_cache=False)
            image = reference.sizes.encoder_positions
            found = [weights[:, :, image:, :image] for weights in outputs.attentions]
        else:
            hidden = reference.family.encode(model, pixels)
            if reference.model.config.model_type == "blip":
                arguments = {"output_attentions": True, "use_cache": False}
                outputs = model.text_decoder(input_ids=fed, encoder_hidden_states=hidden, **arguments)
                found = list(outputs.cross_attentions)
            else:
                found = by_steps(model, hidden, fed)
    return torch.stack([found[layer] for layer in layers]).mean((0, 2))[0].numpy()


def by_steps(model, hidden: torch.Tensor, fed: torch.Tensor) -> list[torch.Tensor]:
    """Return cross-attention, a tensor a layer, with a cache as in `generate`: RoBERTa's positions depend on it if a
    caption has the pad id."""
    cache, steps = None, []
    for column in fed.split(1, 1):
        arguments = {CACHE: cache, "use_cache": True, "output_attentions": True}
        outputs = model(encoder_outputs=(hidden,), decoder_input_ids=column, **arguments)
        cache = outputs.past_key_values
        steps.append(outputs.cross_attentions)
    return [torch.cat(weights, 2) for weights in zip(*steps, strict=True)]


def compare(bundle: Bundle, reference: Reference, layers: list[int] | None = None) -> None:
    """Compare the backend's weights, before rounding, and the captions' maps with Hugging Face's."""
    captioner = Captioner.load(bundle.path, backend="cpu", threads=1)
    averaged = list(range(bundle.model.num_layers)) if layers is None else layers
    rows, columns, first = grid_of(captioner.bundle)
    different = set()
    for settings in SEARCHES:
        decoding = captioner.decoding(DecodeOptions(**settings))
        pixels = np.stack([read(captioner, picture) for picture in PICTURES])
        found = dict(captioner.scheduler(decoding.search, attention=averaged).decode(pixels))
        captions = captioner.caption(PICTURES, DecodeOptions(**settings), attention=True if layers is None else layers)
        plain = captioner.caption(PICTURES, DecodeOptions(**settings))
        for index, (caption, without) in enumerate(zip(captions, plain, strict=True)):
            best = found[index][0]
            assert caption == without
            assert caption.ids == best.ids
            expected = expected_attention(reference, index, best.ids, averaged)
            assert best.attention.shape == expected.shape == (len(best.ids) - 1, bundle.model.encoder_positions)
            np.testing.assert_allclose(best.attention, expected, rtol=0, atol=TOLERANCE)
            maps = caption.attention
            assert maps.tokens == caption.ids[1:]
            assert maps.maps.shape == (len(maps.tokens), rows, columns)
            grid = expected[:, first:].reshape(maps.maps.shape)
            np.testing.assert_allclose(maps.maps.astype(np.float32), grid, rtol=1e-3, atol=TOLERANCE)
            assert " ".join(maps.words) == caption.text
            different.add(expected.argmax(-1).tobytes())
    assert len(different) > len(PICTURES), "maps hardly depend on image and caption: the test shows little"


def read(captioner: Captioner, picture) -> np.ndarray:
    from engine.inputs.pixels import read_image

    spec = captioner.bundle.image
    return read_image(picture, spec.height, spec.width, spec.resample, resize=spec.resize)


@pytest.mark.parametrize(("encoder", "decoder"), pairs())
def test_attention_of_a_pair_equals_hugging_face(encoder, decoder, exported):
    checkpoint, bundle = exported(encoder, decoder)
    compare(Bundle.load(bundle), Reference.load(checkpoint))


def test_attention_of_git_equals_hugging_face(exported):
    """GIT has no cross-attention: the map is the part of self-attention that is on the image."""
    checkpoint, bundle = exported("git")
    compare(Bundle.load(bundle), Reference.load(checkpoint))


@pytest.mark.parametrize("layers", [None, [0], [1]])
def test_attention_of_blip_equals_hugging_face(layers, tiny_bundle, tiny_reference):
    reference = copy.copy(tiny_reference)
    compare(Bundle.load(tiny_bundle), reference, layers)


def test_graph_is_the_decoder_with_one_more_output(tiny_bundle):
    onnx = pytest.importorskip("onnx")
    bundle = Bundle.load(tiny_bundle)
    decoder = onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False)
    model = onnx.ModelProto.FromString(attention_graph(bundle, [0]))
    assert [output.name for output in model.graph.output] == [*(one.name for one in decoder.graph.output), "attention"]
    assert list(model.graph.input) == list(decoder.graph.input)
    assert list(model.graph.node)[: len(decoder.graph.node)] == list(decoder.graph.node)


@pytest.mark.parametrize("settings", SEARCHES)
def test_torch_gives_the_same_attention(settings, tiny_bundle, tiny_captioner):
    pytest.importorskip("torch")
    captioner = Captioner.load(tiny_bundle, backend="torch", device="cpu")
    expected = tiny_captioner.caption(PICTURES, DecodeOptions(**settings), attention=[0, 1])
    found = captioner.caption(PICTURES, DecodeOptions(**settings), rows=6, attention=True)
    for one, other in zip(found, expected, strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose(one.attention.maps, other.attention.maps, rtol=2**-9, atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_attention_of_rounded_bundles(precision, rounded_bundles, tiny_captioner):
    """Attention works in every precision; its error is that of the precision."""
    rounded = Captioner.load(rounded_bundles[precision], backend="cpu", threads=1)
    options = DecodeOptions(num_beams=3, max_new_tokens=10)
    pairs_of_captions = zip(
        rounded.caption(PICTURES, options, attention=True),
        tiny_captioner.caption(PICTURES, options, attention=True),
        strict=True,
    )
    errors = [
        np.abs(one.attention.maps.astype(np.float32) - other.attention.maps.astype(np.float32)).max()
        for one, other in pairs_of_captions
        if one.ids == other.ids
    ]
    assert len(errors) > 1
    assert max(errors) < {"fp16": 2e-3, "int8": 0.1}[precision]


def test_refusals_name_the_cause(tiny_bundle, tiny_captioner, monkeypatch):
    with pytest.raises(UsageError, match=r"--attention-layers 2: the decoder of .* has the layers 0 to 1"):
        tiny_captioner.caption(PICTURES, attention=[0, 2])
    monkeypatch.setattr(tiny_captioner.backend, "name", "cuda")
    with pytest.raises(UsageError, match="by the backends cpu and torch, not by cuda: add --backend cpu or"):
        tiny_captioner.caption(PICTURES, attention=True)
    monkeypatch.undo()
    bundle = Bundle.load(tiny_bundle)
    with pytest.raises(UsageError, match="attention maps are supported for one bundle only"):
        require_attention(replace(bundle, members=(bundle, bundle)), "cpu")
    with pytest.raises(UsageError, match="has 17 positions for images of 32 x 16 pixels, which are not a square grid"):
        require_attention(replace(bundle, image=replace(bundle.image, width=16)), "cpu")
    content = (tiny_bundle / "decoder.onnx").read_bytes()
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: content.replace(b"\x07Softmax", b"\x07Fused12"))
    with pytest.raises(BundleError, match=r"decoder.onnx computes attention over cross.key.0 in a fused operator"):
        attention_graph(bundle, [0])


def test_streams_give_the_same_attention(tiny_bundle):
    options = DecodeOptions(num_beams=3, max_new_tokens=14)
    found = []
    for threads, streams in ((1, 1), (2, 2)):
        captioner = Captioner.load(tiny_bundle, backend="cpu", threads=threads, streams=streams)
        found.append(list(captioner.caption(PICTURES * 4, options, rows=6, attention=True)))
    assert len(found[0]) == 4 * len(PICTURES)
    for one, other in zip(*found, strict=True):
        assert one.ids == other.ids
        # float32 sums depend on how many images share a step; a float16 has 11 bits
        np.testing.assert_allclose(one.attention.maps, other.attention.maps, rtol=2**-10, atol=1e-6)


def test_drawn_captions_have_their_own_attention(tiny_captioner):
    options = DecodeOptions(do_sample=True, num_return_sequences=3, seed=3, max_new_tokens=12)
    plain = [caption.alternatives for caption in tiny_captioner.caption(PICTURES, options)]
    for caption, alternatives in zip(tiny_captioner.caption(PICTURES, options, attention=True), plain, strict=True):
        assert caption.alternatives == alternatives
        assert caption.attention.tokens == caption.ids[1:]


def test_bundle_of_an_earlier_version(tmp_path):
    captioner = Captioner.load(bundle_of_084ae4d(tmp_path / "bundle"), backend="cpu", threads=1)
    rows, columns, first = grid_of(captioner.bundle)
    for caption in captioner.caption(PICTURES, max_new_tokens=6, attention=True):
        sums = caption.attention.maps.astype(np.float32).sum((1, 2))
        assert caption.attention.maps.shape == (len(caption.ids) - 1, rows, columns)
        assert (sums > 0.5).all()
        assert (sums < 1).all() == bool(first)


def test_grid_of_encoders(tiny_bundle):
    side = IMAGE_SIZE // PATCH_SIZE
    assert grid_of(Bundle.load(tiny_bundle)) == (side, side, 1)

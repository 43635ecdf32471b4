"""GPT-2 with an image prefix goes through all commands that BLIP does: its ids are those of GPT-2's `generate`."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection, GPT2LMHeadModel

from engine.backends import open_backend
from engine.captioner import Captioner
from engine.checkpoints.read import read_checkpoint
from engine.errors import CheckpointError
from engine.inputs.pixels import read_image
from engine.machine.verify import verify
from engine.options import DecodeOptions
from engine.runtime import CPU_BACKENDS, Runtime
from export.bundle import export_bundle
from export.checkpoints.load import load_checkpoint
from export.families.modules import IS_5
from export.parity import compare_setting
from export.reference.huggingface import Reference, UncachedBackend, generate_arguments
from export.reference.trace import SCORE_TOLERANCE
from export.restore import restore_checkpoint
from tests.helpers.tiny import IMAGE_SIZE, random_pictures
from tests.helpers.tiny_prefix import SHAPES, make_prefix_checkpoint
from tests.parity.test_pairs import GRID, IS_FULL, PENALTIES, SHORT, assert_same_samples
from train.learning.setup import load_reference
from train.recipe import Recipe

PICTURES = [*random_pictures(5), *random_pictures(3, 1, (90, 33)), *random_pictures(2, 2, (20, 51))]
LENGTHS = [{}, {"num_beams": 3, "min_length": 12, "max_length": 16}, {"max_length": 9, "prompt": "the chest"}]
"""Without any limit, `generate` adds 20 new tokens."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that makes the checkpoint and the bundle of a shape once."""
    folder, done = tmp_path_factory.mktemp("prefix"), {}

    def make(shape):
        if shape not in done:
            checkpoint = make_prefix_checkpoint(folder / shape / "checkpoint", shape)
            bundle = export_bundle(checkpoint, folder / shape / "bundle", lambda _: None)  # replays its recordings
            captioner = Captioner(bundle, open_backend(bundle, Runtime("cpu", threads=1)))
            done[shape] = checkpoint, captioner, Reference.load(checkpoint)
        return done[shape]

    return make


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made("clip-mlp")[0], tmp_path / "copy")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shape", SHAPES if IS_FULL else ["clip-mlp", "vit-linear"])
def test_captions_equal_generate(shape, made):
    _, captioner, reference = made(shape)
    best = set()
    for setting in (GRID + PENALTIES if IS_FULL else SHORT) + LENGTHS:
        limit = {} if setting in LENGTHS or "max_length" in setting else {"max_new_tokens": 14}
        options = DecodeOptions(**limit, **setting)
        options = options.replace(num_return_sequences=options.num_beams)
        theirs = reference.generate(reference.pixels(PICTURES), options)
        for mine, expected in zip(captioner.caption(PICTURES, options), theirs, strict=True):
            best.add(mine.ids)
            ids = [[caption.ids for caption in captions] for captions in (mine.alternatives, expected)]
            assert ids[0] == ids[1], (setting, mine.id)
            assert mine.raw_text == reference.tokenizer.decode(mine.ids, skip_special_tokens=True)
            if options.num_beams > 1:
                scores = [[caption.score for caption in captions] for captions in (mine.alternatives, expected)]
                np.testing.assert_allclose(*scores, rtol=SCORE_TOLERANCE, atol=SCORE_TOLERANCE)
    assert len(best) > 3 * len(PICTURES), "captions hardly depend on the image: the test shows little"
    assert len({len(ids) for ids in best}) > 3


@pytest.mark.filterwarnings("ignore:Passing `.*` with `inputs_embeds`:UserWarning")
@pytest.mark.parametrize("has_start", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_reference_is_the_generate_of_transformers(beams, has_start, copied):
    """The model class is this project's own, so its captions are compared with plain calls of transformers."""
    edit_json(copied / "config.json", decoder_start_token_id=7 if has_start else None)
    reference, weights = Reference.load(copied), load_file(copied / "model.safetensors")
    config = reference.model.config
    clip, gpt = CLIPVisionModelWithProjection(config.encoder).eval(), GPT2LMHeadModel(config.decoder).eval()
    clip.load_state_dict({name: weights[name] for name in clip.state_dict()})
    names = {name.removeprefix("gpt."): name for name in weights if name.startswith("gpt.")}
    gpt.load_state_dict({name: weights[old] for name, old in names.items()}, strict=False)
    layers = [weights[f"clip_project.model.{i}.{part}"] for i in (0, 2) for part in ("weight", "bias")]
    pixels = reference.pixels(PICTURES)
    options = DecodeOptions(num_beams=beams, max_new_tokens=14, repetition_penalty=1.4, no_repeat_ngram_size=1)
    with torch.inference_mode():
        features = clip(pixel_values=pixels).image_embeds
        hidden = torch.tanh(torch.nn.functional.linear(features, *layers[:2]))
        prefix = torch.nn.functional.linear(hidden, *layers[2:]).view(len(PICTURES), 4, -1)
        ids = torch.full((len(PICTURES), int(has_start)), 7)
        found = gpt.generate(
            **({"input_ids": ids} if has_start else {}),
            inputs_embeds=torch.cat([prefix, gpt.transformer.wte(ids)], 1),
            attention_mask=torch.ones(len(PICTURES), 4 + has_start, dtype=torch.long),
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            **generate_arguments(options),
        )
    for (caption,), theirs in zip(reference.generate(pixels, options), found.tolist(), strict=True):
        mine = list(caption.ids) if has_start else list(caption.ids[1:])
        assert mine == theirs[: len(mine)]
        assert set(theirs[len(mine) :]) <= {config.eos_token_id}


def test_prompts_equal_generate_after_the_prefix(made):
    """The grid has prompts: here the ids of the prompt are those of the tokenizer, after the start's own id."""
    _, captioner, reference = made("clip-mlp")
    (caption, *_) = captioner.caption(PICTURES, DecodeOptions(prompt="the chest", max_new_tokens=3))
    ids = reference.tokenizer("the chest", add_special_tokens=False)["input_ids"]
    assert list(caption.ids[: len(ids) + 1]) == [reference.model.config.decoder.vocab_size, *ids]


@pytest.mark.parametrize("prompt", [None, "the chest"])
def test_banned_words_may_not_be_the_first(prompt, made):
    """transformers 4.57 ignores a ban of n ids in a text of fewer ids, and release 5 does not."""
    _, captioner, reference = made("clip-mlp")
    options = DecodeOptions(max_new_tokens=8, prompt=prompt, min_new_tokens=3)
    free = [best.ids for (best,) in reference.generate(reference.pixels(PICTURES), options)]
    end = max(2, len(captioner.search(options).prompt)) + 1
    banned = tuple(dict.fromkeys(ids[1:end] for ids in free))
    options = options.replace(bad_words_ids=banned)
    found = [caption.ids for caption in captioner.caption(PICTURES, options)]
    assert found == [best.ids for (best,) in reference.generate(reference.pixels(PICTURES), options)]
    assert all(ids[1 : len(one) + 1] != one for ids in found for one in banned)


@pytest.mark.parametrize("shape", ["clip-mlp", "vit-linear"])
def test_samples_equal_those_of_the_live_model(shape, made):
    _, captioner, reference = made(shape)
    assert_same_samples(reference, captioner)


@pytest.mark.parametrize("shape", ["clip-mlp", "vit-linear"])
def test_pixels_equal_the_processor(shape, made):
    _, captioner, reference = made(shape)
    spec = captioner.bundle.image
    assert (spec.height, spec.width, spec.resize) == (IMAGE_SIZE, IMAGE_SIZE, (IMAGE_SIZE,) if "clip" in shape else ())
    ours = np.stack([read_image(p, spec.height, spec.width, spec.resample, resize=spec.resize) for p in PICTURES])
    assert torch.equal(reference.normalised(ours), reference.pixels(PICTURES))


@pytest.mark.parametrize("backend", ["cpu"] if IS_5 else CPU_BACKENDS)  # OpenVINO is in one environment only
def test_prefix_bundle_verifies(backend, made):
    bundle = made("clip-mlp")[1].bundle
    assert all(check.passed for check in verify(bundle, open_backend(bundle, Runtime(backend))))


@pytest.mark.parametrize("precision", ["fp16", "int8"] if IS_FULL else ["int8"])
def test_prefix_in_other_precisions(precision, made, tmp_path):
    checkpoint, captioner, _ = made("clip-mlp")
    rounded = export_bundle(checkpoint, tmp_path / "bundle", lambda _: None, precision=precision)
    options = DecodeOptions(num_beams=3, max_new_tokens=14)
    expected = [caption.ids for caption in captioner.caption(PICTURES, options)]
    found = [caption.ids for caption in Captioner.load(rounded.path, backend="cpu").caption(PICTURES, options)]
    # random logits lie close together: int8 changes about half of these captions; the export compares scores
    least = len(PICTURES) / 2 if precision == "fp16" else len(PICTURES) / 4
    assert sum(a == b for a, b in zip(found, expected, strict=True)) > least
    kinds = [node.op_type for node in onnx.load(rounded.path / "decoder.onnx").graph.node]
    # of two layers: c_attn and c_proj, c_fc and c_proj of the MLP; and the head
    assert kinds.count("MatMulInteger") == (2 * 4 + 1 if precision == "int8" else 0)


def test_restored_checkpoint_has_the_same_weights_and_settings(tmp_path):
    copied = make_prefix_checkpoint(tmp_path / "copy", "clip-transformer")
    settings = {"num_beams": 3, "max_length": 12, "no_repeat_ngram_size": 2}
    (copied / "generation_config.json").write_text(json.dumps(settings))
    bundle = export_bundle(copied, tmp_path / "bundle", lambda _: None)
    assert bundle.generation == settings
    restored = restore_checkpoint(bundle.path, tmp_path / "restored")
    weights, reference = load_checkpoint(restored).state_dict(), Reference.load(copied)
    for name, tensor in reference.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    pixels = reference.pixels(PICTURES)
    theirs = Reference.load(restored).model.generate(pixel_values=pixels).tolist()
    for caption, ids in zip(Captioner.load(bundle.path, backend="cpu").caption(PICTURES), theirs, strict=True):
        assert list(caption.ids) == ids[: len(caption.ids)]
        assert len(caption.ids) == 12 or caption.ids[-1] == bundle.tokens.eos


@pytest.mark.parametrize("shape", ["clip-mlp", "vit-linear"])
def test_uncached_reference_equals_its_full_forward_pass(shape, made):
    _, captioner, reference = made(shape)
    spec, model = captioner.bundle.image, reference.model
    pixels = read_image(PICTURES[0], spec.height, spec.width, spec.resample, resize=spec.resize)
    ids = (captioner.bundle.tokens.bos, 9, 12, 7)
    backend = UncachedBackend(reference)
    rows, exact = (b.logits(pixels, [ids[:2], ids]) for b in (backend, backend.in_float64))
    assert exact.dtype == np.float64
    np.testing.assert_allclose(rows, exact, atol=1e-5)
    with torch.inference_mode():
        prefix = reference.family.encode(model, reference.pixels(PICTURES[:1]))
        fed = torch.tensor([ids if shape == "vit-linear" else ids[1:]])
        full = model.gpt(inputs_embeds=model.embedded(prefix, fed), use_cache=False).logits[0]
    words = model.config.decoder.vocab_size
    np.testing.assert_allclose(rows[:, :words], full[[-3, -1]], atol=1e-5)


def test_parity_report(made):
    _, captioner, reference = made("clip-mlp")
    images = {str(i): picture for i, picture in enumerate(PICTURES[:5])}
    report = compare_setting(reference, captioner, images, DecodeOptions(num_beams=3, max_new_tokens=10), 2)
    assert report.identical == report.identical_text == report.images == 5


def test_weights_of_clip_and_clipcap_in_two_files(copied, made):
    """An index names both published files, of which the second is a pickle; CLIP's other weights are not read."""
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    of_clip = {name: tensor for name, tensor in weights.items() if name.startswith("vis")}
    other = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.tensor(2.0)}
    save_file(of_clip | other, copied / "clip.safetensors")
    rest = {name: tensor for name, tensor in weights.items() if name not in of_clip}
    torch.save(rest | {"gpt.transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}, copied / "clipcap.pt")
    index = {"weight_map": {"vision_model": "clip.safetensors", "gpt": "clipcap.pt"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = made("clip-mlp")[2].model.state_dict()
    found = load_checkpoint(copied).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_step_graph_has_no_image_encoder(made):
    for shape in ("clip-mlp", "vit-linear"):
        bundle = made(shape)[1].bundle
        names = {tensor.name for tensor in onnx.load(bundle.path / "decoder.onnx").graph.initializer}
        assert not any("vision_model" in name or "clip_project" in name for name in names)
        assert bundle.model.encoder_positions == (4 if shape == "clip-mlp" else 17)


def test_positions_that_the_prefix_takes_are_not_for_captions(made):
    """GPT-2 has 64 positions. Without a start token, the last position of the prefix is the caption's first."""
    bundles = {shape: made(shape)[1].bundle for shape in ("clip-mlp", "vit-linear")}
    assert {shape: bundle.model.max_positions for shape, bundle in bundles.items()} == {
        "clip-mlp": 64 - 4 + 1,
        "vit-linear": 64 - 17,
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder": {"model_type": "swin"}}, r"encoder.model_type is 'swin', but it must be 'clip_vision_model' or"),
        ({"decoder": {"model_type": "opt"}}, r"decoder.model_type is 'opt', but it must be 'gpt2'"),
        ({"decoder": {"model_type": ["gpt2"]}}, r"decoder.model_type is \['gpt2'\]"),
        ({"mapping": "mlp"}, "mapping is not a JSON object"),
        ({"mapping": {"type": "qformer"}}, "mapping.type is 'qformer', but it must be 'linear' or 'mlp' or"),
        ({"mapping": {"type": "mlp", "prefix_length": 0}}, "mapping.prefix_length is 0"),
        ({"mapping": {"type": "mlp", "prefix_length": 64}}, "takes 64 of GPT-2's 64 positions"),
        ({"mapping": {"type": "mlp", "normalize_prefix": 1}}, "normalize_prefix is not true or false"),
        ({"encoder": {"model_type": "vit", "image_size": 32, "patch_size": 8}}, "needs CLIP's image embedding"),
        ({"eos_token_id": [3, 7]}, r"eos_token_id is \[3, 7\], but `generate` needs one id"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "asks for custom code"),
    ],
)
def test_configs_outside_the_layout_are_refused(changes, sentence, copied):
    edit_json(copied / "config.json", **changes)
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(copied)


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        ("decoder", {"add_cross_attention": True}, "attends to no encoder"),
        ("decoder", {"scale_attn_weights": False}, "decoder.scale_attn_weights=False"),
        ("mapping", {"dropout": 0.1}, "mapping.dropout=0.1"),
        ("encoder", {"patch_size": 7}, "not a multiple of the patch size"),
    ],
)
def test_other_models_of_the_layout_are_refused(part, changes, sentence, copied, tmp_path):
    raw = json.loads((copied / "config.json").read_text())
    edit_json(copied / "config.json", **{part: raw[part] | changes})
    with pytest.raises(CheckpointError, match=sentence):
        export_bundle(copied, tmp_path / "bundle", lambda _: None)


def test_what_other_families_do_is_refused_by_name(copied):
    with pytest.raises(CheckpointError, match="is a GPT-2 image-prefix checkpoint, but `train` fine-tunes BLIP only"):
        load_reference(copied, Recipe())
    with pytest.raises(CheckpointError, match="--image-size 48: the positions of a GPT-2 image-prefix"):
        load_checkpoint(copied, 48)
    with pytest.raises(CheckpointError, match="is a GPT-2 image-prefix checkpoint, which needs torch"):
        read_checkpoint(copied)

"""GIT goes through all commands that BLIP does: ids equal `generate`'s, pixels CLIP's, weights can be restored."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from transformers import GitForCausalLM

from engine.backends import open_backend
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import CheckpointError
from engine.inputs.pixels import read_image
from engine.machine.verify import verify
from engine.options import DecodeOptions
from engine.runtime import CPU_BACKENDS, Runtime
from export.bundle import export_bundle
from export.checkpoints.load import load_checkpoint
from export.families.modules import IS_5
from export.parity import compare_setting
from export.reference.huggingface import Reference, UncachedBackend
from export.reference.trace import SCORE_TOLERANCE
from export.restore import restore_checkpoint
from tests.helpers.tiny import IMAGE_SIZE, random_pictures
from tests.parity.test_pairs import GRID, IS_FULL, PENALTIES, SHORT, assert_same_samples
from train.learning.setup import load_reference
from train.recipe import Recipe

PICTURES = [*random_pictures(5), *random_pictures(3, 1, (90, 33)), *random_pictures(2, 2, (20, 51))]


@pytest.fixture(scope="module")
def checkpoint(exported):
    return exported("git")[0]


@pytest.fixture(scope="module")
def bundle(exported):
    return Bundle.load(exported("git")[1])


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Reference.load(checkpoint)


@pytest.fixture(scope="module")
def captioner(bundle):
    return Captioner(bundle, open_backend(bundle, Runtime("cpu", threads=1)))


def test_samples_equal_those_of_the_live_model(reference, captioner):
    assert_same_samples(reference, captioner)


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


LENGTHS = [{}, {"num_beams": 3, "min_length": 12, "max_length": 16}, {"max_length": 9, "prompt": "the chest"}]
"""Without any limit, `generate` adds 20 new tokens to the prompt."""


@pytest.mark.parametrize("setting", (GRID + PENALTIES if IS_FULL else SHORT) + LENGTHS, ids=str)
def test_captions_of_git_equal_generate(setting, captioner, reference):
    limit = {} if setting in LENGTHS or "max_length" in setting else {"max_new_tokens": 14}
    options = DecodeOptions(**limit, **setting)
    options = options.replace(num_return_sequences=options.num_beams)
    theirs = reference.generate(reference.pixels(PICTURES), options)
    for mine, expected in zip(captioner.caption(PICTURES, options), theirs, strict=True):
        assert [caption.ids for caption in mine.alternatives] == [caption.ids for caption in expected], mine.id
        assert mine.raw_text == reference.tokenizer.decode(mine.ids, skip_special_tokens=True)
        if options.num_beams > 1:
            scores = [[caption.score for caption in captions] for captions in (mine.alternatives, expected)]
            np.testing.assert_allclose(*scores, rtol=SCORE_TOLERANCE, atol=SCORE_TOLERANCE)


def test_captions_of_git_are_diverse(captioner):
    ids = [caption.ids for caption in captioner.caption(PICTURES, DecodeOptions(num_beams=4, max_new_tokens=14))]
    assert len(set(ids)) > len(PICTURES) // 2
    assert len({len(i) for i in ids}) >= 5


def test_pixels_of_git_equal_its_processor(bundle, reference):
    spec = bundle.image
    assert (spec.height, spec.width, spec.resize) == (IMAGE_SIZE, IMAGE_SIZE, (IMAGE_SIZE,))
    ours = np.stack([read_image(p, spec.height, spec.width, spec.resample, resize=spec.resize) for p in PICTURES])
    assert torch.equal(reference.normalised(ours), reference.pixels(PICTURES))


@pytest.mark.parametrize("backend", ["cpu"] if IS_5 else CPU_BACKENDS)  # OpenVINO is in one environment only
def test_git_bundle_verifies(backend, bundle):
    assert all(check.passed for check in verify(bundle, open_backend(bundle, Runtime(backend))))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_git_in_other_precisions(precision, checkpoint, tmp_path, captioner):
    rounded = export_bundle(checkpoint, tmp_path / "bundle", lambda _: None, precision=precision)
    options = DecodeOptions(num_beams=3, max_new_tokens=14)
    expected = [caption.ids for caption in captioner.caption(PICTURES, options)]
    found = [caption.ids for caption in Captioner.load(rounded.path, backend="cpu").caption(PICTURES, options)]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) > len(PICTURES) / 2
    kinds = {node.op_type for node in onnx.load(rounded.path / "decoder.onnx").graph.node}
    assert ("MatMulInteger" in kinds) == (precision == "int8")


def test_restored_git_checkpoint_has_the_same_weights_and_settings(copied, reference, tmp_path):
    edit_json(copied / "generation_config.json", num_beams=3, max_length=12, no_repeat_ngram_size=2)
    bundle = export_bundle(copied, tmp_path / "bundle", lambda _: None)
    assert bundle.generation == {"num_beams": 3, "max_length": 12, "no_repeat_ngram_size": 2}
    assert set(bundle.generation_from.values()) == {"generation_config.json"}
    restored = restore_checkpoint(bundle.path, tmp_path / "restored")
    weights = load_checkpoint(restored).state_dict()
    for name, tensor in reference.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    model = GitForCausalLM.from_pretrained(restored).eval()
    with torch.inference_mode():
        theirs = model.generate(pixel_values=Reference.load(restored).pixels(PICTURES)).tolist()
    end = bundle.tokens.eos
    for caption, ids in zip(Captioner.load(bundle.path, backend="cpu").caption(PICTURES), theirs, strict=True):
        assert list(caption.ids) == ids[: ids.index(end) + 1 if end in ids else None]


def test_uncached_reference_of_git_equals_its_full_forward_pass(reference, bundle):
    spec = bundle.image
    pixels = read_image(PICTURES[0], spec.height, spec.width, spec.resample, resize=spec.resize)
    prefix = (bundle.tokens.bos, 9, 12, 7)
    backend = UncachedBackend(reference)
    rows, exact = (b.logits(pixels, [prefix[:2], prefix]) for b in (backend, backend.in_float64))
    assert exact.dtype == np.float64
    np.testing.assert_allclose(rows, exact, atol=1e-5)
    with torch.inference_mode():
        full = reference.model(
            input_ids=torch.tensor([prefix]), pixel_values=reference.pixels(PICTURES[:1]), use_cache=False
        )
    image = bundle.model.encoder_positions
    np.testing.assert_allclose(rows, full.logits[0, [image + 1, image + 3]], atol=1e-5)


def test_parity_report_of_git(captioner, reference):
    images = {str(i): picture for i, picture in enumerate(PICTURES[:5])}
    report = compare_setting(reference, captioner, images, DecodeOptions(num_beams=3, max_new_tokens=10), 2)
    assert report.identical == report.images == 5
    assert report.identical_text == 5


def test_video_models_are_refused_by_name(copied):
    edit_json(copied / "config.json", num_image_with_embedding=6)
    with pytest.raises(CheckpointError, match=r"GIT model of videos \(num_image_with_embedding is 6\)"):
        load_checkpoint(copied)


def test_training_refuses_git_by_name(checkpoint):
    with pytest.raises(CheckpointError, match="is a GIT checkpoint, but `train` fine-tunes BLIP only"):
        load_reference(checkpoint, Recipe())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"do_center_crop": False}, "keeps the aspect ratio of images"),
        ({"size": {"longest_edge": 32}}, "GIT needs a height and a width in pixels"),
        ({"crop_size": {"height": 16, "width": 16}}, "makes 16x16 px images"),
        ({"image_processor_type": "BlipImageProcessor"}, "is for BlipImageProcessor, but GIT needs CLIPImageProcessor"),
        ({"do_pad": True}, "do_pad=True"),
    ],
)
def test_processors_that_git_cannot_use_are_refused(changes, sentence, copied):
    edit_json(copied / "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(copied)


@pytest.mark.parametrize(
    ("changes", "resize"),
    [
        ({"size": 40}, (40,)),
        ({"size": {"height": 36, "width": 40}}, (36, 40)),
        ({"size": {"height": 32, "width": 32}}, ()),
    ],
)
def test_other_sizes_before_the_crop_reach_the_manifest(changes, resize, copied, tmp_path):
    edit_json(copied / "preprocessor_config.json", **changes)
    bundle = export_bundle(copied, tmp_path / "bundle", lambda _: None)
    assert bundle.image.resize == resize
    reference, options = Reference.load(copied), DecodeOptions(num_beams=2, max_new_tokens=8)
    theirs = [best.ids for (best,) in reference.generate(reference.pixels(PICTURES), options)]
    assert [c.ids for c in Captioner.load(bundle.path, backend="cpu").caption(PICTURES, options)] == theirs


@pytest.mark.parametrize("is_copy", [True, False])
def test_settings_in_both_files_are_those_that_generate_reads(is_copy, copied, tmp_path):
    """transformers 4.57.6 reads config.json if generation_config.json is a copy of it that was made earlier."""
    edit_json(copied / "generation_config.json", num_beams=3, _from_model_config=is_copy)
    edit_json(copied / "config.json", num_beams=2)
    lines: list[str] = []
    bundle = export_bundle(copied, tmp_path / "bundle", lines.append)
    assert bundle.generation == {"num_beams": 2 if is_copy else 3}
    ignored = "generation_config.json sets num_beams=3" if is_copy else "config.json sets num_beams=2"
    assert any(ignored in line for line in lines)


def test_other_end_ids_than_the_configs_are_refused(copied, tmp_path):
    edit_json(copied / "generation_config.json", eos_token_id=[3, 7])
    with pytest.raises(CheckpointError, match=r"not one number each are not supported \(.*eos_token_id=\[3, 7\]"):
        export_bundle(copied, tmp_path / "bundle", lambda _: None)


def test_git_for_other_image_sizes_equals_interpolation(copied, tmp_path):
    bundle = export_bundle(copied, tmp_path / "bundle", lambda _: None, image_size=48)
    assert (bundle.image.height, bundle.image.resize, bundle.model.encoder_positions) == (48, (48,), 37)
    reference, options = Reference.load(copied, 48), DecodeOptions(num_beams=2, max_new_tokens=8)
    theirs = [best.ids for (best,) in reference.generate(reference.pixels(PICTURES), options)]
    assert [c.ids for c in Captioner.load(bundle.path, backend="cpu").caption(PICTURES, options)] == theirs
    original = GitForCausalLM.from_pretrained(copied).git.image_encoder.eval()
    pixels = reference.pixels(PICTURES[:2])
    with torch.inference_mode():
        expected = original(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(reference.model.git.image_encoder(pixels).last_hidden_state, expected)


def test_step_graph_of_git_has_no_image_encoder(bundle):
    assert Bundle.load(bundle.path).model.encoder_positions == 17
    names = {tensor.name for tensor in onnx.load(bundle.path / "decoder.onnx").graph.initializer}
    assert not any("image_encoder" in name or "visual_projection" in name for name in names)

"""Florence-2 goes through all commands that BLIP does: ids equal `generate`'s for its three tasks."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import Florence2ForConditionalGeneration, Florence2Processor

from engine.backends import open_backend
from engine.backends.attention import require_attention
from engine.bundle.manifest import OTHER_TASKS, Bundle
from engine.captioner import Captioner
from engine.checkpoints.florence2 import Florence2Rules
from engine.checkpoints.read import read_checkpoint
from engine.cli.app import main as engine_main
from engine.errors import BundleError, CheckpointError, UsageError
from engine.inputs.pixels import read_image
from engine.machine.verify import Golden, verify, verify_halves
from engine.options import DecodeOptions, options_from
from engine.runtime import CPU_BACKENDS, Runtime
from export.bundle import export_bundle
from export.checkpoints.load import load_checkpoint
from export.families.modules import IS_5
from export.parity import compare_setting
from export.reference.huggingface import Reference, UncachedBackend
from export.reference.trace import SCORE_TOLERANCE
from export.restore import restore_checkpoint
from tests.helpers.tiny import random_pictures, save_pictures
from tests.helpers.tiny_florence import GENERATION, IMAGE_SIZE, make_florence_checkpoint
from tests.parity.test_pairs import GRID, IS_FULL, PENALTIES, SHORT, assert_same_samples
from train.learning.setup import load_reference
from train.recipe import Recipe

PICTURES = [*random_pictures(5), *random_pictures(3, 1, (90, 33)), *random_pictures(2, 2, (20, 51))]
TASKS = tuple(Florence2Rules.tasks)


@pytest.fixture(scope="module")
def checkpoint(exported):
    return exported("florence")[0]


@pytest.fixture(scope="module")
def bundle(exported):
    return Bundle.load(exported("florence")[1])


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Reference.load(checkpoint)


@pytest.fixture(scope="module")
def captioners(bundle):
    """Captioners of the three tasks by name."""
    return {task: Captioner.load(bundle.path, task=task, backend="cpu", threads=1) for task in TASKS}


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FORCED = {"forced_bos_token_id": 0, "forced_eos_token_id": 2}
OWN = [
    {},
    {"num_beams": 1},
    {"num_beams": 3, "min_length": 12, "max_length": 16},
    {"max_length": 9, "prompt": "the chest"},
    {"max_new_tokens": 2, "num_beams": 4},
]
"""Settings over the checkpoint's own: 3 beams, no repeated 3-gram, early stopping, forced first and last token."""
SETTINGS = [setting if "max_length" in setting else {"max_new_tokens": 14} | setting for setting in SHORT]
ALL = [{"max_new_tokens": 14} | setting for setting in GRID + PENALTIES]


def cases(task, own):
    """Return (options that apply by default, settings). Without FAMILIES_GRID=full each task gets a third of few."""
    if IS_FULL:
        return [*((own, one) for one in OWN), *((FORCED, one) for one in ALL), *(({}, one) for one in ALL[::7])]
    short = [*((own, one) for one in OWN), *((FORCED, one) for one in SETTINGS), ({}, SETTINGS[-1])]
    return short[TASKS.index(task) :: len(TASKS)]


@pytest.mark.parametrize("task", TASKS)
def test_captions_of_florence_equal_generate(task, captioners, reference, bundle):
    captioner, reference, captions = captioners[task], replace(reference, task=task), set()
    pixels = reference.pixels(PICTURES)
    for defaults, setting in cases(task, bundle.generation):
        options = options_from(defaults, setting)
        options = options.replace(num_return_sequences=options.num_beams)
        theirs = reference.generate(pixels, options)
        for mine, expected in zip(captioner.caption(PICTURES, options), theirs, strict=True):
            captions.add(mine.ids)
            assert [one.ids for one in mine.alternatives] == [one.ids for one in expected], (setting, mine.id)
            assert mine.raw_text == reference.tokenizer.decode(mine.ids, skip_special_tokens=True)
            if options.num_beams > 1:
                scores = [[caption.score for caption in several] for several in (mine.alternatives, expected)]
                np.testing.assert_allclose(*scores, rtol=SCORE_TOLERANCE, atol=SCORE_TOLERANCE)
    assert len(captions) > 2 * len(PICTURES), "captions hardly depend on the image: the test shows little"
    assert len({len(ids) for ids in captions}) > 3


def test_tasks_decide_captions(captioners):
    ids = {task: [one.ids for one in captioner.caption(PICTURES)] for task, captioner in captioners.items()}
    for one, other in itertools.combinations(TASKS, 2):
        assert sum(a != b for a, b in zip(ids[one], ids[other], strict=True)) > len(PICTURES) / 3


def test_bundle_records_tasks_and_settings(bundle, reference):
    assert bundle.generation == GENERATION
    assert (bundle.task, bundle.tasks) == ("caption", reference.tasks)
    assert bundle.model.encoder_positions == 5 + len(bundle.tasks["caption"])
    other = bundle.for_task("<MORE_DETAILED_CAPTION>")
    assert (other.task, other.digest) == ("more-detailed-caption", bundle.digest)
    assert other.model.encoder_positions == 5 + len(bundle.tasks["more-detailed-caption"])
    assert other.for_task("caption") == bundle
    # as Florence2Processor writes them
    text = reference.tokenizer.decode(bundle.tasks["caption"])
    assert text.replace("?", "") == "<s>What does the image describe</s>"


def test_published_task_texts_are_those_of_transformers():
    processor = inspect.getsource(Florence2Processor.__init__)
    for name, text in Florence2Rules.tasks.items():
        assert f'"<{name.upper().replace("-", "_")}>": "{text}"' in processor
    for name in OTHER_TASKS:
        assert f'"<{name.upper().replace("-", "_")}>": ' in processor


def test_pixels_of_florence_equal_its_processor(bundle, reference):
    spec = bundle.image
    assert (spec.height, spec.width, spec.resample, spec.resize) == (IMAGE_SIZE, IMAGE_SIZE, "bicubic", ())
    ours = np.stack([read_image(p, spec.height, spec.width, spec.resample) for p in PICTURES])
    assert torch.equal(reference.normalised(ours), reference.pixels(PICTURES))


@pytest.mark.parametrize("backend", ["cpu"] if IS_5 else CPU_BACKENDS)  # OpenVINO is in one environment only
def test_florence_bundle_verifies(backend, bundle):
    checks = 0
    for task in TASKS:
        opened = bundle.for_task(task)
        found = verify(opened, open_backend(opened, Runtime(backend))) + verify_halves(opened, Runtime(backend))
        assert all(check.passed for check in found), task
        checks += len(found)
    assert checks == (6 if backend == "openvino" else 11)
    settings = Golden.load(bundle.path / "golden.npz").settings
    assert all(setting.items() >= FORCED.items() for setting in settings)
    assert {setting["task"] for setting in settings} == set(TASKS)


def test_samples_equal_those_of_the_live_model(reference, captioners):
    for task in TASKS[:2]:
        assert_same_samples(replace(reference, task=task), captioners[task])


def test_florence_in_float16(checkpoint, tmp_path, captioners):
    rounded = export_bundle(checkpoint, tmp_path / "bundle", lambda _: None, precision="fp16")
    options = DecodeOptions(num_beams=3, max_new_tokens=14)
    same = 0
    for task in TASKS:
        expected = [caption.ids for caption in captioners[task].caption(PICTURES, options)]
        ours = Captioner.load(rounded.path, task=task, backend="cpu").caption(PICTURES, options)
        same += sum(a.ids == b for a, b in zip(ours, expected, strict=True))
    assert same > len(TASKS) * len(PICTURES) * 0.5


def test_restored_florence_checkpoint_is_that_of_transformers(bundle, reference, tmp_path):
    restored = restore_checkpoint(bundle.path, tmp_path / "restored")
    weights = load_checkpoint(restored).state_dict()
    for name, tensor in reference.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    model = Florence2ForConditionalGeneration.from_pretrained(restored).eval()
    arguments = reference.family.task_arguments(model, reference.task_ids, len(PICTURES))
    with torch.inference_mode():
        theirs = model.generate(**arguments, pixel_values=Reference.load(restored).pixels(PICTURES)).tolist()
    for caption, ids in zip(Captioner.load(bundle.path, backend="cpu").caption(PICTURES), theirs, strict=True):
        assert list(caption.ids) == ids[: len(caption.ids)]


def test_uncached_reference_of_florence_equals_its_full_forward_pass(reference, bundle):
    pixels = read_image(PICTURES[0], IMAGE_SIZE, IMAGE_SIZE, "bicubic")
    prefix = (bundle.tokens.bos, 0, 12, 7)
    backend = UncachedBackend(reference)
    rows, exact = (b.logits(pixels, [prefix[:2], prefix]) for b in (backend, backend.in_float64))
    assert exact.dtype == np.float64
    np.testing.assert_allclose(rows, exact, atol=1e-5)
    with torch.inference_mode():
        full = reference.model(
            **reference.family.task_arguments(reference.model, reference.task_ids, 1),
            pixel_values=reference.pixels(PICTURES[:1]),
            decoder_input_ids=torch.tensor([prefix]),
        )
    np.testing.assert_allclose(rows, full.logits[0, [1, 3]], atol=1e-5)


def test_parity_report_of_florence(captioners, reference):
    images = {str(i): picture for i, picture in enumerate(PICTURES[:5])}
    options = options_from(FORCED, {"num_beams": 3, "max_new_tokens": 10})
    report = compare_setting(
        replace(reference, task="detailed-caption"), captioners["detailed-caption"], images, options, 2
    )
    assert report.identical == report.images == 5
    assert report.identical_text == 5


def test_location_tokens_are_not_in_captions(reference, captioners):
    captioner = captioners["caption"]
    ids = [2, 0, *reference.tokenizer.encode("brain", add_special_tokens=False), 183, 184, 2]
    assert reference.tokenizer.convert_ids_to_tokens([183, 184]) == ["<loc_1>", "<loc_2>"]
    assert captioner.tokenizer.tidy(captioner.tokenizer.decode(ids)) == "brain"
    assert captioner.tokenizer.tidy("a <loc_7><loc_999>  mass") == "a mass"


ERRORS = {
    "<OD>": "the task '<OD>' returns boxes or other than captions: choose one of caption, detailed-caption, more",
    "ocr-with-region": "the task 'ocr-with-region' returns boxes or other than captions",
    "poem": "the task 'poem' is unknown: choose one of caption, detailed-caption, more-detailed-caption",
}


@pytest.mark.parametrize("task", ERRORS)
def test_other_tasks_are_refused_by_name(task, bundle):
    with pytest.raises(UsageError, match=re.escape(ERRORS[task])):
        Captioner.load(bundle.path, task=task, backend="cpu")


def test_tasks_of_other_families_are_refused(tmp_path):
    save_pictures(tmp_path / "images", 1)
    arguments = ["--input", tmp_path / "images", "--out", tmp_path / "run.csv", "--task", "caption", "--backend", "cpu"]
    result = CliRunner().invoke(engine_main, ["caption", *map(str, arguments)])
    assert result.exit_code == 2
    assert "is not a model with tasks, as Florence-2 is: remove --task" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_attention_maps_are_refused(bundle):
    with pytest.raises(UsageError, match="attention maps are not supported for models with tasks"):
        require_attention(bundle, "cpu")


def test_task_is_in_signature_and_journal(bundle, tmp_path):
    """A run that is interrupted resumes with the same task, and starts afresh with another one."""
    images = save_pictures(tmp_path / "images", 3)
    (images / "broken.png").write_bytes(b"\x89PNG")

    def run(*more):
        arguments = ["--bundle", bundle.path, "--input", images, "--out", tmp_path / "run.csv", "--backend", "cpu"]
        return CliRunner().invoke(engine_main, ["caption", *map(str, arguments), *more])

    assert run("--task", "<DETAILED_CAPTION>").exit_code == 1
    (images / "broken.png").unlink()
    other = run()
    assert "starting over" in other.stderr
    assert "|task:caption|" in other.stderr
    (tmp_path / "run.csv.journal.old").rename(tmp_path / "run.csv.journal")
    resumed = run("--task", "detailed-caption")
    assert "3 captions of an earlier run are taken" in resumed.stderr
    assert "|task:detailed-caption|" in resumed.stderr


@pytest.mark.parametrize("task", [[], ["--task", "detailed-caption"]])
def test_verify_and_bench_take_tasks(task, bundle):
    result = CliRunner().invoke(engine_main, ["verify", "--bundle", str(bundle.path), "--backend", "cpu", *task])
    assert result.exit_code == 0
    named = set(re.findall(r"task ([a-z-]+)", result.output))
    assert named == (set(task[1:]) or set(TASKS))
    arguments = ["bench", "--bundle", str(bundle.path), "--backend", "cpu", "--images", "2", *task]
    result = CliRunner().invoke(engine_main, arguments)
    assert f"|task:{task[1] if task else 'caption'}|" in json.loads(result.output.splitlines()[-1])["signature"]


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [({"caption": [0, 10**6]}, "not lists of token ids below 188"), ([1], "not lists"), ({"caption": []}, "not lists")],
)
def test_damaged_tasks_are_refused(tasks, reason, bundle, tmp_path):
    copied = shutil.copytree(bundle.path, tmp_path / "bundle")
    edit_json(copied / "manifest.json", tasks=tasks)
    with pytest.raises(BundleError, match=reason):
        Bundle.load(copied)


def test_bundle_without_its_tasks_is_refused_before_it_runs(bundle, tmp_path):
    copied = shutil.copytree(bundle.path, tmp_path / "bundle")
    edit_json(copied / "manifest.json", tasks={})
    with pytest.raises(BundleError, match=r"does not have the inputs .*\(task_ids\)"):
        Captioner.load(copied, backend="cpu")


CONFIGS = [
    ({"text_config": {"model_type": "t5"}}, "text_config is of a 't5' model, but Florence-2's is BART"),
    ({"text_config": 3}, "text_config is not a JSON object"),
    ({"vision_config": {"depths": [1, 1]}}, "do not have one value per stage each"),
    ({"vision_config": {"projection_dim": 48}}, r"the width of the image's tokens \(48\) is not that of the text"),
    ({"vision_config": {"window_size": 0}}, "vision_config.window_size is 0"),
    ({"image_size": 256}, "images of 256 px give 8 x 8 tokens, for which the model has no position embeddings"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
]


@pytest.mark.parametrize(("changes", "reason"), CONFIGS)
def test_configs_that_are_not_florence_are_refused(changes, reason, copied, tmp_path):
    path = copied / "config.json"
    raw = json.loads(path.read_text())
    for name, value in changes.items():
        raw[name] = raw[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=reason):
        export_bundle(copied, tmp_path / "bundle", lambda _: None)
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(copied)


def test_florence_for_other_image_sizes_equals_generate(copied, tmp_path):
    """Its embeddings of rows and columns are not resized: smaller images use fewer of them."""
    bundle = export_bundle(copied, tmp_path / "bundle", lambda _: None, image_size=96)
    assert (bundle.image.height, bundle.model.encoder_positions) == (96, 10 + len(bundle.task_ids))
    reference, options = Reference.load(copied, 96), options_from(bundle.generation, {"max_new_tokens": 8})
    theirs = [best.ids for (best,) in reference.generate(reference.pixels(PICTURES), options)]
    assert [one.ids for one in Captioner.load(bundle.path, backend="cpu").caption(PICTURES, options)] == theirs
    with pytest.raises(CheckpointError, match="--image-size 256: images of 256 px give 8 x 8 tokens"):
        export_bundle(copied, tmp_path / "bundle", lambda _: None, image_size=256)


def test_first_checkpoints_are_read_by_their_own_names(tmp_path):
    """microsoft/Florence-2-base: another layout of the same model. Its code is never run."""
    first = make_florence_checkpoint(tmp_path / "first", is_first=True)
    (first / "generation_config.json").unlink()
    plain = make_florence_checkpoint(tmp_path / "plain", is_first=True, seed=0, as_transformers=True)
    ours, theirs = Reference.load(first), Reference.load(plain)
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    assert ours.tasks == theirs.tasks
    vocabulary = len(ours.tokenizer)
    assert vocabulary == ours.sizes.vocab_size
    assert ours.tokenizer.convert_ids_to_tokens([vocabulary - 1]) == ["<and>"]
    bundle = export_bundle(first, tmp_path / "bundle", lambda _: None)
    options = options_from(bundle.generation, {"max_new_tokens": 8})
    expected = [best.ids for (best,) in theirs.generate(theirs.pixels(PICTURES), options)]
    assert [one.ids for one in Captioner.load(bundle.path, backend="cpu").caption(PICTURES, options)] == expected
    checkpoint = read_checkpoint(first)
    for name, tensor in theirs.model.named_parameters(remove_duplicate=False):
        np.testing.assert_array_equal(checkpoint.weights[name], tensor.detach().numpy(), err_msg=name)
    assert checkpoint.tasks == ours.tasks
    if not IS_5:  # release 5 writes the mask token differently
        assert checkpoint.tokenizer == (bundle.path / "tokenizer.json").read_text()
    assert dict(checkpoint.generation) == bundle.generation


def test_training_refuses_florence_by_name(checkpoint):
    with pytest.raises(CheckpointError, match="is a Florence-2 checkpoint, but `train` fine-tunes BLIP only"):
        load_reference(checkpoint, Recipe())

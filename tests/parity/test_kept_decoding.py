"""Models that store the decoding settings of their validation: training, the stored model, and its bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration

from engine.bundle.tokenizer import detokenise
from engine.captioner import Captioner
from engine.inputs.tables import read_table
from export.bundle import export_bundle
from export.reference.huggingface import Reference
from tests.helpers.tiny import WORDS, make_checkpoint, random_pictures
from train.data.dataset import DataInputs
from train.finetune import Job, finetune
from train.learning.average import Choice, average
from train.recipe import RECIPES

KNOWN = {
    "num_beams": 3,
    "repetition_penalty": 2.5,
    "length_penalty": 2.0,
    "min_new_tokens": 8,
    "max_new_tokens": 16,
}
IMAGES = 4
SMALL = {"epochs": 1, "batch_size": 8, "device_batch": 8, "image_size": None, "workers": 0, "eval_max_new_tokens": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 8), ("valid", IMAGES)):
        (root / split).mkdir()
        rows = ["ID,Caption"]
        for i, picture in enumerate(random_pictures(count, seed=count)):
            picture.save(root / split / f"{split}{i}.png")
            rows.append(f"{split}{i},a {WORDS[7 + i]} {WORDS[20 + i]} of the {WORDS[12 + i]}")
        (root / f"{split}_captions.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint whose generation settings all differ from the winner's."""
    own = {"num_beams": 4, "no_repeat_ngram_size": 2, "early_stopping": True, "suppress_tokens": [9]}
    return make_checkpoint(tmp_path_factory.mktemp("start") / "checkpoint", end_bias=4.0, text=own)


@pytest.fixture(scope="module")
def first_stage(checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "run"
    finetune(Job(checkpoint, DataInputs(data), out, replace(RECIPES["medblip-2026"], **SMALL)), lambda _: None)
    return out


@pytest.fixture(scope="module")
def second_stage(first_stage, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("second") / "run"
    recipe = replace(RECIPES["medblip-2026-scst"], reward=("rouge1=1",), samples=2, **SMALL)
    finetune(Job(first_stage / "best", DataInputs(data), out, recipe), lambda _: None)
    return out


def validation_captions(kept: Path) -> dict[str, str]:
    """Return the captions of the validation."""
    return read_table(kept / "valid.csv").single()


@pytest.mark.parametrize("stage", ["first_stage", "second_stage"])
def test_generate_with_kept_model_equals_validation(stage, data, request):
    """generate needs no argument, for both ways in which Hugging Face loads the model."""
    kept = request.getfixturevalue(stage) / "models" / "epoch_01"
    text = json.loads((kept / "config.json").read_text())["text_config"]
    generation = json.loads((kept / "generation_config.json").read_text())
    for settings in (text, generation):
        assert {name: settings[name] for name in KNOWN} == KNOWN
        assert not {"no_repeat_ngram_size", "early_stopping", "suppress_tokens"} & set(settings)
    reference = Reference.load(kept)
    pixels = reference.pixels([Image.open(data / f"valid/valid{i}.png").convert("RGB") for i in range(IMAGES)])
    with torch.inference_mode():
        rows = BlipForConditionalGeneration.from_pretrained(kept).generate(pixel_values=pixels)
    captions = [detokenise(reference.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    assert validation_captions(kept) == {f"valid{i}": text for i, text in enumerate(captions)}


def test_bundle_of_kept_model_equals_validation(second_stage, data, tmp_path):
    kept, log = second_stage / "models" / "epoch_01", []
    bundle = export_bundle(kept, tmp_path / "bundle", log.append)
    assert bundle.generation == KNOWN
    assert not [line for line in log if line.startswith("note")]  # both files have the same settings
    paths = [data / f"valid/valid{i}.png" for i in range(IMAGES)]
    captioner = Captioner.load(tmp_path / "bundle")
    captions = list(captioner.caption(paths))
    assert {one.id: one.text for one in captions} == validation_captions(kept)
    assert all(len(one.ids) > KNOWN["min_new_tokens"] for one in captions)
    for name, other in (("num_beams", 1), ("repetition_penalty", 1.0), ("min_new_tokens", 0)):
        assert [one.text for one in captioner.caption(paths, **{name: other})] != [one.text for one in captions], name


def test_write_decoding_off_keeps_checkpoint_settings(checkpoint, data, tmp_path):
    recipe = replace(RECIPES["medblip-2026"], **SMALL, write_decoding=False)
    finetune(Job(checkpoint, DataInputs(data), tmp_path / "run", recipe), lambda _: None)
    text = json.loads((tmp_path / "run/models/epoch_01/config.json").read_text())["text_config"]
    assert (text["num_beams"], text["no_repeat_ngram_size"], text["suppress_tokens"]) == (4, 2, [9])
    assert "repetition_penalty" not in text


def test_settings_of_greedy_recipe_replace_beams(checkpoint, data, tmp_path):
    """Hugging Face saves no length penalty without beams; the length limit is the model's 64 positions."""
    recipe = replace(RECIPES["smoke"], **SMALL | {"epochs": 2, "eval_max_new_tokens": 99}, write_decoding=True)
    recipe = replace(recipe, eval_length_penalty=2.0)
    finetune(Job(checkpoint, DataInputs(data), tmp_path / "run", recipe), lambda _: None)
    average(tmp_path / "run", Choice(), tmp_path / "mean", lambda _: None)
    for kept in (tmp_path / "run/models/epoch_01", tmp_path / "run/models/epoch_02", tmp_path / "mean"):
        generation = Reference.load(kept).model.text_decoder.generation_config.to_diff_dict()
        found = {name: generation.get(name) for name in (*KNOWN, "no_repeat_ngram_size", "suppress_tokens")}
        assert found == dict.fromkeys(found) | {"max_new_tokens": 63, "no_repeat_ngram_size": 3}

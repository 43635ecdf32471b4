"""The average of a run's epochs, compared bit by bit with numpy, and epochs that cannot be averaged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from engine.errors import DataError
from export.reference.huggingface import Reference
from tests.helpers.tiny import IMAGE_SIZE, make_checkpoint
from train.__main__ import main
from train.learning.average import mean_of
from train.learning.run_dir import BestModels
from train.recipe import Recipe

ROUGE = {2: 0.3, 3: 0.5, 5: 0.4, 6: 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished run of six epochs that kept four, as `finetune` writes it."""
    root = tmp_path_factory.mktemp("run")
    recipe = Recipe(keep=4)
    best = BestModels(root / "models", recipe)
    for epoch, rouge in ROUGE.items():
        model = Reference.load(make_checkpoint(root / "made" / str(epoch), seed=epoch, end_bias=epoch / 7))
        best.add(epoch, {"loss": 1.0, "rouge1": rouge}, [("a", "ct")], model)
    (root / "run.json").write_text(json.dumps({"recipe": recipe.settings()}))
    log = [{"epoch": epoch, "eval_loss": 1.0} for epoch in range(1, 7)]
    (root / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return root


def average(*arguments):
    return CliRunner().invoke(main, ["average", *map(str, arguments)])


@pytest.mark.parametrize(
    ("chosen", "epochs"),
    [
        ((), (2, 3, 5, 6)),
        (("--best", 3), (2, 3, 5)),
        (("--best", 2), (3, 5)),
        (("--last", 2), (5, 6)),
        ((6, 2, 3), (2, 3, 6)),
    ],
)
def test_average_is_float64_mean_rounded_once(run, tmp_path, chosen, epochs):
    done = average(run, *chosen, "--out", tmp_path / "mean")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["epochs"] == list(epochs)
    found = load_file(tmp_path / "mean" / "model.safetensors")
    models = [load_file(run / "models" / f"epoch_{epoch:02d}" / "model.safetensors") for epoch in epochs]
    assert set(found) == set(models[0])
    for name, mean in found.items():
        total = np.zeros(mean.shape, np.float64)
        for model in models:
            total += model[name].astype(np.float64)
        assert mean.dtype == np.float32
        assert np.array_equal(mean, (total / len(models)).astype(np.float32)), name
    rounded_often = {name: sum(model[name] for model in models) / np.float32(len(models)) for name in found}
    assert len(epochs) == 2 or any(not np.array_equal(found[name], rounded_often[name]) for name in found)


def test_average_is_checkpoint_like_those_of_run(run, tmp_path):
    assert average(run, 3, 5, "--out", tmp_path / "mean").exit_code == 0
    theirs = {path.name for path in (run / "models" / "epoch_03").iterdir()} - {"evaluation.json", "valid.csv"}
    assert {path.name for path in (tmp_path / "mean").iterdir()} == theirs | {"average.json"}
    model = Reference.load(tmp_path / "mean").model  # with tokenizer and image processor, as the export does
    assert model.text_decoder.get_output_embeddings().weight is model.text_decoder.get_input_embeddings().weight
    report = json.loads((tmp_path / "mean" / "average.json").read_text())
    assert (report["run"], list(report["checkpoints"])) == (run.name, ["epoch_03", "epoch_05"])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (("--last", 2, "--best", 2), "exclude each other"),
        (("--best", 5), "keeps the epochs 2, 3, 5, 6, fewer than 5: train with keep=5"),
        (("--last", 3), "keeps the epochs 2, 3, 5, 6, and its last epoch is 6"),
        ((1, 2), "keeps the epochs 2, 3, 5, 6, not 1"),
        ((2,), "at least two different epochs, not 2"),
        ((2, 3, 2), "at least two different epochs, not 2, 3, 2"),
    ],
)
def test_missing_epochs_are_named(run, tmp_path, chosen, message):
    done = average(run, *chosen, "--out", tmp_path / "mean")
    assert done.exit_code == 2
    assert message in done.output
    assert not list(tmp_path.iterdir())


def test_invalid_run_or_existing_output_is_refused(run, tmp_path):
    done = average(tmp_path, "--out", tmp_path / "mean")
    assert "is not a run directory of `train finetune`" in done.output
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    assert "has not ended" in average(tmp_path, "--last", 2, "--out", tmp_path / "mean").output
    assert "keeps no epoch" in average(tmp_path, 1, 2, "--out", tmp_path / "mean").output
    done = average(run, "--out", tmp_path)
    assert (done.exit_code, "exists: name a new directory" in done.output) == (2, True)


def test_models_of_other_image_sizes_are_refused(tmp_path):
    paths = [make_checkpoint(tmp_path / str(size), image_size=size) for size in (IMAGE_SIZE, 2 * IMAGE_SIZE)]
    with pytest.raises(DataError, match=r"other shapes than .* \(vision_model\.embeddings\.position_embedding\)"):
        mean_of(paths)

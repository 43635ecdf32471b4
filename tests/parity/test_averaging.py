"""Average the epochs of a run: equal to a hand-computed mean to the last bit; and what cannot be averaged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from engine.errors import DataError, EngineError, UsageError
from export.reference.huggingface import Reference
from tests.helpers.tiny import IMAGE_SIZE, WORDS, make_checkpoint, random_pictures
from train.__main__ import main
from train.finetune import DataInputs, Job, finetune
from train.learning.average import mean_of
from train.learning.ema import MovingAverage
from train.learning.run_dir import BestModels
from train.recipe import RECIPES, Recipe

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
def test_average_is_the_float64_mean_rounded_once(run, tmp_path, chosen, epochs):
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


def test_average_is_a_complete_checkpoint(run, tmp_path):
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
        (("--best", 5), "keeps the epochs 2, 3, 5, 6, not 5 epochs"),
        (("--last", 3), "keeps the epochs 2, 3, 5, 6, and its last epoch is 6"),
        ((1, 2), "keeps the epochs 2, 3, 5, 6, not 1"),
        ((2,), "two epochs or more, each once, not of 2"),
        ((2, 3, 2), "two epochs or more, each once, not of 2, 3, 2"),
    ],
)
def test_error_names_missing_epochs(run, tmp_path, chosen, message):
    done = average(run, *chosen, "--out", tmp_path / "mean")
    assert done.exit_code == 2
    assert message in done.output
    assert not list(tmp_path.iterdir())


def test_average_refuses_bad_run_and_existing_output(run, tmp_path):
    done = average(tmp_path, "--out", tmp_path / "mean")
    assert "is no run directory of `train finetune`" in done.output
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    assert "has not come to its end" in average(tmp_path, "--last", 2, "--out", tmp_path / "mean").output
    assert "keeps no epoch" in average(tmp_path, 1, 2, "--out", tmp_path / "mean").output
    done = average(run, "--out", tmp_path)
    assert (done.exit_code, "exists: name a new directory" in done.output) == (2, True)


def test_models_of_different_image_sizes_are_refused(tmp_path):
    paths = [make_checkpoint(tmp_path / str(size), image_size=size) for size in (IMAGE_SIZE, 2 * IMAGE_SIZE)]
    with pytest.raises(DataError, match=r"other shapes than .* \(vision_model\.embeddings\.position_embedding\)"):
        mean_of(paths)


class KilledError(BaseException):
    """An exception that no handler catches."""


def test_moving_average_is_evaluated_and_survives_a_kill(tmp_path, monkeypatch):
    """Train three epochs, kill the run within the second epoch after a checkpoint, and resume it: the results are
    equal.
    """
    checkpoint = make_checkpoint(tmp_path / "checkpoint", end_bias=1.0, std=0.1)
    (tmp_path / "data" / "images").mkdir(parents=True)
    rows = ["ID,Caption"]
    for i, picture in enumerate(random_pictures(16, seed=1)):
        picture.save(tmp_path / "data" / "images" / f"p{i}.png")
        rows.append(f"p{i},a {WORDS[7 + i]} {WORDS[20 + i]}")
    (tmp_path / "data" / "captions.csv").write_text("\n".join(rows) + "\n")
    settings = {"epochs": 3, "batch_size": 4, "device_batch": 4, "learning_rate": 5e-3, "freeze": ("words",)}
    plain = replace(RECIPES["smoke"], save_steps=1, valid_share=0.3, **settings)
    seen = []
    update = MovingAverage.update

    def watched(self):
        before = {name: mean.clone() for name, mean in zip(self._names, self._means, strict=True)}
        update(self)
        seen.append((before, {n: w.detach().clone() for n, w in zip(self._names, self._weights, strict=True)}))

    def train(name, recipe, say=lambda _: None):
        return finetune(Job(checkpoint, DataInputs(tmp_path / "data"), tmp_path / name, recipe), say)

    def files(pattern):
        return {path.relative_to(path.parents[1]).as_posix(): load_file(path) for path in tmp_path.glob(pattern)}

    monkeypatch.setattr(MovingAverage, "update", watched)
    summary = train("whole", replace(plain, ema=0.9))
    kept = files("whole/models/*/model.safetensors")
    start = load_file(checkpoint / "model.safetensors")
    steps, each = len(seen), len(seen) // 3
    assert steps == summary["steps"] == 9
    for name, mean in {name: start[name] for name in seen[0][0] if name in start}.items():
        by_hand = mean.astype(np.float64)
        for step, (before, weights) in enumerate(seen, 1):
            assert np.allclose(before[name].numpy(), by_hand, rtol=0, atol=1e-6)
            by_hand += (1 - 0.9) * (weights[name].numpy() - by_hand)
            if step % each == 0:
                epoch = kept[f"epoch_{step // each:02d}/model.safetensors"][name]
                assert np.allclose(epoch, by_hand, rtol=0, atol=1e-6)
                assert not np.array_equal(epoch, weights[name].numpy()) or name.endswith("key.bias")

    train("none", plain)
    final = f"checkpoints/checkpoint-{steps}/model.safetensors"
    assert (tmp_path / "whole" / final).read_bytes() == (tmp_path / "none" / final).read_bytes()
    assert not list((tmp_path / "none").rglob("ema.safetensors"))

    def kill(line):
        if line.startswith(f"step {each + 2} of"):
            raise KilledError

    with pytest.raises(KilledError):
        train("killed", replace(plain, ema=0.9), kill)
    log = []
    train("killed", replace(plain, ema=0.9), log.append)
    assert [line.rpartition("/")[2] for line in log if "resuming" in line] == [f"checkpoint-{each + 1}"]
    same = [f"models/epoch_{epoch:02d}/{name}" for epoch in (1, 2, 3) for name in ("model.safetensors", "valid.csv")]
    for path in (*same, final, final.replace("model", "ema"), "best/evaluation.json"):
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path
    with pytest.raises(UsageError, match="holds another run, with another ema"):
        train("whole", plain)


def test_weights_are_restored_after_applying_the_average():
    model = torch.nn.Linear(2, 1)
    own = model.weight.detach().clone()
    average = MovingAverage(model, 0.5)
    with torch.no_grad():
        model.weight += 1.0
    average.update()

    def use():
        with average.applied():
            torch.testing.assert_close(model.weight.detach(), own + 0.5)
            raise KilledError

    with pytest.raises(KilledError):
        use()
    assert torch.equal(model.weight, own + 1.0)


def test_training_state_without_average_is_refused(tmp_path):
    average = MovingAverage(torch.nn.Linear(2, 1), 0.5)
    with pytest.raises(EngineError, match=r"ema\.safetensors is not the moving average of this run .*: delete"):
        average.load(tmp_path)
    average.save(tmp_path)
    average.load(tmp_path)
    with pytest.raises(EngineError, match="is not the moving average"):
        MovingAverage(torch.nn.Linear(3, 1), 0.5).load(tmp_path)

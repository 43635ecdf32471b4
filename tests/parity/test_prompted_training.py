"""Training runs on data with a column of prompts: fine-tuning, rewards, and errors before training starts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from engine.bundle.tokenizer import detokenise
from engine.errors import UsageError
from engine.inputs.tables import read_table
from export.reference.huggingface import Reference
from tests.helpers.tiny import WORDS, make_checkpoint, random_pictures
from train.data.dataset import DataInputs
from train.finetune import Job, finetune
from train.learning.reward import Reward, RewardTrainer
from train.recipe import RECIPES

PROMPTS = ["axial ct of the chest showing", "mri with", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("start") / "checkpoint", end_bias=1.0, std=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write nine training images and three validation images; two of three have a prompt."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 9), ("valid", 3)):
        (root / split).mkdir()
        rows = ["ID,Caption,Prompt"]
        for i, picture in enumerate(random_pictures(count, seed=count)):
            picture.save(root / split / f"{split}{i}.png")
            rows.append(f"{split}{i},a {WORDS[7 + i]} {WORDS[20 + i]},{PROMPTS[i % 3]}")
        (root / f"{split}_captions.csv").write_text("\n".join(rows) + "\n")
    return root


def captions_after_prompts(reference, data, split, options):
    """Return Hugging Face's caption of each image with its prompt: {id: (all ids, text after the prompt)}."""
    table = read_table(data / f"{split}_captions.csv")
    found = {}
    for name, prompt in table.columns["prompt"].items():
        pixels = reference.pixels([Image.open(data / split / f"{name}.png").convert("RGB")])
        ((best,),) = reference.generate(pixels, options.replace(prompt=prompt or None))
        prompt_length = 1 + len(reference.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        text = detokenise(reference.tokenizer.decode(best.ids[prompt_length:], skip_special_tokens=True))
        found[name] = best.ids, text
    return found


def test_training_with_prompts_stores_text_after_them(checkpoint, data, tmp_path):
    recipe = replace(RECIPES["smoke"], epochs=4, learning_rate=1e-2, batch_size=9, device_batch=3, keep=1)
    log = []
    finetune(Job(checkpoint, DataInputs(data), tmp_path / "run", recipe), log.append)
    assert "train: 6 of 9 captions start from a prompt of their image" in log
    best = tmp_path / "run" / "best"
    expected = captions_after_prompts(Reference.load(best), data, "valid", recipe.eval_options())
    written = read_table(best / "valid.csv").single()
    assert written == {name: text for name, (_, text) in expected.items()}
    assert not any(prompt and text.startswith(prompt) for prompt, text in zip(PROMPTS, written.values(), strict=True))
    entries = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    table = data / "valid_captions.csv"
    other = table.read_text().replace("mri with", "mri")
    try:
        before, _ = table.read_text(), table.write_text(other)
        with pytest.raises(UsageError, match="holds another run, which differs in data"):
            finetune(Job(checkpoint, DataInputs(data), tmp_path / "run", recipe), log.append)
    finally:
        table.write_text(before)


def test_rewards_apply_only_to_text_after_prompts(checkpoint, data, tmp_path, monkeypatch):
    """One step: the greedy captions equal Hugging Face's after each prompt, and the loss equals a hand-computed sum."""
    rewarded, losses = [], []
    measure, loss = Reward.__call__, RewardTrainer.compute_loss

    def measured(self, candidates, references):
        rewards = measure(self, candidates, references)
        rewarded.extend(zip(references, candidates, rewards.tolist(), strict=True))
        return rewards

    def summed(self, model, inputs, *given, **more):
        batch = {name: tensor.clone() for name, tensor in inputs.items()}
        found = loss(self, model, inputs, *given, **more)
        losses.append((found.item(), by_hand(self, model, batch)))
        return found

    def by_hand(trainer, model, batch):
        total = 0.0
        drawn = trainer._roll_out(
            [(tuple(p), x.numpy()) for p, x in zip(batch["place"].tolist(), batch["pixels"], strict=True)]
        )
        for place, pixels, captions in zip(batch["place"].tolist(), batch["pixels"], drawn, strict=True):
            prompt = trainer._examples[place[1]].prompt
            prompt_ids = trainer._reference.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            normal = trainer._spec.normalise(pixels[None])
            for ids, advantage in captions.items():
                assert list(ids[1 : 1 + len(prompt_ids)]) == prompt_ids
                with torch.no_grad():
                    logits = model(pixel_values=normal, input_ids=torch.tensor([ids])).logits
                rows = logits[0].log_softmax(-1)
                total -= advantage * sum(rows[i - 1, ids[i]].item() for i in range(1 + len(prompt_ids), len(ids)))
        return total / (trainer.recipe.batch_size * trainer.recipe.samples)

    monkeypatch.setattr(Reward, "__call__", measured)
    monkeypatch.setattr(RewardTrainer, "compute_loss", summed)
    recipe = replace(
        RECIPES["scst"],
        epochs=1,
        batch_size=9,
        device_batch=9,
        workers=0,
        reward=("rouge1=1",),
        freeze=(),
        samples=3,
        baseline="greedy",  # with baseline "others" the advantages, and so the gradients at a prompt, would sum to 0
    )
    finetune(Job(checkpoint, DataInputs(data), tmp_path / "run", recipe), lambda _: None)
    expected = captions_after_prompts(Reference.load(checkpoint), data, "train", recipe.eval_options())
    table = read_table(data / "train_captions.csv").captions
    greedy = {references: text for references, text, _ in rewarded[: 9 * 4][3::4]}
    assert greedy == {table[name]: text for name, (_, text) in expected.items()}
    ((found, hand),) = losses
    assert found == pytest.approx(hand, rel=1e-4, abs=1e-7)
    assert abs(found) > 1e-4


def test_too_long_prompts_are_refused_before_training(checkpoint, data, tmp_path):
    recipe = replace(RECIPES["smoke"], max_tokens=8)
    with pytest.raises(UsageError, match=r"train_captions\.csv: prompts of up to 6 tokens leave no room .* within 8"):
        finetune(Job(checkpoint, DataInputs(data), tmp_path / "run", recipe), lambda _: None)
    assert not (tmp_path / "run").exists()

"""Training: targets, losses and orders against hand-computed examples and Hugging Face's forward pass."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from engine.bundle.tokenizer import detokenise
from engine.errors import EngineError
from engine.options import DecodeOptions
from engine.scoring.base import Items, MetricInputs
from engine.scoring.overlap import Cider
from engine.scoring.profiles import make_metric
from export.reference.huggingface import Reference
from tests.helpers.other_device import DEVICE, other_device
from tests.helpers.tiny import IMAGE_SIZE, make_checkpoint, make_tokenizer, random_pictures
from train import recipe
from train.data.batches import IGNORED, Collator, EpochOrder, Features, Pictures, PixelSpec, collate_captions, radiology
from train.data.examples import Example, Split, references_by_id
from train.learning.reward import (
    BASELINES,
    PADDING,
    SAMPLED_WORDS,
    CorpusCider,
    Reward,
    log_probs,
    merge_equal,
    pad,
    repeating,
)
from train.learning.run_dir import BestModels
from train.learning.setup import Run, encode_images, make_trainer
from train.learning.trainer import (
    COMPLETE,
    CaptionTrainer,
    Evaluator,
    SaveAfterEvaluation,
    explain,
    newest_complete_checkpoint,
    seal,
    sorted_checkpoints,
    sum_of_losses,
)
from train.recipe import Recipe

CAPTIONS = ["axial ct of the chest showing a large mass", "mri", "plain x ray of the left upper lobe"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def examples(tmp_path):
    found = []
    for i, picture in enumerate(random_pictures(6, seed=9)):
        picture.save(tmp_path / f"p{i}.png")
        found.append(Example(f"p{i}", tmp_path / f"p{i}.png", CAPTIONS[i % 3]))
    return found


def test_loss_ignores_padding_cls_and_blanks(tokenizer):
    """The gradient of summed cross entropy is softmax - one-hot at target tokens and zero elsewhere."""
    batch = collate_captions(tokenizer, ["ct of a mass", "mri", None], tokenizer.bos_token_id)
    assert tokenizer.cls_token_id not in batch["labels"]
    vocabulary, length = len(tokenizer), batch["labels"].shape[1]
    assert length == 6  # [DEC] ct of a mass [SEP]
    logits = torch.randn(3, length, vocabulary, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total = sum_of_losses(logits, batch["labels"])
    total.backward()
    words = {(0, i): token for i, token in enumerate(tokenizer("ct of a mass")["input_ids"][1:])}
    words |= {(1, i): token for i, token in enumerate(tokenizer("mri")["input_ids"][1:])}
    expected, by_hand = torch.zeros_like(logits), 0.0
    for (row, place), token in words.items():
        chances = torch.softmax(logits[row, place].detach(), 0)
        expected[row, place] = chances
        expected[row, place, token] -= 1
        by_hand -= math.log(chances[token])
    torch.testing.assert_close(logits.grad, expected)
    assert total.item() == pytest.approx(by_hand, rel=1e-5)
    assert int((batch["labels"] != IGNORED).sum()) == len(words)  # what the Trainer divides by


def test_loss_ignores_prompt_tokens(tokenizer):
    captions, prompts = ["ct of a mass", "mri", None, "a large mass"], ["axial", "", "", "chest x - ray:"]
    batch = collate_captions(tokenizer, captions, tokenizer.bos_token_id, 8, prompts)

    def ids(text):
        return [
            {"D": tokenizer.bos_token_id, "S": tokenizer.sep_token_id, "P": tokenizer.pad_token_id, "_": IGNORED}.get(
                one, tokenizer.convert_tokens_to_ids(one)
            )
            for one in text.split()
        ]

    assert batch["input_ids"].tolist() == [
        ids("D axial ct of a mass S P"),
        ids("D mri S P P P P P"),
        ids("D S P P P P P P"),
        ids("D chest x - ray : a S"),  # truncated after the prompt, to 8 tokens in all
    ]
    assert batch["labels"].tolist() == [
        ids("_ _ ct of a mass S _"),
        ids("_ mri S _ _ _ _ _"),
        ids("_ _ _ _ _ _ _ _"),
        ids("_ _ _ _ _ _ a S"),
    ]
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (8 - n) for n in (7, 3, 2, 8)]


def test_batch_without_prompts_equals_tokenizer(tokenizer):
    captions = [*CAPTIONS, "", "a large mass " * 5]
    theirs = tokenizer(captions, padding=True, truncation=True, max_length=12, return_tensors="pt")
    for prompts in ((), ("",) * len(captions)):
        ours = collate_captions(tokenizer, captions, tokenizer.bos_token_id, 12, prompts)
        assert torch.equal(ours["input_ids"][:, 1:], theirs["input_ids"][:, 1:])
        assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
        assert {tensor.dtype for tensor in ours.values()} == {torch.int64}


def test_loss_equals_hugging_face(tiny_reference):
    """Without padding Hugging Face's loss is the mean over the same tokens."""
    model, tokenizer = tiny_reference.model, tiny_reference.tokenizer
    batch = collate_captions(tokenizer, ["axial ct of chest", "mri of the brain"], tokenizer.bos_token_id)
    assert bool(batch["attention_mask"].all())
    pixels = tiny_reference.pixels(random_pictures(2))
    with torch.inference_mode():
        theirs = model(pixel_values=pixels, **batch).loss
        labels = batch.pop("labels")
        ours = sum_of_losses(model(pixel_values=pixels, **batch).logits, labels) / (labels != IGNORED).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("left_out", [{}, {"do_rescale": False}, {"do_normalize": False}])
def test_pixels_equal_image_processor(tiny_checkpoint, examples, left_out):
    """Also for a processor that skips a step, as in an exported bundle."""
    reference = Reference.load(tiny_checkpoint)
    for name, value in left_out.items():
        setattr(reference.image_processor, name, value)
    spec = PixelSpec.of(reference.image_processor)
    item = Pictures(examples, spec)[(0, 2)]
    expected = reference.pixels([Image.open(examples[2].image).convert("RGB")])
    torch.testing.assert_close(spec.normalise(item["pixels"][None]), expected.float(), rtol=0, atol=1e-6)
    assert item["caption"] == examples[2].caption


def test_each_image_is_seen_once_per_epoch():
    order = EpochOrder(count=11, batch_size=4, seed=3)
    assert len(order) == 12
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    for epoch, places in ((0, first), (1, second)):
        assert {one for one, _ in places} == {epoch}
        assert sorted(index for _, index in places) == list(range(12))
        assert places[-1] == (epoch, 11)  # the blank
    assert [i for _, i in first] != [i for _, i in second]
    order.set_epoch(0)
    assert list(order) == first


def test_augmentation_is_repeatable_and_never_mirrors(tiny_reference, examples):
    spec = PixelSpec.of(tiny_reference.image_processor)
    pictures = Pictures(examples, spec, augmentation="radiology", seed=1)
    first = pictures[(0, 1)]["pixels"]
    assert torch.equal(first, pictures[(0, 1)]["pixels"])
    assert not torch.equal(first, pictures[(1, 1)]["pixels"])
    half_white = np.zeros((64, 64, 3), np.uint8)
    half_white[:, :32] = 255
    for seed in range(40):
        turned = radiology(half_white, np.random.default_rng(seed)).astype(float)
        assert turned.shape == (64, 64, 3)
        assert turned[16:48, :24].mean() > 150 > 100 > turned[16:48, 40:].mean()


def test_features_and_images_make_the_same_batches(tiny_reference, examples):
    reference = tiny_reference
    spec = PixelSpec.of(reference.image_processor)
    collate = Collator(reference.tokenizer, reference.model.config.text_config.bos_token_id, 20)
    pictures = Pictures(examples, spec)
    batch = collate([pictures[(0, i)] for i in (4, 0, 6)])
    with torch.inference_mode():
        pixels = torch.stack([pictures[(0, i)]["pixels"] for i in range(6)])
        encoded = reference.model.vision_model(pixel_values=spec.normalise(pixels))[0]
        features = Features(encoded.half(), examples)
        other = collate([features[(0, i)] for i in (4, 0, 6)])
        labels = batch.pop("labels")
        assert torch.equal(other.pop("labels"), labels)
        normal = spec.normalise(batch.pop("pixels"))
        whole = sum_of_losses(reference.model(pixel_values=normal, **batch).logits, labels)
        part = sum_of_losses(reference.model.text_decoder(**other).logits, labels)
    assert part.item() == pytest.approx(whole.item(), rel=1e-3)


def test_evaluation_equals_engine_score(tiny_checkpoint, examples):
    reference = Reference.load(tiny_checkpoint)
    options = DecodeOptions(max_new_tokens=10)
    twice = [*examples, Example("p0", examples[0].image, "a second caption")]
    evaluator = Evaluator(reference, twice, ("rouge1", "bleu1"), options, 30, 4, MetricInputs())
    metrics, captions = evaluator.evaluate()
    assert [one for one, _ in captions] == [f"p{i}" for i in range(6)]
    assert references_by_id(twice)["p0"] == (CAPTIONS[0], "a second caption")
    expected = reference.generate(reference.pixels([Image.open(one.image).convert("RGB") for one in examples]), options)
    for (_, text), (best,) in zip(captions, expected, strict=True):
        raw = reference.tokenizer.decode(best.ids, skip_special_tokens=True)
        assert text.replace(" ", "") == raw.replace(" ", "")
    with torch.inference_mode():
        losses, tokens = 0.0, 0
        for example in twice:
            batch = collate_captions(reference.tokenizer, [example.caption], reference.tokenizer.bos_token_id)
            pixels = reference.pixels([Image.open(example.image).convert("RGB")])
            count = int((batch["labels"] != IGNORED).sum())
            losses += reference.model(pixel_values=pixels, **batch).loss.item() * count
            tokens += count
    assert metrics["loss"] == pytest.approx(losses / tokens, rel=1e-5)
    assert set(metrics) == {"loss", "rouge1", "bleu1"}


def test_evaluation_on_another_device(tiny_checkpoint, examples):
    """Losses, captions and cached features never mix tensors of the model's device and the CPU."""
    options = DecodeOptions(max_new_tokens=6)
    expected = Evaluator(Reference.load(tiny_checkpoint), examples, ("rouge1",), options, 30, 4).evaluate()
    moved = Reference.load(tiny_checkpoint)
    with other_device():
        moved.model.to(DEVICE)
        metrics, captions = Evaluator(moved, examples, ("rouge1",), options, 30, 4).evaluate()
        features = encode_images(moved, examples, PixelSpec.of(moved.image_processor), lambda _: None)
    assert metrics == pytest.approx(expected[0])
    assert captions == expected[1]
    assert features.device.type == "cpu"


def test_reward_training_on_another_device(tiny_checkpoint, examples, tmp_path, monkeypatch):
    settings = Recipe(
        image_size=None, eval_max_new_tokens=6, batch_size=4, device_batch=4, reward=("rouge1=1",), likelihood_share=0.5
    )
    split = Split("train", examples, tmp_path / "captions.csv")
    splits, seen = {"train": split, "valid": split}, []
    for device in (torch.device("cpu"), DEVICE):
        reference = Reference.load(tiny_checkpoint)
        run = Run(settings, reference, splits, MetricInputs(), {}, (4, 1), tmp_path, lambda _: None)
        trainer = make_trainer(run, lambda _: {}, max_steps=1)
        with other_device(), monkeypatch.context() as patch:
            reference.model.to(device)
            patch.setattr(TrainingArguments, "device", device)
            items = [trainer.train_dataset[(0, i)] for i in range(4)]
            batch = {name: tensor.to(device) for name, tensor in trainer.data_collator(items).items()}
            loss = trainer.compute_loss(reference.model, batch, num_items_in_batch=torch.tensor(20))
            loss.backward()
        seen.append(loss.item())
    assert seen[0] == pytest.approx(seen[1])
    assert seen[0] != 0


def test_evaluation_scores_captions_without_prompts(tiny_checkpoint, examples):
    """The loss is over the captions after their prompts, and generated captions are scored without the prompts."""
    reference = Reference.load(tiny_checkpoint)
    options = DecodeOptions(max_new_tokens=10)
    prompts = ["axial ct", "", "mri of the brain"] * 2
    prompted = [replace(one, prompt=prompt) for one, prompt in zip(examples, prompts, strict=True)]
    metrics, captions = Evaluator(reference, prompted, ("rouge1",), options, 30, 4, MetricInputs()).evaluate()
    losses = tokens = 0
    expected_texts = []
    for example in prompted:
        pixels = reference.pixels([Image.open(example.image).convert("RGB")])
        ((best,),) = reference.generate(pixels, options.replace(prompt=example.prompt or None))
        words = reference.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        expected_texts.append(
            detokenise(reference.tokenizer.decode(best.ids[1 + len(words) :], skip_special_tokens=True))
        )
        targets = reference.tokenizer(example.caption)["input_ids"][1:]
        ids = torch.tensor([[reference.tokenizer.bos_token_id, *words, *targets]])
        with torch.inference_mode():
            rows = torch.log_softmax(reference.model(pixel_values=pixels, input_ids=ids).logits[0], -1)
        losses -= sum(rows[len(words) + i, one].item() for i, one in enumerate(targets))
        tokens += len(targets)
    assert captions == [(one.id, text) for one, text in zip(prompted, expected_texts, strict=True)]
    assert metrics["loss"] == pytest.approx(losses / tokens, rel=1e-5)
    items = Items([one.id for one in prompted], expected_texts, [(one.caption,) for one in prompted])
    assert metrics["rouge1"] == make_metric("rouge1", MetricInputs(), {}).measure(items).value
    assert expected_texts != [text for _, text in Evaluator(reference, examples, (), options, 30, 4).evaluate()[1]]


def test_incomplete_checkpoint_is_skipped(tmp_path):
    for step in (8, 16, 100):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"weights")
        if step != 100:
            seal(directory)
    (tmp_path / "checkpoint-backup").mkdir()  # the user's own
    assert [path.name for path in sorted_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-16", "checkpoint-100"]
    (tmp_path / "checkpoint-16" / "model.safetensors").write_bytes(b"we")
    said = []
    assert newest_complete_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-8"
    assert [line.split(" was")[0].rpartition("/")[2] for line in said] == ["checkpoint-100", "checkpoint-16"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-backup"}
    assert json.loads((tmp_path / "checkpoint-8" / COMPLETE).read_text()) == {"model.safetensors": 7}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "step 3: out of memory: halve --device",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "step 3: out of memory: halve"),
        (MemoryError(), "step 3: out of memory"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 211200 vs 211088"),
            "no space is left in the run directory: make room, the same command resumes",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "),
            "shared memory (/dev/shm) is full",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "ended (DataLoader worker (pid 7) is",
        ),
    ],
)
def test_torch_failures_have_a_remedy(error, expected):
    found = explain(error, "step 3")
    assert found is not None
    assert expected in str(found)
    assert len(str(found).splitlines()) == 1


def test_unknown_errors_are_not_explained():
    assert explain(ValueError("a bug"), "step 3") is None
    assert explain(EngineError("a line of our own"), "step 3") is None


def test_an_epoch_is_saved_after_its_evaluation():
    """Every 4 steps is a save; the last of the 8 steps of an epoch has to wait for the evaluation."""
    callback, settings = SaveAfterEvaluation(8), TrainingArguments(save_strategy="steps", save_steps=4)
    for step, saves in ((4, True), (8, False)):
        control = TrainerControl(should_save=True)  # as the Trainer's own callback leaves it
        callback.on_step_end(settings, TrainerState(global_step=step), control)
        assert control.should_save is saves
    callback.on_epoch_end(settings, TrainerState(global_step=8), control)
    assert control.should_save


def test_lower_loss_breaks_ties_of_best_model(tmp_path):
    best = BestModels(tmp_path / "models", Recipe(metric="rouge1"))
    for epoch, (loss, rouge) in enumerate([(3.0, 0.0), (2.0, 0.0), (2.5, 0.0), (9.0, 0.1)], 1):
        directory = tmp_path / "models" / f"epoch_{epoch:02d}"
        directory.mkdir(parents=True)
        metrics = {"loss": loss, "rouge1": rouge}
        (directory / "evaluation.json").write_text(json.dumps({"epoch": epoch, "metrics": metrics}))
        if epoch == 1:
            assert best.tie() == ""
        if epoch == 3:
            assert best.tie() == "rouge1 is 0.0000 in all kept epochs: the best is epoch 2, by its loss"
    assert [epoch for epoch, _, _ in best.ranked()] == [4, 2, 3, 1]
    assert best.tie() == ""


def test_resume_of_converged_run_does_not_train(tmp_path):
    trainer = CaptionTrainer.__new__(CaptionTrainer)
    trainer.recipe, calls, log = Recipe(patience=1), [], []
    trainer._log_line = log.append
    trainer.train = lambda **given: calls.append(given)
    for losses, trains in (([2.0, 2.1], False), ([2.0, 1.9], True)):
        state = TrainerState(log_history=[{"eval_loss": loss} for loss in losses], global_step=7)
        state.save_to_json(str(tmp_path / "trainer_state.json"))
        calls.clear()
        trainer.start_or_resume(tmp_path)
        assert calls == ([{"resume_from_checkpoint": str(tmp_path)}] if trains else [])
        assert trainer.state.global_step == 7
    assert log == ["the validation loss has stopped falling (patience 1): the run has ended"]


def test_log_probs_are_over_tokens_that_can_be_sampled():
    logits = torch.randn(1, 2, 300, generator=torch.Generator().manual_seed(2))
    order = logits[0, 0].argsort(descending=True)
    drawn, least = int(order[3]), int(order[200])
    kept = logits[0, 0, order[:SAMPLED_WORDS]]
    expected = logits[0, 0, drawn] - torch.logsumexp(kept, 0)
    found = log_probs(logits, torch.tensor([[1, drawn]]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.isfinite(log_probs(logits, torch.tensor([[1, least]]))).all()


def test_log_probs_ignore_padding():
    ids = pad([(1, 2, 3), (1, 4)], "cpu")
    assert ids.tolist() == [[1, 2, 3], [1, 4, PADDING]]
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    rows = torch.log_softmax(logits, -1)
    expected = torch.stack([rows[0, 0, 2] + rows[0, 1, 3], rows[1, 0, 4]])
    torch.testing.assert_close(log_probs(logits, ids), expected)


def test_log_probs_ignore_prompts():
    ids = pad([(1, 2, 3, 4), (1, 4, 5)], "cpu")
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    rows = torch.log_softmax(logits, -1)
    expected = torch.stack([rows[0, 2, 4], rows[1, 0, 4] + rows[1, 1, 5]])
    torch.testing.assert_close(log_probs(logits, ids, [3, 1]), expected)
    torch.testing.assert_close(log_probs(logits, ids, [1, 1]), log_probs(logits, ids))


def test_cider_weights_come_from_the_whole_corpus():
    references = [("axial ct of the chest",), ("axial mri of the brain",), ("plain x ray of the chest",), ("mass",)]
    candidates = ["axial ct of the chest", "mri of the brain", "x ray", "a mass"]
    whole = Cider().measure(Items(["a", "b", "c", "d"], candidates, references)).per_image
    few = CorpusCider(references).measure(Items(["a", "b"], candidates[:2], references[:2])).per_image
    np.testing.assert_allclose(few, whole[:2])
    assert few[0] > 5


def test_reward_is_the_weighted_sum_of_metrics():
    references = [("axial ct of the chest",), ("mri of the brain",)]
    reward = Reward({"rouge1": 2.0, "cider": 0.5}, MetricInputs(), references)
    candidates = ["axial ct of the chest", "a chest"]
    rouge = Reward({"rouge1": 1.0}, MetricInputs(), references)(candidates, references)
    cider = Reward({"cider": 1.0}, MetricInputs(), references)(candidates, references)
    np.testing.assert_allclose(reward(candidates, references), 2 * rouge + 0.5 * cider)
    assert rouge.tolist() == [1.0, 0.0]


def test_resized_images_have_the_checkpoint_size(tmp_path):
    reference = Reference.load(make_checkpoint(tmp_path / "c"), IMAGE_SIZE // 2)
    spec = PixelSpec.of(reference.image_processor)
    assert spec.read(random_pictures(1)[0]).shape == (IMAGE_SIZE // 2, IMAGE_SIZE // 2, 3)


def test_samples_of_one_image_share_its_encoding(tiny_reference):
    model = tiny_reference.model
    pixels = tiny_reference.pixels(random_pictures(2))
    ids = torch.tensor([[tiny_reference.tokenizer.bos_token_id, i] for i in (7, 8, 9, 10)])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = []
    counter = model.vision_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["pixel_values"])), with_kwargs=True
    )
    with torch.inference_mode():
        expected = model(pixel_values=pixels.repeat_interleave(2, 0), **given).logits
        with repeating(model.vision_model, [2, 2]):
            found = model(pixel_values=pixels, **given).logits
        with repeating(model.vision_model, [0, 1]):
            last = model(pixel_values=pixels, input_ids=ids[3:]).logits
    counter.remove()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(last, expected[3:])
    assert seen == [4, 2, 2]


def test_advantages_of_both_baselines():
    rewards = np.array([[1.0, 2.0, 3.0, 2.5], [1.0, 1.0, 1.0, 0.0]])
    assert BASELINES["greedy"](rewards).tolist() == [[-1.5, -0.5, 0.5], [1.0, 1.0, 1.0]]
    assert BASELINES["others"](rewards).tolist() == [[-1.5, 0.0, 1.5], [0.0, 0.0, 0.0]]
    assert set(BASELINES) == set(recipe.BASELINES)


def test_equal_captions_are_merged():
    assert merge_equal([(1, 2), (1, 3), (1, 2), (1, 4)], [0.5, 0.25, 0.25, 0.0]) == {(1, 2): 0.75, (1, 3): 0.25}
    assert merge_equal([(1, 2), (1, 2)], [0.1, -0.1]) == {}

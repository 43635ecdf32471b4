"""`python -m train finetune` as users run it: killed, shared among processes, planned, refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from engine.cli.caption import in_words
from engine.errors import EngineError
from tests.helpers.cores import two_cores
from tests.helpers.tiny import WORDS, make_checkpoint, random_pictures
from train.__main__ import main
from train.dry_run import disk
from train.learning.setup import load_reference
from train.recipe import RECIPES

SETTINGS = ["--recipe", "smoke", "--epochs", "3", "--learning-rate", "5e-3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("start") / "checkpoint", end_bias=0.0, std=0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """29 captioned pictures, of which about a fifth will be held out: no multiple of any batch."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "images").mkdir()
    rows = ["ID,Caption"]
    for i, picture in enumerate(random_pictures(29, seed=2)):
        picture.save(directory / "images" / f"p{i}.png")
        rows.append(f'p{i},"{WORDS[i % 7]} {WORDS[7 + i % 5]} of the {WORDS[12 + i % 9]}"')
    (directory / "captions.csv").write_text("\n".join(rows) + "\n")
    return directory


def finetune(checkpoint: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["-m", "train", "finetune", "--model", str(checkpoint), "--data", str(data), "--out", str(out), *more]


def run(*command: str) -> Result:
    """Run `-m train ARGUMENTS` in this process."""
    done = CliRunner().invoke(main, list(command[2:]))
    assert done.exit_code == 0, done.output[-3000:]
    return done


def losses(out: Path) -> list[tuple[int, str, float]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(e["step"], name, e[name]) for e in entries for name in ("loss", "eval_loss", "eval_rouge1") if name in e]


def weights(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def invoke(checkpoint: Path, data: Path, out: Path, *more: str) -> Result:
    """Run one epoch of a small run in this process."""
    small = ["--recipe", "smoke", "--epochs", "1", "--batch-size", "24", "--set", "eval_max_new_tokens=4"]
    return CliRunner().invoke(main, finetune(checkpoint, data, out, *small, "--set", "schedule=constant", *more)[2:])


@pytest.fixture(scope="module")
def extended(checkpoint, data, tmp_path_factory):
    """A start that is refused, the corrected one, and the same directory with an epoch more: (out, results)."""
    out = tmp_path_factory.mktemp("runs") / "extended"
    done = [invoke(checkpoint, data, out, "--precision", "fp16"), invoke(checkpoint, data, out)]
    (out / "checkpoints" / "checkpoint-backup").mkdir()
    done.append(invoke(checkpoint, data, out, "--epochs", "2"))
    return out, done


@pytest.fixture(scope="module")
def undisturbed(checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run(*finetune(checkpoint, data, out, *SETTINGS))
    return out, json.loads(done.stdout.splitlines()[-1])


def test_run_learns_and_writes_checkpoints_and_curves(undisturbed):
    out, summary = undisturbed
    found = losses(out)
    assert found[0][2] > found[-1][2] + 0.5
    assert summary["epochs"] == 3.0
    assert summary["steps"] == 3 * summary["steps"] // 3 == max(step for step, _, _ in found)
    record = json.loads((out / "run.json").read_text())
    assert record["recipe"]["epochs"] == 3
    assert record["data"]["train"]["captions"] + record["data"]["valid"]["captions"] == 29
    assert {path.name for path in (out / "models").iterdir()} == {"epoch_01", "epoch_02", "epoch_03"}
    assert (out / "best").resolve() == Path(summary["kept"][0]).resolve()
    best = json.loads((out / "best" / "evaluation.json").read_text())["metrics"]
    others = [json.loads((path / "evaluation.json").read_text())["metrics"] for path in (out / "models").iterdir()]
    assert best["rouge1"] == max(one["rouge1"] for one in others)
    assert len((out / "best" / "valid.csv").read_text().splitlines()) == 1 + record["data"]["valid"]["captions"]
    assert (out / "curves.png").stat().st_size > 10_000
    assert list((out / "tensorboard").glob("events*"))


def test_killed_run_resumes_to_the_same_weights(undisturbed, checkpoint, data, tmp_path):
    out = tmp_path / "killed"
    steps = undisturbed[1]["steps"]
    command = [sys.executable, *finetune(checkpoint, data, out, *SETTINGS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"step {steps // 2 + 1} of"):
                process.send_signal(signal.SIGKILL)
                break
        process.stderr.read()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "log.jsonl").exists()
    newest = max((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (newest / "model.safetensors").write_bytes(b"cut off")
    said = run(*command[1:]).stderr
    assert f"{newest} was cut off" in said or int(newest.name.rpartition("-")[2]) == steps // 3
    assert losses(out) == losses(undisturbed[0])
    assert weights(out / "best") == weights(undisturbed[0] / "best")
    final = f"checkpoints/checkpoint-{steps}"
    assert weights(out / final) == weights(undisturbed[0] / final)


def test_run_resumes_with_another_device_batch(undisturbed, checkpoint, data, tmp_path):
    out, steps = tmp_path / "moved", undisturbed[1]["steps"]
    shutil.copytree(undisturbed[0], out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / f"checkpoint-{steps}")
    shutil.rmtree(out / "models" / "epoch_03")
    (out / "models" / "epoch_02" / "evaluation.json").write_text("")  # a power cut
    summary = json.loads(
        run(*finetune(checkpoint, data, out, *SETTINGS, "--device-batch", "2")).stdout.splitlines()[-1]
    )
    assert summary["steps"] == steps
    assert [entry[2] for entry in losses(out)] == pytest.approx(
        [entry[2] for entry in losses(undisturbed[0])], abs=1e-4
    )
    assert {Path(path).name for path in summary["kept"]} == {"epoch_01", "epoch_03"}


@two_cores
def test_two_processes_learn_the_same_weights(undisturbed, checkpoint, data, tmp_path):
    out = tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, *finetune(checkpoint, data, out, *SETTINGS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(undisturbed[0]), losses(out)
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    assert [entry[2] for entry in two] == pytest.approx([entry[2] for entry in one], abs=1e-4)
    done = subprocess.run(
        [*torchrun, *finetune(checkpoint, data, out, *SETTINGS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr


def test_gradient_accumulation_gives_the_same_weights(undisturbed, checkpoint, data, tmp_path):
    out = tmp_path / "accumulated"
    run(*finetune(checkpoint, data, out, *SETTINGS, "--device-batch", "2"))
    assert [entry[2] for entry in losses(out)] == pytest.approx(
        [entry[2] for entry in losses(undisturbed[0])], abs=1e-4
    )


def test_directory_of_another_run_is_refused(undisturbed, checkpoint, data):
    out, summary = undisturbed
    changed = CliRunner().invoke(main, finetune(checkpoint, data, out, "--recipe", "smoke", "--epochs", "4")[2:])
    assert changed.exit_code == 2
    assert "holds another run, which differs in epochs, learning_rate" in changed.output
    again = run(*finetune(checkpoint, data, out, *SETTINGS))
    assert json.loads(again.stdout.splitlines()[-1])["best"] == summary["best"]


def test_failed_start_does_not_block_the_next(extended):
    out, (refused, corrected, _) = extended
    assert "fp16 needs a GPU" in refused.output
    assert corrected.exit_code == 0, corrected.output
    assert "holds a start that saved no training state: its record is replaced" in corrected.output
    assert json.loads((out / "run.json").read_text())["recipe"]["precision"] == "fp32"


def test_finished_run_resumes_with_more_epochs(extended, checkpoint, data, tmp_path):
    """It ends at the weights of a run that had as many epochs from its beginning; other folders do not matter."""
    out, (_, _, done) = extended
    assert done.exit_code == 0, done.output
    assert "with epochs=1: it resumes up to epoch 2" in done.output
    assert json.loads((out / "run.json").read_text())["recipe"]["epochs"] == 2
    assert (out / "checkpoints" / "checkpoint-backup").is_dir()
    assert invoke(checkpoint, data, tmp_path / "direct", "--epochs", "2").exit_code == 0
    assert weights(tmp_path / "direct" / "models" / "epoch_02") == weights(out / "models" / "epoch_02")


def test_one_cycle_run_is_not_extended(undisturbed, checkpoint, data):
    out, _ = undisturbed
    longer = CliRunner().invoke(main, finetune(checkpoint, data, out, *SETTINGS, "--epochs", "4")[2:])
    assert longer.exit_code == 2
    assert "differs in epochs: the learning rates of the schedule one-cycle depend on" in longer.output
    assert f"use --model {out / 'best'} and another --out" in longer.output


@pytest.mark.parametrize("content", ["{", "[]", '{"recipe": 1}'])
def test_damaged_record_is_one_line(extended, checkpoint, data, content):
    out, _ = extended
    before = (out / "run.json").read_text()
    try:
        (out / "run.json").write_text(content)
        done = invoke(checkpoint, data, out)
    finally:
        (out / "run.json").write_text(before)
    assert (done.exit_code, done.output.splitlines()[1:]) == (
        1,
        [f"error: {out / 'run.json'} is damaged: restore it, or delete {out} to start again"],
    )


def test_dry_run_validates(checkpoint, data, tmp_path, monkeypatch):
    """A metric that fails and a model that cannot be written end the dry run as they would end the first epoch."""
    plan = json.loads(invoke(checkpoint, data, tmp_path / "out", "--dry-run").stdout.splitlines()[-1])
    assert set(plan["trial"]["validation"]) == {"images", "loss", "rouge1"}
    with monkeypatch.context() as patch:
        patch.setattr("engine.scoring.overlap.Rouge1.measure", lambda *_: fail("no scores"))
        assert invoke(checkpoint, data, tmp_path / "out", "--dry-run").output.endswith("error: no scores\n")
    monkeypatch.setattr("train.learning.run_dir.save_checkpoint", lambda *_: fail("not written"))
    assert invoke(checkpoint, data, tmp_path / "out", "--dry-run").output.endswith("error: not written\n")
    assert list(tmp_path.iterdir()) == []


def fail(message: str) -> NoReturn:
    raise EngineError(message)


def test_shared_memory_is_checked_before_training(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr("train.learning.setup.os.statvfs", lambda _: SimpleNamespace(f_bavail=64, f_frsize=2**10))
    done = invoke(checkpoint, data, tmp_path / "out", "--set", "workers=2", "--image-size", "64")
    assert done.exit_code == 2
    assert "/dev/shm has 0 MiB free, but 2 processes that read images need 1 MiB: docker run" in done.output
    assert "or --set workers=0" in done.output


def kill_reader(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def no_room(*_: object) -> NoReturn:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def no_memory(*_: object, **__: object) -> NoReturn:
    raise MemoryError


@pytest.mark.parametrize(
    ("broken", "failure", "message"),
    [
        ("train.data.batches.collate_captions", kill_reader, "step 1: a process that reads images ended (DataLoader"),
        ("torch.Tensor.share_memory_", no_room, "step 1: shared memory (/dev/shm) is full"),
        ("train.data.batches.read_image", no_memory, ".png: needs more memory than is free"),
    ],
)
def test_reading_process_that_fails_ends_the_run(checkpoint, data, tmp_path, monkeypatch, broken, failure, message):
    """The run does not hang, and the reason is one line."""
    name, _, attribute = broken.rpartition(".")
    owner = torch.Tensor if name == "torch.Tensor" else importlib.import_module(name)
    works = getattr(owner, attribute)

    def in_readers(*given, **named):
        return (works if get_worker_info() is None else failure)(*given, **named)

    monkeypatch.setattr(owner, attribute, in_readers)
    done = invoke(checkpoint, data, tmp_path / "out", "--set", "workers=1")
    assert done.exit_code == 1
    assert message in done.output.splitlines()[-1]
    assert done.output.splitlines()[-1].startswith("error: ")


def test_image_that_needs_too_much_memory_is_named(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.batches.read_image", no_memory)
    done = invoke(checkpoint, data, tmp_path / "out")
    assert done.exit_code == 1
    assert re.fullmatch(r"error: .*p\d+\.png: needs more memory than is free: .*", done.output.splitlines()[-1])


def test_help_by_one_letter():
    for command in (["-h"], ["finetune", "-h"]):
        assert CliRunner().invoke(main, command).exit_code == 0
    assert CliRunner().invoke(importlib.import_module("export.__main__").main, ["-h"]).exit_code == 0


@two_cores  # its recipe reads images in two processes
def test_dry_run_has_the_papers_rates_and_writes_nothing(checkpoint, data, tmp_path):
    done = run(*finetune(checkpoint, data, tmp_path / "none", "--dry-run", "--image-size", "32"))
    plan = json.loads(done.stdout.splitlines()[-1])
    expected = [1e-5] * 3 + [1e-6] * 3 + [1e-7] * 3 + [1e-8] * 3 + [1e-9] * 3
    assert plan["learning_rates"] == pytest.approx(expected)
    assert plan["steps"] == plan["steps_per_epoch"] * RECIPES["medblip-base"].epochs
    assert plan["steps_per_epoch"] == -(-plan["captions"]["train"] // 16)
    assert plan["trial"]["steps"] == 2
    assert plan["memory_gib"]["a100"] == 40.0
    here, trial = plan["this_machine"], plan["trial"]
    assert 0 < here["seconds_a_step"] <= 2 * trial["seconds_a_step"] + 0.01
    seconds = plan["steps_per_epoch"] * here["seconds_a_step"]
    seconds += here["validation_images"] * here["seconds_a_validation_image"]
    assert here["validation_images"] == plan["captions"]["valid"]
    assert here["hours_an_epoch"] * 3600 == pytest.approx(seconds, rel=0.02)
    assert here["hours"] == pytest.approx(15 * here["hours_an_epoch"], rel=0.02)
    assert f"on this machine: about {in_words(3600 * here['hours_an_epoch'])} per epoch" in done.stderr
    assert re.search(rf"^steps +{plan['steps']}$", done.stderr, re.MULTILINE), "the plan is also a table for people"
    assert plan["disk_gib"]["most"] > plan["disk_gib"]["models"] > 0
    assert not (tmp_path / "none").exists()


def test_dry_run_reports_disk_space(undisturbed, checkpoint):
    out, recipe = undisturbed[0], replace(RECIPES["smoke"], epochs=3)
    estimate = disk(load_reference(checkpoint, recipe).model, recipe)

    def size(pattern: str) -> int:
        return sum(tensor.nbytes for path in out.glob(pattern) for tensor in load_file(path).values())

    moments = 0
    for path in out.glob("checkpoints/*/optimizer.pt"):
        states = torch.load(path, weights_only=True)["state"].values()
        moments += sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert size("models/*/model.safetensors") == estimate["models"]
    assert size("checkpoints/*/model.safetensors") + moments == estimate["states"]


def test_plan_of_reward_times_drawn_captions(checkpoint, data, tmp_path):
    settings = ["--recipe", "scst", "--set", "reward=rouge1=1", "--batch-size", "4", "--dry-run"]
    settings += ["--set", "workers=0", "--set", "samples=2", "--set", "eval_max_new_tokens=4"]
    done = CliRunner().invoke(main, finetune(checkpoint, data, tmp_path / "none", *settings)[2:])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout.splitlines()[-1])
    not_counted = plan["this_machine"]["not_counted"]
    assert not_counted == ["checking the data", "scoring validation captions", "writing to disk"]  # drawing is timed


def test_rewards_are_logged_and_a_second_stage_starts_from_the_first(undisturbed, data, tmp_path):
    out = tmp_path / "scst"
    settings = ["--recipe", "scst", "--epochs", "1", "--batch-size", "8", "--set", "reward=rouge1=1 cider=0.1"]
    settings += ["--set", "valid_share=0.2", "--set", "workers=0", "--set", "likelihood_share=0.1"]
    run(*finetune(undisturbed[0] / "best", data, out, *settings))
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rewards = [(e["reward_drawn"], e["reward_greedy"]) for e in entries if "reward_drawn" in e]
    assert len(rewards) == sum("loss" in e for e in entries) > 1
    assert all(0 < drawn < 2 for drawn, _ in rewards)
    assert weights(out / "best") != weights(undisturbed[0] / "best")


def test_unusable_images_stop_a_run_unless_skipped(checkpoint, data, tmp_path):
    bad = tmp_path / "data"
    (bad / "images").mkdir(parents=True)
    for path in (data / "images").iterdir():
        (bad / "images" / path.name).write_bytes(path.read_bytes())
    text = (data / "captions.csv").read_text()
    (bad / "captions.csv").write_text(text + 'gone,"a mass"\nbroken,"a mass"\np28b,""\n')
    (bad / "images" / "broken.png").write_bytes(b"text")
    (bad / "images" / "p28b.png").write_bytes((data / "images" / "p28.png").read_bytes())
    refused = CliRunner().invoke(main, finetune(checkpoint, bad, tmp_path / "out", *SETTINGS)[2:])
    assert refused.exit_code == 1
    for part in ("gone", "broken (not an image, or damaged)", "p28b", "--allow-missing"):
        assert part in refused.output
    plan = run(*finetune(checkpoint, bad, tmp_path / "out", *SETTINGS, "--allow-missing", "--dry-run")).stdout
    assert sum(json.loads(plan.splitlines()[-1])["captions"].values()) == 29


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--set", "epochs"], "give SETTING=VALUE"),
        (["--recipe", "absent"], "there is no recipe 'absent'"),
        (["--set", "epoch=3"], "unknown settings epoch"),
        (["--image-size", "30"], "not a multiple of the patch size"),
        (["--set", "metric=rouge"], "unknown metric 'rouge'"),
        (["--set", "metric=bertscore"], "needs weights: --weights bertscore=DIR"),
        (["--recipe", "scst"], "needs weights: --weights bertscore=DIR"),
        (["--precision", "fp16"], "fp16 needs a GPU"),
    ],
)
def test_wrong_options_give_one_error_line(checkpoint, data, tmp_path, given, message):
    done = CliRunner().invoke(main, finetune(checkpoint, data, tmp_path / "out", *given)[2:])
    assert done.exit_code in (1, 2)
    assert message in done.output
    errors = [line for line in done.output.splitlines() if not line.startswith("no validation split")]
    assert len(errors) == 1


def test_captions_longer_than_the_decoder_are_refused(checkpoint, data, tmp_path):
    long = Path(shutil.copytree(data, tmp_path / "data"))
    table = next(long.rglob("*.csv"))
    rows = table.read_text().splitlines()
    table.write_text("\n".join([rows[0], *(f'{row.split(",")[0]},"{"chest " * 80}"' for row in rows[1:])]) + "\n")
    given = ["--recipe", "smoke", "--set", "max_tokens=200", "--dry-run"]
    done = CliRunner().invoke(main, finetune(checkpoint, long, tmp_path / "out", *given)[2:])
    assert done.exit_code == 2
    assert "max_tokens 200: the checkpoint has 64 positions, and " in done.output


def test_make_train_smoke(tiny_checkpoint, tmp_path):
    """The commands of `make train-smoke` in this process, with a tiny checkpoint and a third of the examples."""
    examples = tmp_path / "examples"
    (examples / "images").mkdir(parents=True)
    header, *rows = Path("examples/captions.csv").read_text().splitlines()
    for row in (some := rows[::3]):
        shutil.copy(f"examples/images/{row.partition(',')[0]}.jpg", examples / "images")
    (examples / "captions.csv").write_text("\n".join([header, *some]) + "\n")
    make = ["make", "-n", "train-smoke", f"EXAMPLES={examples}", f"MODEL={tiny_checkpoint}"]
    dry = subprocess.run(make, check=True, capture_output=True, text=True).stdout
    done = []
    for words in map(shlex.split, dry.replace("\\\n", " ").splitlines()):
        if words[0].endswith("/venv-full/bin/engine"):
            module, arguments = "engine.cli.app", words[1:]
        elif words[0].endswith("/venv-full/bin/python") and words[2].split(".")[0] in ("train", "export"):
            module, arguments = words[2], words[3:]
        else:
            continue  # what sets up the environment
        file = f"{module}.__main__" if "." not in module else module
        command = importlib.import_module(file).main
        result = CliRunner().invoke(command, [word.replace("build/smoke", str(tmp_path)) for word in arguments])
        assert result.exit_code == 0, result.output
        done.append(result.stdout)
    assert len(done) == 6
    summary = json.loads(next(said for said in done if '"best"' in said).splitlines()[-1])
    assert summary["epochs"] == RECIPES["smoke"].epochs
    parity = json.loads((tmp_path / "parity.json").read_text())
    assert parity["passed"]
    assert json.loads((tmp_path / "scores.json").read_text())["details"]["description"]["images"] == len(some)

"""`sweep --tune` chooses settings on one half of the images and compares them on the other half only."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.bundle.manifest import demo_bundle
from engine.cli.app import main as engine
from engine.errors import DataError, EngineError, UsageError
from engine.inputs.tables import read_table
from engine.options import DecodeOptions
from engine.run.pipeline import LocalSource
from engine.scoring.base import Items, MetricInputs, compare
from engine.scoring.profiles import make_metric
from tests.helpers.tiny import WORDS, random_pictures
from train.__main__ import main as train
from train.data.dataset import read_dataset
from train.sweep.settings import Tuning, flags_of, in_file_name
from train.sweep.sweep import Sweep
from train.sweep.tune import as_markdown, command, draw_halves, halve, tune

NAMES = [f"case_{i}" for i in range(9)]
SHORT = Tuning(tune=True, grid="length_penalty=1,3 repetition_penalty=1,2 min_new_tokens=0,6")


def silent(_: str) -> None:
    pass


@pytest.fixture
def job(tmp_path, tiny_bundle) -> Sweep:
    """A sweep over nine images with references unrelated to them, so that any setting may be the best."""
    data = tmp_path / "data"
    (data / "valid").mkdir(parents=True)
    rows = []
    for i, (name, picture) in enumerate(zip(NAMES, random_pictures(len(NAMES), seed=3), strict=True)):
        picture.save(data / "valid" / f"{name}.png")
        rows.append(f'{name},"{" ".join(WORDS[(5 * i + j) % 40] for j in range(9))}"')
    (data / "valid_captions.csv").write_text("\n".join(["ID,Caption", *rows]) + "\n")
    return Sweep(
        None,
        data,
        tmp_path / "out",
        beams=(1, 3),
        bundle=tiny_bundle,
        decoding=DecodeOptions(max_new_tokens=12),
        metrics=("rouge1", "bleu1"),
    )


@pytest.fixture
def asked(monkeypatch) -> list[tuple[tuple, list[str]]]:
    """The calls of the captioner, as (settings, ids)."""
    calls = []
    caption = LocalSource.captions

    def counted(self, pending, log):
        images, options = list(pending.remaining()), self.decoding.options
        settings = (options.num_beams, options.length_penalty, options.repetition_penalty, options.min_new_tokens)
        calls.append((settings, [image.id for image in images]))
        return caption(self, pending, log)

    monkeypatch.setattr(LocalSource, "captions", counted)
    return calls


def values(settings: dict) -> tuple:
    return tuple(settings.values())


def test_search_captions_only_the_tuning_half(job, asked):
    result = tune(job, SHORT, silent)
    tuning, held_back = halve(NAMES, 0)
    assert result["images"] == {"tuning": 4, "held_back": 5}
    assert asked[:-2] == [(values(trial["settings"]), tuning) for trial in result["trials"]]
    assert asked[-2:] == [(values(result["own"]), held_back), (values(result["chosen"]), held_back)]
    assert len({settings for settings, _ in asked[:-2]}) == len(asked) - 2
    assert values(result["own"]) == (1, 1.0, 1.0, 0)  # the bundle's, which are Hugging Face's
    assert result["own"] != result["chosen"]  # otherwise this test could not detect an error


def test_reported_scores_equal_the_engines(job, tiny_captioner):
    result = tune(job, SHORT, silent)
    references = read_table(job.data / "valid_captions.csv").captions

    def measured(metric: str, settings: dict, ids: list[str]):
        options = tiny_captioner.bundle.options(max_new_tokens=12, **settings)
        files = [job.data / "valid" / f"{name}.png" for name in ids]
        captions = [caption.text for caption in tiny_captioner.caption(files, options)]
        items = Items(ids, captions, [references[name] for name in ids])
        return make_metric(metric, MetricInputs(), {}).measure(items)

    tuning, held_back = map(sorted, halve(NAMES, 0))
    for trial in result["trials"]:
        assert trial["value"] == measured("rouge1", trial["settings"], tuning).value
    best = max(trial["value"] for trial in result["trials"])
    assert result["chosen"] == next(trial["settings"] for trial in result["trials"] if trial["value"] == best)
    assert list(result["held_back"]) == ["rouge1", "bleu1"]
    for name, shown in result["held_back"].items():
        own, chosen = (measured(name, result[which], held_back) for which in ("own", "chosen"))
        assert (shown["own"], shown["chosen"]) == (own.value, chosen.value)
        expected = asdict(compare(own, chosen))
        assert {key: shown[key] for key in expected} == expected
        assert expected["difference"] != 0


def test_interrupted_tuning_resumes_with_equal_result(job, asked, monkeypatch):
    few = replace(SHORT, grid="length_penalty=1 repetition_penalty=1,2 min_new_tokens=0")
    whole = tune(replace(job, out=job.out.with_name("whole")), few, silent)
    calls, counted = list(asked), LocalSource.captions

    def cut_at(call: int):
        def cut(self, pending, log):
            for i, caption in enumerate(counted(self, pending, log)):
                if len(asked) == call and i == 2:
                    raise KeyboardInterrupt
                yield caption

        del asked[:]
        monkeypatch.setattr(LocalSource, "captions", cut)
        with pytest.raises(KeyboardInterrupt):
            tune(job, few, silent)

    cut_at(3)
    assert asked == calls[:3]
    cut_at(len(calls) - 2)  # counted from the third run, which resumes: interrupt the last run
    assert [settings for settings, _ in asked] == [settings for settings, _ in calls[2:]]
    assert [ids for _, ids in asked] == [calls[2][1][2:], *(ids for _, ids in calls[3:])]
    del asked[:]
    monkeypatch.setattr(LocalSource, "captions", counted)
    result = tune(job, few, silent)
    assert asked == [(calls[-1][0], calls[-1][1][2:])]
    assert {**result, "data": "", "command": ""} == {**whole, "data": "", "command": ""}
    del asked[:]
    assert tune(job, few, silent) == result == json.loads((job.out / "tuned.json").read_text())
    assert asked == []


def test_given_options_are_not_tuned(job, asked):
    job = replace(job, beams=(3,), decoding=DecodeOptions(max_new_tokens=12, length_penalty=2.0, min_new_tokens=2))
    result = tune(job, Tuning(tune=True), silent)
    assert {settings[:2] + settings[3:] for settings, _ in asked} == {(3, 2.0, 2)}
    assert sorted(settings[2] for settings, _ in asked[:4]) == [1.0, 1.2, 1.5, 2.5]
    assert result["grids"] == {"repetition_penalty": [1.0, 1.2, 1.5, 2.5]}
    assert result["fixed"] == shlex.split("--beams 3 --max-new-tokens 12 --min-new-tokens 2 --length-penalty 2")


def test_invalid_default_values_are_skipped(job):
    notes = []
    job = replace(job, beams=(1,), decoding=DecodeOptions(max_new_tokens=5, length_penalty=1.0, repetition_penalty=1.0))
    result = tune(job, Tuning(tune=True), notes.append)
    assert (result["grids"], result["left_out"]) == ({"min_new_tokens": [0, 4]}, {"min_new_tokens": [8]})
    assert any(note.startswith("min_new_tokens 8 is not tried: the minimum length (") for note in notes)
    assert "* not tried: `min_new_tokens` 8" in (job.out / "tuned.md").read_text()
    with pytest.raises(UsageError, match=r"^min_new_tokens 8 cannot be tried: the minimum length \("):
        tune(job, Tuning(tune=True, grid="min_new_tokens=0,8"), silent)


def test_length_penalty_is_not_tried_with_one_beam(job, asked):
    job = replace(job, beams=(1,))
    result = tune(job, Tuning(tune=True, grid="repetition_penalty=1 min_new_tokens=0"), silent)
    assert len(result["trials"]) == 1
    assert [ids for _, ids in asked] == list(halve(NAMES, 0))
    page = (job.out / "tuned.md").read_text()
    assert "No gain is shown: no other settings were better on the tuning half" in page


def test_halves_follow_seed_and_group(job):
    seen = []
    for given in ({}, {"seed": 1}, {"group": "case_(?=[0-3])|case(?=_[4-8])"}):
        halves = draw_halves(job, replace(SHORT, **given), read_dataset(job.data)["valid"])
        seen.append([{image.id for image in half.images} for half in halves])
        assert [set(half.references) for half in halves] == seen[-1]
    assert seen[0] == [set(half) for half in halve(NAMES, 0)]
    assert seen[1] == [set(half) for half in halve(NAMES, 1)] != seen[0]
    assert set(NAMES[:4]) in seen[2]


@pytest.mark.parametrize(
    ("change", "tuning", "message"),
    [
        ({"metrics": ("rouge9",)}, {}, "unknown metric 'rouge9'"),
        (
            {"metrics": ("bertscore", "rouge1")},
            {},
            "bertscore, the first of --metrics, is unavailable and cannot choose the settings: needs weig",
        ),
        ({"limit": 3}, {}, "3 images cannot be divided into two halves of at least 2"),
        ({"beams": (1, 40)}, {}, "num_beams 40 cannot be tried: 40 beams are too many for a vocabulary"),
        (
            {"beams": (3,)},
            {"grid": "length_penalty=1 repetition_penalty=1 min_new_tokens=0"},
            "there is nothing to tune",
        ),
        (
            {"decoding": DecodeOptions(length_penalty=1.0)},
            {},
            "length_penalty is both fixed and tuned: remove its option",
        ),
        ({"decoding": DecodeOptions(max_new_tokens=500)}, {}, "set --max-new-tokens"),
    ],
)
def test_invalid_options_are_refused_before_captioning(job, asked, change, tuning, message):
    with pytest.raises((UsageError, DataError)) as caught:
        tune(replace(job, **change), replace(SHORT, **tuning), silent)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert asked == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": "length_penalty=1"}, "need --tune: add it"),
        ({"seed": 3}, "need --tune: add it"),
        ({"tune": True, "grid": "num_beams=1,2"}, "--tune-grid num_beams=1,2: expected SETTING=VALUE,VALUE with one"),
        ({"tune": True, "grid": "length=1"}, "with one of length_penalty, repetition_penalty, min_new_tokens"),
        (
            {"tune": True, "grid": "length_penalty=1,x"},
            "--tune-grid length_penalty=1,x: expected numbers, separated by",
        ),
        ({"tune": True, "grid": "length_penalty"}, "--tune-grid length_penalty=: expected numbers"),
        ({"tune": True, "grid": "min_new_tokens=1.5"}, "expected whole numbers, separated by commas"),
        ({"tune": True, "grid": "repetition_penalty=nan"}, "repetition_penalty must be a number of at least 0.01"),
        ({"tune": True, "grid": "min_new_tokens=1 min_new_tokens=2"}, "--tune-grid contains min_new_tokens twice"),
    ],
)
def test_invalid_grid_is_refused(given, message):
    with pytest.raises(UsageError) as caught:
        Tuning(**given)
    assert message in str(caught.value)


def test_metric_without_value_ends_the_search(job, monkeypatch):
    from engine.scoring.overlap import Rouge1

    measure = Rouge1.measure
    monkeypatch.setattr(Rouge1, "measure", lambda self, items: replace(measure(self, items), value=float("nan")))
    with pytest.raises(
        EngineError, match=r"rouge1 cannot be computed for \S*tuning_beams1_length1_repetition1_min0\.csv: its val"
    ):
        tune(job, SHORT, silent)


def result_of(low: float, high: float) -> dict:
    settings = {"num_beams": 1, "length_penalty": 1.0, "repetition_penalty": 1.0, "min_new_tokens": None}
    shown = {
        "own": 0.5,
        "chosen": 0.5125,
        "difference": 0.0125,
        "low": low,
        "high": high,
        "wins": 3,
        "losses": 1,
        "ties": 0,
    }
    chosen = {**settings, "num_beams": 4}
    return {
        "checkpoint": {},
        "image_size": [32, 32],
        "data": "DATA",
        "split": "valid",
        "images": {"tuning": 4, "held_back": 4},
        "halves": {"seed": 0, "group": None},
        "metric": "rouge1",
        "fixed": [],
        "grids": {"num_beams": [1, 4]},
        "left_out": {},
        "trials": [{"settings": settings, "value": 0.4}, {"settings": chosen, "value": 0.6}],
        "rounds": 2,
        "settled": True,
        "own": settings,
        "chosen": chosen,
        "tuning": {"own": 0.4, "chosen": 0.6},
        "held_back": {"rouge1": {**shown, "signature": "s"}, "bertscore": {"unavailable": "needs weights"}},
        "command": "engine caption",
    }


@pytest.mark.parametrize(
    ("low", "high", "statement"),
    [
        (0.001, 0.02, "A gain is shown: the interval of ROUGE-1 is above zero."),
        (0.0, 0.02, "No gain is shown: the interval of ROUGE-1 includes zero."),
        (-0.02, 0.02, "No gain is shown: the interval of ROUGE-1 includes zero."),
        (-0.02, 0.0, "No gain is shown: the interval of ROUGE-1 includes zero."),
        (-0.02, -0.01, "A loss is shown: the interval of ROUGE-1 is below zero. Keep the checkpoint's own settings."),
    ],
)
def test_gain_needs_interval_above_zero(low, high, statement):
    page = as_markdown(result_of(low, high))
    assert statement in page
    assert f"| ROUGE-1 | 0.5000 | 0.5125 | +0.0125 [{low:+.4f}, {high:+.4f}] | 3, 1, 0 |" in page
    assert "| BERTScore | unavailable |" in page
    assert "| 4 | 1 | 1 | its min_length | 0.6000 | chosen |" in page


def test_flags_of_given_options():
    options = DecodeOptions(
        num_beams=4,
        length_penalty=0.5,
        early_stopping=False,
        suppress_tokens=(3, 5),
        bad_words=("a b",),
        prompt="a mri",
    )
    expected = "--beams 4 --bad-words FILE --suppress-tokens 3,5 --length-penalty 0.5 --early-stopping false --prompt"
    assert flags_of(options) == [*expected.split(), "a mri"]


def test_halves_and_command_use_prompts(job, tiny_captioner):
    prompts = {name: "ct of" if i % 2 else "" for i, name in enumerate(NAMES)}
    table = (job.data / "valid_captions.csv").read_text().splitlines()
    rows = [f"{row},{prompts[row.split(',')[0]]}" for row in table[1:]]
    (job.data / "valid_captions.csv").write_text("\n".join(["ID,Caption,prompt", *rows]) + "\n")
    halves = draw_halves(job, SHORT, read_dataset(job.data)["valid"])
    assert [half.prompts for half in halves] == [{name: prompts[name] for name in ids} for ids in halve(NAMES, 0)]
    line = command(tiny_captioner.bundle, DecodeOptions(num_beams=2), halves)
    assert line.endswith(" --beams 2 --prompts PROMPTS --input IMAGES --out run.csv")


def test_tuned_command_reproduces_compared_captions(tmp_path):
    """Tune on six example images with a bundle whose settings are bad for the demo.

    `engine score compare` gives the same numbers for the files of the held-back half.
    """
    out, data = tmp_path / "out", tmp_path / "data"
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["generation"] = {"max_length": 50, "min_new_tokens": 45, "no_repeat_ngram_size": 3}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (data / "images").mkdir(parents=True)
    header, *rows = Path("examples/captions.csv").read_text().splitlines()
    for row in rows[2::5]:
        shutil.copy(f"examples/images/{row.partition(',')[0]}.jpg", data / "images")
    (data / "captions.csv").write_text("\n".join([header, *rows[2::5]]) + "\n")
    words = ["sweep", "--tune", "--bundle", str(bundle), "--data", str(data), "--split", "train"]
    words += ["--metrics", "rouge1,bleu1,cider", "--beams", "2", "--length-penalty", "1.5"]
    words += ["--tune-grid", "repetition_penalty=1 min_new_tokens=9", "--out", str(out)]
    done = CliRunner().invoke(train, words)
    assert done.exit_code == 0, done.output
    short = json.loads(done.stdout)
    result = json.loads((out / "tuned.json").read_text())
    assert short == {"result": str(out / "tuned.json")} | {key: result[key] for key in short if key != "result"}
    assert "trials" not in short, "the line is short"
    assert (out / "tuned.md").read_text() in done.stderr
    assert result["command"] in (out / "tuned.md").read_text()
    assert result["own"] == {"num_beams": 2, "length_penalty": 1.5, "repetition_penalty": 1.0, "min_new_tokens": 45}
    assert result["chosen"] == {**result["own"], "min_new_tokens": 9}
    assert result["held_back"]["rouge1"]["difference"] > 0
    held = [out / "tune" / f"held_back_{in_file_name(result[which])}.csv" for which in ("own", "chosen")]
    references = str(out / "tune" / "held_back_references.jsonl")
    given = ["--references", references, "--metrics", "rouge1,bleu1,cider", "--json"]
    compared = json.loads(CliRunner().invoke(engine, ["score", "compare", *map(str, held), *given]).stdout)
    for metric, shown in result["held_back"].items():
        assert {key: shown[key] for key in compared[metric]} == compared[metric]
    ids = [row[0] for row in csv.reader(held[1].read_text().splitlines()[1:])]
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    line = result["command"].replace("IMAGES", str(data / "images")).replace("run.csv", str(tmp_path / "run.csv"))
    done = CliRunner().invoke(engine, [*shlex.split(line)[1:], "--manifest", str(tmp_path / "ids.txt")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run.csv").read_bytes() == held[1].read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tune", "--examples", "3"], "--examples has no effect with --tune: leave it out"),
        (["--tune-seed", "3"], "--tune-grid, --tune-group and --tune-seed need --tune: add it, or remove them"),
        (["--tune", "--tune-grid", "x=1"], "--tune-grid x=1: expected SETTING=VALUE,VALUE"),
    ],
)
def test_invalid_command_line_gives_one_line(given, message, tmp_path):
    words = ["sweep", "--bundle", "x", "--data", "y", "--out", str(tmp_path / "out"), *given]
    done = CliRunner().invoke(train, words)
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.splitlines()) == 1

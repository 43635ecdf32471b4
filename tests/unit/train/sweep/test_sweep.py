"""The sweep over numbers of beams: its captions and scores equal the engine's, and it resumes when interrupted."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from engine.bundle.tokenizer import detokenise
from engine.errors import DataError, EngineError, ExportError, UsageError
from engine.inputs.images import ImageFile
from engine.inputs.tables import read_table
from engine.options import DecodeOptions
from engine.run.pipeline import LocalSource
from engine.scoring.base import Items, MetricInputs
from engine.scoring.profiles import make_metric
from export.bundle import checkpoint_sha256
from tests.helpers.tiny import make_checkpoint, random_pictures
from train.__main__ import main
from train.data.dataset import Example, Split
from train.sweep.runs import choose_images, evenly_spaced
from train.sweep.sweep import PAPER, Sweep, draw_examples, example_lines, sweep

DECODING = DecodeOptions(no_repeat_ngram_size=3, max_new_tokens=12)
NAMES = [f"case_{i}" for i in range(6)]
CAPTIONS = ["axial ct of the chest", "mri of the brain", "a large mass", "x-ray", "left lung, 3 cm", "plain view"]


def make_data(directory: Path, split: str = "valid") -> Path:
    """Write a split of six images, of which the first has two captions."""
    (directory / split).mkdir(parents=True)
    for name, picture in zip(NAMES, random_pictures(len(NAMES), seed=3), strict=True):
        picture.save(directory / split / f"{name}.png")
    rows = [*zip(NAMES, CAPTIONS, strict=True), (NAMES[0], "ct image showing a nodule")]
    (directory / f"{split}_captions.csv").write_text("ID,Caption\n" + "".join(f'{n},"{c}"\n' for n, c in rows))
    return directory


@pytest.fixture
def job(tmp_path, tiny_bundle) -> Sweep:
    data = make_data(tmp_path / "data")
    return Sweep(None, data, tmp_path / "out", beams=(3, 1), bundle=tiny_bundle, decoding=DECODING, examples=0)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, list[str]]]:
    """The calls of the captioner, as (beams, ids)."""
    calls = []
    caption = LocalSource.captions

    def counted(self, pending, log):
        images, options = list(pending.remaining()), self.decoding.options
        calls.append((options.num_beams, [image.id for image in images]))
        return caption(self, pending, log)

    monkeypatch.setattr(LocalSource, "captions", counted)
    return calls


def silent(_: str) -> None:
    pass


def test_captions_and_scores_equal_the_engines(job, tiny_captioner):
    table = sweep(job, silent)
    assert [row["beams"] for row in table["rows"]] == [3, 1]
    references = [(text,) for text in CAPTIONS]
    references[0] = (CAPTIONS[0], "ct image showing a nodule")
    captions = {}
    for row in table["rows"]:
        options = tiny_captioner.bundle.options(num_beams=row["beams"], no_repeat_ngram_size=3, max_new_tokens=12)
        files = [job.data / "valid" / f"{name}.png" for name in NAMES]
        expected = {caption.id: caption.text for caption in tiny_captioner.caption(files, options)}
        captions[row["beams"]] = read_table(job.out / f"run_beams_{row['beams']}.csv").single()
        assert list(captions[row["beams"]].items()) == list(expected.items())
        items = Items(NAMES, list(expected.values()), references)
        for name in ("rouge1", "bleu1"):
            metric = make_metric(name, MetricInputs(), {})
            assert row["scores"][name]["value"] == metric.measure(items).value
            assert row["scores"][name]["signature"] == metric.signature()
        assert row["distinct_captions"] == len(set(expected.values()))
        assert row["images_per_s"] > 0
    assert captions[1] != captions[3]  # otherwise this test could not detect a wrong number of beams


def test_prompts_start_the_captions_and_are_not_scored(job, calls, tiny_captioner):
    """Changed prompts make a new run."""
    prompts = dict(zip(NAMES, ["axial ct of", "", "mri showing", "axial ct of", "", "a"], strict=True))
    rows = [f'{name},"{text}",{prompts[name]}' for name, text in zip(NAMES, CAPTIONS, strict=True)]
    (job.data / "valid_captions.csv").write_text("\n".join(["ID,Caption,prompt", *rows]) + "\n")
    notes = []
    job = replace(job, beams=(3,))
    (row,) = sweep(job, notes.append)["rows"]
    assert "4 of 6 images have a prompt, which is not scored" in notes
    options = tiny_captioner.bundle.options(num_beams=3, no_repeat_ngram_size=3, max_new_tokens=12)
    files = [ImageFile(name, job.data / "valid" / f"{name}.png") for name in NAMES]
    expected = {}
    for caption in tiny_captioner.caption(files, options, prompts=prompts):
        length = len(tiny_captioner.tokenizer.prompt_ids(prompts[caption.id]))
        expected[caption.id] = detokenise(tiny_captioner.tokenizer.decode(caption.ids[length:]))
        assert caption.text.startswith(prompts[caption.id])
    assert read_table(job.out / "run_beams_3.csv").single() == expected
    items = Items(NAMES, list(expected.values()), [(text,) for text in CAPTIONS])
    assert row["scores"]["rouge1"]["value"] == make_metric("rouge1", MetricInputs(), {}).measure(items).value
    assert "|prompts:4:" in row["signature"]
    del calls[:]
    sweep(job, silent)
    assert calls == []
    (job.data / "valid_captions.csv").write_text("\n".join(["ID,Caption,prompt", *rows[:-1], f"{rows[-1]} ct"]) + "\n")
    sweep(job, silent)
    assert calls == [(3, NAMES)]
    with pytest.raises(UsageError, match="exclude each other"):
        sweep(replace(job, decoding=DECODING.replace(prompt="mri")), silent)


def test_resumed_sweep_ignores_captions_of_other_prompts(job, calls):
    job, broken = replace(job, beams=(1,)), job.data / "valid" / "case_4.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no picture")
    for prompt in ("mri of", "ct of"):
        rows = (f'{name},"{text}",{prompt}' for name, text in zip(NAMES, CAPTIONS, strict=True))
        (job.data / "valid_captions.csv").write_text("\n".join(["ID,Caption,prompt", *rows]) + "\n")
        with pytest.raises(DataError, match="cannot be read"):
            sweep(job, silent)
    broken.write_bytes(whole)
    sweep(job, silent)
    assert calls == [(1, NAMES), (1, NAMES), (1, ["case_4"])]


def test_metric_without_weights_is_unavailable_in_all_tables(job):
    table = sweep(job, silent)
    assert json.loads((job.out / "table1.json").read_text())["rows"] == table["rows"]
    for row in csv.DictReader(io.StringIO((job.out / "table1.csv").read_text())):
        assert row["bertscore"] == ""
        assert row["bertscore_unavailable"].startswith("needs weights: --weights bertscore=DIR")
        assert float(row["rouge1_low"]) <= float(row["rouge1"]) <= float(row["rouge1_high"])
    ours = (job.out / "table1.md").read_text().split("## NOT comparable")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ours.splitlines() if line.startswith("|")]
    assert cells[0] == ["Beam size", "ROUGE-1", "BERTScore", "BLEU-1", "images/s", "distinct captions"]
    assert [(row[0], row[2]) for row in cells[2:]] == [("3", "unavailable"), ("1", "unavailable")]
    assert "* BERTScore: unavailable: needs weights" in ours
    assert table["rows"][0]["scores"]["bleu1"]["signature"] in ours
    assert "|num_beams:K|no_repeat_ngram_size:3|" in ours


def test_papers_table_is_separate_and_lacks_ten_beams(job):
    sweep(job, silent)
    paper = (job.out / "table1.md").read_text().split("## NOT comparable")[1]
    assert "another task (ROCOv2 / ImageCLEF test data)" in paper
    assert "| base | 5 | 0.2647 | 0.6596 | - |" in paper
    assert "| large | 4 | 0.2745 | 0.6680 | 0.2955 |" in paper
    assert {tuple(rows) for rows in PAPER.values()} == {(1, 3, 4, 5)}


def test_existing_runs_are_reused(job, calls):
    first, notes = sweep(job, silent), []
    del calls[:]
    assert sweep(job, notes.append) == first
    assert calls == []
    assert sum("not captioned again" in note for note in notes) == 2
    sweep(replace(job, beams=(1, 2)), silent)
    assert [beams for beams, _ in calls] == [2]


@pytest.mark.parametrize("what", ["an image", "an option", "the list", "the captions", "the JSON file"])
def test_changed_run_is_captioned_again(job, calls, what):
    job = replace(job, beams=(1,))
    sweep(job, silent)
    before = read_table(job.out / "run_beams_1.csv").single()
    if what == "an image":
        random_pictures(1, seed=9)[0].save(job.data / "valid" / "case_2.png")
    elif what == "an option":
        job = replace(job, decoding=DECODING.replace(no_repeat_ngram_size=2))
    elif what == "the list":
        job = replace(job, limit=3)
    elif what == "the captions":
        (job.out / "run_beams_1.csv").write_text('ID,Caption\ncase_0,"of another kind"\n')
    else:
        (job.out / "run_beams_1.json").write_text("[")
    del calls[:]
    sweep(job, silent)
    assert [len(ids) for _, ids in calls] == [3 if what == "the list" else 6]
    after = read_table(job.out / "run_beams_1.csv").single()
    if what != "an option":
        assert [name for name in after if after[name] != before[name]] == ["case_2"] * (what == "an image")


def test_interrupted_sweep_resumes_within_a_run(job, calls, monkeypatch):
    whole = sweep(replace(job, out=job.out.with_name("whole")), silent)
    counted = LocalSource.captions

    def cut(self, pending, log):
        for i, caption in enumerate(counted(self, pending, log)):
            if self.decoding.options.num_beams == 1 and i == 2:
                raise KeyboardInterrupt
            yield caption

    monkeypatch.setattr(LocalSource, "captions", cut)
    with pytest.raises(KeyboardInterrupt):
        sweep(job, silent)
    assert not (job.out / "run_beams_1.csv").exists()
    monkeypatch.setattr(LocalSource, "captions", counted)
    del calls[:]
    table = sweep(job, silent)
    assert calls == [(1, NAMES[2:])]
    assert [row["scores"] for row in table["rows"]] == [row["scores"] for row in whole["rows"]]
    assert (job.out / "run_beams_1.csv").read_bytes() == (job.out.with_name("whole") / "run_beams_1.csv").read_bytes()


def test_unreadable_images_leave_no_run_until_fixed(job, calls):
    broken = job.data / "valid" / "case_4.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 of 6 images cannot be read \(\S*case_4\.png: not an image, or damaged\)"):
        sweep(job, silent)
    assert not list(job.out.glob("run_beams_*.csv"))
    broken.write_bytes(whole)
    del calls[:]
    sweep(job, silent)
    assert calls == [(3, ["case_4"]), (1, NAMES)]


def test_image_changed_during_run_leaves_no_run(job, monkeypatch):
    caption = LocalSource.captions

    def changing(self, pending, log):
        yield from caption(self, pending, log)
        random_pictures(1, seed=9)[0].save(job.data / "valid" / "case_2.png")

    monkeypatch.setattr(LocalSource, "captions", changing)
    with pytest.raises(EngineError, match=r"1 image changed during the run \(case_2\.png\)"):
        sweep(job, silent)
    assert not list(job.out.glob("run_beams_*"))[1:]  # the journal alone


def test_missing_images_stop_a_sweep_before_any_work(job, calls):
    (job.data / "valid" / "case_1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 6 images are missing \(case_1\)"):
        sweep(job, silent)
    assert calls == []
    assert not job.out.exists()


def test_id_with_two_images_is_refused():
    examples = [Example("a", Path("x/a.png"), "one"), Example("a", Path("y/b.png"), "two")]
    with pytest.raises(DataError, match=r"the id a has two images, a\.png and b\.png"):
        choose_images(Split("valid", examples, Path("captions.csv")), None, Path())


def test_only_test_split_replaces_missing_valid(job, tmp_path):
    notes = []
    table = sweep(replace(job, data=make_data(tmp_path / "other", "test")), notes.append)
    assert table["split"] == "test"
    assert any("has no split valid: using its split test" in note for note in notes)
    with pytest.raises(DataError, match="has no split train, only test: choose one with --split"):
        sweep(replace(job, data=tmp_path / "other", split="train"), silent)
    with pytest.raises(DataError, match="has no split valid or test, only train: choose one with --split"):
        sweep(replace(job, data=make_data(tmp_path / "third", "train")), silent)


def test_limit_takes_evenly_spaced_images(job):
    assert evenly_spaced(6, 3) == [0, 2, 4]
    assert evenly_spaced(6, 5) == [0, 1, 2, 3, 4]
    assert evenly_spaced(2, 9) == [0, 1]
    table = sweep(replace(job, limit=3, beams=(1,)), silent)
    assert table["images"] == 3
    assert list(read_table(job.out / "run_beams_1.csv").captions) == ["case_0", "case_2", "case_4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": ()}, "needs a number of beams"),
        ({"beams": (0,)}, "num_beams must be a whole number of at least 1"),
        ({"beams": (1, 40)}, "40 beams are too many for a vocabulary"),
        ({"decoding": DecodeOptions(max_new_tokens=500)}, "set --max-new-tokens"),
        ({"metrics": ("rouge9",)}, "unknown metric 'rouge9'"),
        ({"weights": {"bleurt": Path()}}, "--weights bleurt=... is not used by the metrics of this sweep"),
        ({"weights": {"bertscore": Path("nowhere")}}, "not a folder with config.json"),
        ({"image_size": 64}, "has an image size of 32 x 32 px: remove --image-size 64"),
        ({"bundle": None}, "--checkpoint DIR or --bundle DIR"),
        ({"examples": 51}, "--examples must be between 0 and 50, not 51"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"out": Path(__file__)}, "is a file: choose a directory"),
    ],
)
def test_invalid_options_are_refused_before_captioning(job, calls, change, message):
    with pytest.raises(UsageError) as caught:
        sweep(replace(job, **change), silent)
    assert message in str(caught.value)
    assert calls == []


def test_checkpoint_is_exported_once_per_weights(job, tiny_checkpoint, tmp_path, monkeypatch):
    from export import bundle as exporter

    exports, export = [], exporter.export_bundle

    def counted(checkpoint, *given, **more):
        exports.append(checkpoint)
        return export(checkpoint, *given, **more)

    monkeypatch.setattr(exporter, "export_bundle", counted)
    job = replace(job, checkpoint=tiny_checkpoint, bundle=None, beams=(1,))
    first = sweep(job, silent)
    assert sweep(job, silent) == first
    assert exports == [tiny_checkpoint]
    assert first["checkpoint"]["sha256"] == checkpoint_sha256(tiny_checkpoint)
    other = make_checkpoint(tmp_path / "other", seed=1)
    second = sweep(replace(job, checkpoint=other), silent)
    assert exports == [tiny_checkpoint, other]
    assert second["bundle"] != first["bundle"]
    with pytest.raises(UsageError, match="was not exported from"):
        sweep(replace(job, bundle=job.out / "bundle"), silent)


def test_sweep_finds_checkpoints_like_export(tiny_checkpoint, tmp_path, monkeypatch):
    """A hub's id or a .pth file is found or converted by the same function."""
    calls, jobs = [], []
    monkeypatch.setattr("export.checkpoints.find.find_checkpoint", lambda name: calls.append(name) or tiny_checkpoint)
    monkeypatch.setattr("train.sweep.tune.tune", lambda job, *_: jobs.append(job) or {})
    (tmp_path / "tuned.md").write_text("table\n")
    words = ["sweep", "--checkpoint", "owner/name", "--data", tmp_path, "--out", tmp_path, "--tune"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert (calls, [job.checkpoint for job in jobs]) == (["owner/name"], [tiny_checkpoint])


def test_other_files_in_bundle_folder_are_kept(job, tiny_checkpoint):
    (job.out / "bundle").mkdir(parents=True)
    (job.out / "bundle" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not a bundle"):
        sweep(replace(job, checkpoint=tiny_checkpoint, bundle=None), silent)
    assert (job.out / "bundle" / "thesis.txt").read_text() == "mine"


def test_two_sweeps_into_one_directory_are_refused(job):
    refused = []

    def again(note: str) -> None:
        if "captioned in" in note:
            refused.append(True)
            with pytest.raises(EngineError, match="is being written by process"):
                sweep(job, silent)

    sweep(job, again)
    assert refused == [True, True]


def test_equal_captions_share_a_line_in_examples():
    lines = example_lines("a", ("one\x07two",), {1: "x", 3: "y\u2028z\ud800", 4: "x"})
    assert [text for text, _ in lines] == ["a", "reference: one two", "1, 4 beams: x", "3 beams: y z?"]


def test_examples_draw_captions_literally(tmp_path):
    """The dollar signs are not a valid formula. Missing glyphs, control characters and empty captions are drawn."""
    images = []
    for name, picture in zip(("one $", "two"), random_pictures(2), strict=True):
        picture.save(tmp_path / f"{name}.png")
        images.append(ImageFile(name, tmp_path / f"{name}.png"))
    texts = {1: ["costs $\\frac{1}{$ a day", ""], 4: ["\u4e00 \U0001f9e0 $x^$", "long " * 400]}
    runs = {}
    for beams, captions in texts.items():
        runs[beams] = tmp_path / f"{beams}.jsonl"
        lines = [json.dumps({"id": image.id, "caption": text}) for image, text in zip(images, captions, strict=True)]
        runs[beams].write_text("\n".join(lines))
    draw_examples(images, {"one $": ("$_$", "a \x07 bell"), "two": ("plain",)}, runs, tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "examples.png").convert("L"))
    assert 750 < drawn.shape[1] < 1000
    assert 350 < drawn.shape[0] < 600  # the long caption is cut, and its lines fit
    assert (drawn[:, 300:] < 128).sum() > 2000  # there is text next to the images

"""`engine score` and `score compare`: output, files and refused input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engine.cli.app import main
from engine.cli.results import FORMAT_NAMES, PROFILE_NAMES
from engine.errors import UsageError
from engine.scoring.base import Items, Measured
from engine.scoring.files import in_order_of_ids
from engine.scoring.overlap import Rouge1
from engine.scoring.profiles import PROFILES
from engine.scoring.score import ScoreRequest, after_prompt, measure, score_run
from engine.submission import FORMATS
from tests.helpers.worked import CANDIDATES, REFERENCES, WORKED


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [f'{i},"{c}"' for i, c in enumerate(CANDIDATES)]
    (tmp_path / "run.csv").write_text("ID,Caption\n" + "\n".join(rows) + "\n")
    rows = [f"{i},{c},{m}" for i, (c, m) in enumerate(zip(REFERENCES, ("CT", "MR", "XR"), strict=True))]
    (tmp_path / "references.csv").write_text("ID,Caption,Modality\n" + "\n".join(rows) + "\n")
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def score(folder: Path, *more: object) -> Result:
    given = ("--run", folder / "run.csv", "--references", folder / "references.csv", "--out", folder / "scores.json")
    return run("score", *given, *more)


def test_score_writes_numbers_with_signatures(files):
    result = score(files, "--per-image", files / "per_image.csv")
    assert result.exit_code == 0, result.output
    found = json.loads((files / "scores.json").read_text())
    assert found["bleu1"] == pytest.approx(11 / 21, abs=1e-6)
    details = found["details"]
    assert "stemmer:no" in details["scores"]["rouge1"]["signature"]
    assert details["description"]["unique_ratio"] == 1.0
    assert set(details["constant_caption_baseline"]) == {"caption", "rouge1", "bleu1", "cider"}
    header, *rows = (files / "per_image.csv").read_text().splitlines()
    assert re.sub("@[0-9a-f]{8}", "@", header) == "ID,rouge1@,bleu1@,bleu1:0,bleu1:1,bleu1:2,bleu1:3,cider@"
    assert len(rows) == 3


def test_coco_results_against_coco_annotations(files):
    annotations = [{"image_id": 10 + i, "caption": c} for i, c in enumerate(REFERENCES)]
    images = [{"id": 10 + i, "file_name": f"COCO_{i}.jpg"} for i in range(3)]
    (files / "references.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    results = [{"image_id": 10 + i, "caption": c} for i, c in enumerate(CANDIDATES)]
    (files / "run.json").write_text(json.dumps(results))
    given = ("--run", files / "run.json", "--references", files / "references.json", "--out", files / "scores.json")
    result = run("score", *given)
    assert result.exit_code == 0, result.output
    assert json.loads((files / "scores.json").read_text())["bleu1"] == pytest.approx(11 / 21, abs=1e-6)


def test_coco_numbers_are_not_files_of_that_name(files):
    """The files 1.jpg to 12.jpg are numbered in the order of their names: 1, 10, 11, 12, 2."""
    names = sorted(str(number) for number in range(1, 13))
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(names, 1)]
    annotations = [{"image_id": i, "caption": f"a view of {name}"} for i, name in enumerate(names, 1)]
    (files / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (files / "results.json").write_text(json.dumps(annotations))
    (files / "more.json").write_text(json.dumps([*annotations, {"image_id": 13, "caption": "x"}]))
    rows = [f"{name},a view of {name}\n" for name in names]
    (files / "by_name.csv").write_text("ID,Caption\n" + "".join(rows))
    for made in ("results.json", "more.json", "by_name.csv"):
        given = ("--run", files / made, "--references", files / "coco.json", "--out", files / "scores.json")
        assert run("score", *given, "--metrics", "rouge1", "--only-common").exit_code == 0
        assert json.loads((files / "scores.json").read_text())["rouge1"] == 1.0, made
    # without the image of number 2, which is not 2.jpg
    (files / "coco.json").write_text(
        json.dumps({"images": images[:1] + images[2:], "annotations": annotations[:1] + annotations[2:]})
    )
    given = ("--run", files / "results.json", "--references", files / "coco.json", "--out", files / "scores.json")
    assert run("score", *given, "--metrics", "rouge1", "--only-common").exit_code == 0
    assert json.loads((files / "scores.json").read_text())["rouge1"] == 1.0


def test_repeated_keys_of_a_run_are_refused(files):
    (files / "run.json").write_text('{"0": "one cat", "1": "two dogs", "0": "zzz"}')
    result = run("score", "--run", files / "run.json", "--references", files / "references.csv")
    assert result.exit_code == 1
    assert "run.json has the key 0 twice in one object" in result.stderr


def test_a_profile_reports_what_it_cannot_measure(files):
    result = score(files, "--profile", "imageclef2026")
    assert result.exit_code == 0, result.output
    found = json.loads((files / "scores.json").read_text())
    assert list(found)[:3] == ["score", "score_secondary", "overall"]
    assert found["rouge"] > 0
    assert found["bert"] is None
    assert found["score"] is None
    assert "needs weights" in found["details"]["scores"]["bertscore"]["unavailable"]
    assert result.stdout.count("unavailable: needs") == 5


def test_scores_are_broken_down_by_a_column(files):
    names = [f"i{n}" for n in range(12)]
    lines = [f"{n},a caption,{'CT;MR' if i % 2 else 'CT'}" for i, n in enumerate(names)]
    (files / "references.csv").write_text("ID,Caption,Modality\n" + "\n".join(lines) + "\n")
    rows = [f"{n},{'a caption' if i % 2 else 'nothing'}" for i, n in enumerate(names)]
    (files / "run.csv").write_text("ID,Caption\n" + "\n".join(rows) + "\n")
    assert score(files, "--metrics", "rouge1", "--by", "Modality").exit_code == 0
    groups = json.loads((files / "scores.json").read_text())["details"]["groups"]
    assert groups["CT"] == {"images": 12, "rouge1": 0.5}
    assert groups["MR"] == {"images": 6, "rouge1": 1.0}
    result = score(files, "--by", "colour")
    assert result.exit_code == 2
    assert "has no column 'colour': it has Modality" in result.stderr


def test_groups_of_labels_with_other_spellings(files):
    names = [f"i{n}" for n in range(12)]
    for table in ("run", "references"):
        (files / f"{table}.csv").write_text("ID,Caption\n" + "".join(f"{name},a caption\n" for name in names))
    lines = [f"{name}{'.jpg' if i % 2 else ''},{'C1;C2;C1;' if i < 6 else ''}\n" for i, name in enumerate(names)]
    (files / "labels.csv").write_text("ID,concepts\n" + "".join(lines))
    given = ("--metrics", "rouge1", "--by", "concepts", "--labels", files / "labels.csv")
    assert score(files, *given).exit_code == 0
    groups = json.loads((files / "scores.json").read_text())["details"]["groups"]
    assert {name: group["images"] for name, group in groups.items()} == {"C1": 6, "C2": 6, "(none)": 6}
    lines = [f"s{i % 2}/{i // 2}.jpg,{'CT' if i % 2 else 'MR'}\n" for i in range(12)]
    (files / "labels.csv").write_text("file_name,concepts\n" + "".join(lines))
    for table in ("run", "references"):
        rows = [f"{line.partition(',')[0]},a caption\n" for line in lines]
        (files / f"{table}.csv").write_text("file_name,Caption\n" + "".join(rows))
    result = score(files, *given)
    assert result.exit_code == 0, result.output
    groups = json.loads((files / "scores.json").read_text())["details"]["groups"]
    assert {name: group["images"] for name, group in groups.items()} == {"CT": 6, "MR": 6}
    (files / "labels.csv").write_text("file_name,concepts\n" + "".join(lines[1::2]))  # of the images in s1 only
    result = score(files, *given)
    assert result.exit_code == 0, result.output
    groups = json.loads((files / "scores.json").read_text())["details"]["groups"]
    assert {name: group["images"] for name, group in groups.items()} == {"CT": 6, "(none)": 6}


def test_groups_need_one_value_per_image(files):
    lines = [f"{name},a caption,ann{turn}\n" for name in range(3) for turn in (1, 2)]
    (files / "references.csv").write_text("ID,Caption,annotator\n" + "".join(lines))
    result = score(files, "--by", "annotator")
    assert result.exit_code == 1
    assert "the rows of 0 differ in 'annotator': give one value per image with --labels" in result.stderr


def test_group_names_cannot_control_the_terminal(files):
    names = [f"i{n}" for n in range(6)]
    (files / "references.csv").write_text("ID,Caption,kind\n" + "".join(f"{n},a,\x1b[31mred\n" for n in names))
    (files / "run.csv").write_text("ID,Caption\n" + "".join(f"{n},a\n" for n in names))
    result = score(files, "--metrics", "rouge1", "--by", "kind")
    assert result.exit_code == 0
    assert "red (6 images)" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("run_text", "references", "sentence"),
    [
        ("ID,Caption\n0,a\n1,b\n", None, "lacks 1 id"),
        ("ID,Caption\n0,a\n1,b\n2,c\n3,d\n", None, "has 1 id that"),
        ("ID,Caption\n0,a\n0,b\n1,c\n2,d\n", None, "more than one caption for 0"),
        ("ID,Caption\nx,a\n", None, "references of another split?"),
        ("ID#Caption\n0#a\n", None, "is not a table of captions"),
        ("", None, "is not a table of captions"),
        (None, "ID,Caption\n", "holds no captions"),
        (None, "ID,Caption\n0,a,b\n", "line 2: 3 columns"),
    ],
)
def test_mismatching_files_are_refused_in_one_line(run_text, references, sentence, files):
    if run_text is not None:
        (files / "run.csv").write_text(run_text)
    if references is not None:
        (files / "references.csv").write_text(references)
    result = score(files)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert sentence in line
    assert not (files / "scores.json").exists()


def test_unknown_metrics_and_wrong_pairs_are_refused(files):
    assert "unknown metric 'rogue'" in score(files, "--metrics", "rogue").stderr
    assert "--weights takes NAME=..." in score(files, "--weights", "bertscore").stderr
    assert "score needs --run and --references" in run("score").stderr
    assert "--prompt and --keep-prompt: give only one" in score(files, "--prompt", "a", "--keep-prompt").stderr
    assert "only with --images" in score(files, "--high-bit-depth", "scale").stderr
    assert "give clip, scale, or two numbers" in score(files, "--images", files, "--high-bit-depth", "x").stderr
    assert "--weights bert=... is not used by the metrics of this run" in score(files, "--weights", "bert=/").stderr
    assert "--labels needs --by" in score(files, "--labels", files / "references.csv").stderr
    assert "not a folder with config.json" in score(files, "--metrics", "bertscore", "--weights", "bertscore=/").stderr


def test_compare_runs_and_per_image_files(files):
    (files / "better.csv").write_text("ID,Caption\n" + "".join(f'{i},"{c}"\n' for i, c in enumerate(REFERENCES)))
    for name in ("run", "better"):
        given = ("--run", files / f"{name}.csv", "--references", files / "references.csv")
        assert run("score", *given, "--out", files / "x.json", "--per-image", files / f"{name}.pi").exit_code == 0
    kept = run("score", "compare", files / "run.pi", files / "better.pi", "--json")
    runs = run(
        "score", "compare", files / "run.csv", files / "better.csv", "--references", files / "references.csv", "--json"
    )
    assert kept.exit_code == runs.exit_code == 0, kept.output + runs.output
    found, again = json.loads(kept.stdout), json.loads(runs.stdout.splitlines()[-1])
    for name, values in found.items():
        assert values == pytest.approx(again[name], abs=1e-9)
    assert found["rouge1"]["wins"] == 2
    assert found["bleu1"]["difference"] == pytest.approx(1 - 11 / 21, abs=1e-6)
    for name in ("run.pi", "better.pi"):  # as Excel saves it
        (files / name).write_text((files / name).read_text(), encoding="utf-8-sig")
    assert run("score", "compare", files / "run.pi", files / "better.pi", "--json").stdout == kept.stdout
    (files / "better.pi").write_text("ID,rouge1@12345678\n0,1.0\n")
    assert "do not cover the same images" in run("score", "compare", files / "run.pi", files / "better.pi").stderr
    (files / "better.pi").write_text("ID,rouge1@12345678\n0,1.0\n1,1.0\n2,1.0\n")
    assert (
        "share no metric with the same signature"
        in run("score", "compare", files / "run.pi", files / "better.pi").stderr
    )
    assert "is not a file of --per-image" in run("score", "compare", files / "run.pi", files / "better.csv").stderr
    (files / "better.pi").write_text("ID,recall@12345678,recall:0\n0,1.0,2\n1,1.0,2\n2,1.0,2\n")
    assert (
        "has counts of recall, which is not a known corpus metric"
        in run("score", "compare", files / "run.pi", files / "better.pi").stderr
    )


def test_counts_of_corpus_metrics_follow_the_order_of_ids():
    scores = Measured(np.array([1.0, 2.0, 3.0]), 2.0, counts=np.array([[1.0], [2.0], [3.0]]))
    ids, found = in_order_of_ids(["c", "a", "b"], {"bleu1": scores})
    assert ids == ["a", "b", "c"]
    assert found["bleu1"].per_image.tolist() == [2.0, 3.0, 1.0]
    assert found["bleu1"].counts.tolist() == [[2.0], [3.0], [1.0]]


@pytest.mark.parametrize("taken", ["references", "prompts"])
def test_compare_overwrites_no_input(taken, files):
    (files / "better.csv").write_bytes((files / "run.csv").read_bytes())
    (files / "prompts.csv").write_text("ID,prompt\n0,\n1,\n2,\n")
    before = (files / f"{taken}.csv").read_bytes()
    options = ("--references", files / "references.csv", "--prompts", files / "prompts.csv", "--metrics", "rouge1")
    result = run(
        *("score", "compare", files / "run.csv", files / "better.csv", *options),
        *("--changes-out", files / f"{taken}.csv"),
    )
    assert result.exit_code == 2, result.output
    assert (files / f"{taken}.csv").read_bytes() == before


def test_compare_lists_the_captions_that_changed_most(files):
    (files / "a.csv").write_text("ID,Caption\n1,a ct of the chest\n2,a mass\n3,the liver\n")
    (files / "b.csv").write_text("ID,Caption\n3,The liver\n1,an mr of the brain\n2,a large mass\n")
    result = run("score", "compare", files / "a.csv", files / "b.csv", "--changes-out", files / "changes.csv")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "3 of 3 captions differ, mean change 0.267 (1 - F1 of the words); the most changed:",
        "  1  change 0.600",
        "    - a ct of the chest",
        "    + an mr of the brain",
        "  2  change 0.200",
        "    - a mass",
        "    + a large mass",
        "  3  change 0.000",
        "    - the liver",
        "    + The liver",
    ]
    rows = (files / "changes.csv").read_text().splitlines()
    assert rows == [
        "ID,change,first,second",
        "1,0.6000,a ct of the chest,an mr of the brain",
        "2,0.2000,a mass,a large mass",
        "3,0.0000,the liver,The liver",
    ]
    short = run("score", "compare", files / "a.csv", files / "b.csv", "--changed", "0", "--json")
    assert json.loads(short.stdout) == {"captions": {"images": 3, "differ": 3, "mean_change": pytest.approx(0.8 / 3)}}
    (files / "b.csv").write_text("ID,Caption\n1,x\n")
    refused = run("score", "compare", files / "a.csv", files / "b.csv")
    assert refused.exit_code == 1
    assert "do not cover the same images: only in one of them:" in refused.stderr


def test_compare_with_references_shows_scores_of_changed_captions(files):
    rows = "\n".join(f'{i},"{text}"' for i, text in enumerate(REFERENCES))
    (files / "better.csv").write_text(f"ID,Caption\n{rows}\n")
    given = (files / "run.csv", files / "better.csv", "--references", files / "references.csv", "--metrics", "rouge1")
    lines = run("score", "compare", *given).stdout.splitlines()
    assert lines[0].startswith("rouge1 ")
    assert re.fullmatch(r"  \d  change 0\.\d{3}  rouge1 0\.\d{3} -> 1\.000", lines[2])
    for name in ("run", "better"):
        run("score", "--run", files / f"{name}.csv", *given[2:], "--per-image", files / f"{name}.pi")
    kept = run("score", "compare", files / "run.pi", files / "better.pi").stdout.splitlines()
    assert "whose rouge1 changed most" in kept[1]
    assert re.fullmatch(r"  \d  0\.\d{3} -> 1\.000  \+0\.\d{3}", kept[2])
    refused = run("score", "compare", files / "run.pi", files / "better.pi", "--changes-out", files / "x.csv")
    assert "--changes-out needs two runs" in refused.stderr


def test_novelty_is_a_column_of_the_scores(files):
    training = [*CANDIDATES[:1], "something else"]
    (files / "train.csv").write_text("ID,Caption\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(training)))
    given = ("--metrics", "rouge1", "--training-captions", files / "train.csv", "--per-image", files / "pi.csv")
    result = score(files, *given)
    assert result.exit_code == 0, result.output
    assert "1 of 3 captions found whole in one" in result.stdout
    rows = list(csv.DictReader((files / "pi.csv").read_text().splitlines()))
    (column,) = (name for name in rows[0] if name.startswith("novelty@"))
    assert float(rows[0][column]) == 0.0
    assert all(0 < float(row[column]) <= 1 for row in rows[1:])
    (files / "train.tsv").write_text("ID\tfinding\n1\ta mass\n")
    refused = score(files, "--training-captions", files / "train.tsv")
    assert refused.exit_code == 1
    assert "train.tsv has no known column of captions" in refused.stderr
    lacking = score(files, "--metrics", "novelty")
    assert "needs the training captions: --training-captions FILE" in lacking.stderr


def test_scores_without_images_that_have_a_twin(files):
    (files / "twins.csv").write_text(
        "ID,twin,kind,distance,group\n0,t,copy,0.00010,1\n0,u,near,0.02,\n1,u,near,0.02,\n"
    )
    result = score(files, "--metrics", "rouge1,bleu1", "--exclude-duplicates", files / "twins.csv")
    assert result.exit_code == 0, result.output
    assert "without the 1 image with a twin, 2 images (1 with only near images are among them):" in result.stdout
    found = json.loads((files / "scores.json").read_text())["details"]["without_twins"]
    (files / "rest.csv").write_text("ID,Caption\n" + "".join(f'{i},"{CANDIDATES[i]}"\n' for i in (1, 2)))
    given = ("--run", files / "rest.csv", "--references", files / "references.csv", "--only-common")
    assert run("score", *given, "--metrics", "rouge1,bleu1", "--out", files / "rest.json").exit_code == 0
    rest = json.loads((files / "rest.json").read_text())
    assert found["images"] == 2
    for name in ("rouge1", "bleu1"):
        assert found["scores"][name][0] == pytest.approx(rest[name])
    for rows, message in (
        ("0,t,copy,0,1\n1,t,copy,0,1\n2,t,copy,0,1\n", "every image of"),
        ("9,t,copy,0,1\n", "has no id of"),
        ("0,t,twin,0,1\n", "line 2: unknown kind 'twin'"),
    ):
        (files / "twins.csv").write_text("ID,twin,kind,distance,group\n" + rows)
        assert message in score(files, "--exclude-duplicates", files / "twins.csv").stderr
    assert "lacks the columns ID and kind" in score(files, "--exclude-duplicates", files / "run.csv").stderr


def test_options_without_effect_are_refused(files):
    assert score(files, "--per-image", files / "run.pi").exit_code == 0
    for arguments, message in (
        (["score", "compare", "run.pi", "run.pi", "--metrics", "bleu1"], "--metrics: only with --references"),
        (["score", "compare", "run.pi", "run.pi", "--weights", "bertscore=/x"], "--weights: only with --references"),
        (
            ["score", "--metrics", "bleu1", "compare", "run.pi", "run.pi"],
            "--metrics: give the options of `score compare`",
        ),
        (
            ["rerank", "--n-best", "run.jsonl", "--out", "x.csv", "--weights", "bertscore=/x"],
            "is not used by the metrics of this run",
        ),
    ):
        result = run(*(files / word if word.startswith(("run.", "x.")) else word for word in arguments))
        assert result.exit_code != 0
        assert message in result.stderr


def test_the_command_line_offers_every_profile_and_format():
    assert set(PROFILE_NAMES) == set(PROFILES)
    assert set(FORMAT_NAMES) == set(FORMATS)


def test_per_image_values_are_read_back_exactly(files):
    from engine.scoring.files import read_per_image

    score(files, "--per-image", files / "per_image.csv")
    ids, measured = read_per_image(files / "per_image.csv")
    assert ids == ["0", "1", "2"]
    rouge, bleu, _ = measured.values()
    np.testing.assert_array_equal(rouge.per_image, Rouge1().measure(WORKED).per_image)
    assert isinstance(bleu, Measured)
    assert bleu.value == pytest.approx(11 / 21, abs=1e-9)


def test_scores_are_printed_without_a_file(files):
    result = run("score", "--run", files / "run.csv", "--references", files / "references.csv")
    assert result.exit_code == 0, result.output
    assert "rouge1:F|stemmer:no" in result.stdout
    assert sorted(path.name for path in files.iterdir()) == ["references.csv", "run.csv"]


def test_no_available_metric_fails(files):
    result = score(files, "--metrics", "clipscore,bleurt", "--per-image", files / "per_image.csv")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(
        "error: nothing was scored: none of the metrics (clipscore, bleurt) is available"
    )
    assert not (files / "scores.json").exists()
    assert not (files / "per_image.csv").exists()
    compared = run(
        *("score", "compare", files / "run.csv", files / "run.csv", "--references", files / "references.csv"),
        *("--metrics", "clipscore"),
    )
    assert compared.exit_code == 1
    assert "nothing was scored" in compared.stderr


def test_per_image_value_that_is_not_a_number_is_refused(files):
    (files / "a.csv").write_text("ID,rouge1@12345678\n0,1.0\n1,nan\n")
    result = run("score", "compare", files / "a.csv", files / "a.csv")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "1 has a value that is not a number" in line


def test_a_metric_without_a_number_is_unavailable():
    class NotANumber(Rouge1):
        def measure(self, _: Items) -> Measured:
            return Measured(np.array([0.5, np.nan, 0.5]), 0.5)

    (found,), _ = measure({"x": NotANumber()}, WORKED, lambda _: None)
    assert found.unavailable == "returned no finite number for 1"


def test_only_common_ids_are_scored(files):
    (files / "run.csv").write_text(f"ID,Caption\n2,{CANDIDATES[2]}\n1,{CANDIDATES[1]}\nelse,x\n")
    result = score(files)
    assert result.exit_code == 1
    assert result.stderr.endswith("lacks 1 id of " + f"{files / 'references.csv'}: 0; " + ONLY_COMMON)
    result = score(files, "--only-common", "--metrics", "rouge1")
    assert result.exit_code == 0, result.output
    found = json.loads((files / "scores.json").read_text())
    assert found["details"]["description"]["images"] == 2
    assert found["details"]["scores"]["rouge1"]["signature"].endswith("|only-common:2 of 3 references")
    assert found["rouge1"] == pytest.approx(Rouge1().measure(WORKED).per_image[1:].mean())
    assert "only the 2 ids that both files have are scored" in result.stdout


def test_only_common_changes_nothing_if_ids_agree(files):
    assert score(files, "--only-common").exit_code == 0
    details = json.loads((files / "scores.json").read_text())["details"]
    assert details["notes"] == []
    assert "only-common" not in details["scores"]["rouge1"]["signature"]


ONLY_COMMON = "give --only-common to score the ids that both files have\n"


# Prompts


def prompted(files: Path, *captions: str, prompt: str = "T2 Axial", where: str = "references") -> None:
    """Write captions, "mass" as every reference, and a prompt in one of the two tables."""
    lines = {"references": ["mass"] * len(captions), "run": list(captions)}
    for name, texts in lines.items():
        more = (",prompt", f',"{prompt}"') if name == where else ("", "")
        rows = [f'{i},"{text}"{more[1]}' for i, text in enumerate(texts)]
        (files / f"{name}.csv").write_text("\n".join([f"ID,Caption{more[0]}", *rows]) + "\n")


def rouge1(files: Path) -> tuple[float, str, list[str]]:
    details = json.loads((files / "scores.json").read_text())["details"]
    return details["scores"]["rouge1"]["value"], details["scores"]["rouge1"]["signature"], details["notes"]


@pytest.mark.parametrize("where", ["references", "run"])
def test_text_after_the_prompt_is_scored(where, files):
    prompted(files, "t2 axial mass", "t2  axial mass", "", where=where)
    assert score(files, "--metrics", "rouge1").exit_code == 0
    value, signature, (note,) = rouge1(files)
    assert value == pytest.approx(2 / 3)
    assert signature.endswith("|prompt:removed")
    assert note.startswith("2 captions begin with their prompt")
    assert score(files, "--metrics", "rouge1", "--keep-prompt").exit_code == 0
    value, signature, (note,) = rouge1(files)
    assert value == pytest.approx(1 / 3)
    assert "prompt" not in signature
    assert "--keep-prompt" in note


def test_prompts_of_a_table_or_the_command_line_override_columns(files):
    prompted(files, "an mri of mass", "an mri of mass", prompt="something else")
    (files / "prompts.csv").write_text("ID,prompt\n0,an MRI of\n1,an MRI of\n")
    for given in (("--prompts", files / "prompts.csv"), ("--prompt", "an MRI of")):
        assert score(files, "--metrics", "rouge1", *given).exit_code == 0
        assert rouge1(files)[0] == 1.0
    assert score(files, "--metrics", "rouge1").exit_code == 0
    value, signature, (note,) = rouge1(files)
    assert value == pytest.approx(0.4)
    assert "prompt" not in signature
    assert note.startswith("no caption begins with its prompt")


def test_run_with_only_some_prompts_is_refused(files):
    prompted(files, "t2 axial mass", "mass")
    result = score(files)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "1 caption begins with its prompt" in line
    assert "1 does not (1): give the run's prompts with --prompts, or --keep-prompt" in line


def test_compared_runs_are_scored_without_prompts(files):
    prompted(files, "t2 axial mass", "t2 axial nodule")
    (files / "other.csv").write_text("ID,Caption\n0,mass\n1,mass\n")
    given = ("score", "compare", files / "run.csv", files / "other.csv", "--references", files / "references.csv")
    assert "0.5000 -> 1.0000" in run(*given, "--metrics", "rouge1").stdout
    assert "0.2500 -> 1.0000" in run(*given, "--metrics", "rouge1", "--keep-prompt").stdout


def test_common_start_of_all_captions_is_noted(files):
    captions = [f"a picture of {word}" for word in ("mass", "ct", "mri", "nodule", "mass")]
    prompted(files, *captions, where="nowhere")
    assert score(files, "--metrics", "rouge1").exit_code == 0
    assert "all captions begin with 'a picture of'" in rouge1(files)[2][0]
    (files / "references.csv").write_text((files / "run.csv").read_text())
    assert score(files, "--metrics", "rouge1").exit_code == 0
    assert rouge1(files)[2] == []


@pytest.mark.parametrize(
    ("caption", "prompt", "rest"),
    [
        ("t2 - weighted image", "T2-weighted", "image"),
        ("t2-weighted image", "t2 - weighted ", "image"),
        ("cafe mass", "Caf\u00e9", "mass"),
        ("mass", "mass", ""),
        ("mass", "mass of", None),
        ("a mass", "mass", None),
    ],
)
def test_prompt_is_found_despite_tokenization(caption, prompt, rest):
    assert after_prompt(caption, prompt) == rest


# Failing metrics


class Failing:
    """A metric whose library fails."""

    def __init__(self, error: Exception) -> None:
        self.name, self._error = "failing", error

    def signature(self) -> str:
        return "failing"

    def measure(self, _: Items):
        raise self._error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OverflowError("int too big to convert\nmore"), "failed with OverflowError: int too big to convert"),
        (IndexError(), "failed with IndexError"),
        (MemoryError("no room"), "failed with MemoryError: no room"),
        (UsageError("--weights x: not a folder"), "--weights x: not a folder"),
    ],
)
def test_failing_metric_does_not_affect_the_others(error, reason):
    lines = []
    scores, measured = measure({"failing": Failing(error), "rouge1": Rouge1()}, WORKED, lines.append)
    assert [score.unavailable for score in scores] == [reason, ""]
    assert list(measured) == ["rouge1"]
    assert lines[0] == f"failing: unavailable: {reason}"


def test_empty_references_are_counted(tmp_path):
    (tmp_path / "run.csv").write_text("ID,Caption\na,x\nb,\n")
    (tmp_path / "references.csv").write_text("ID,Caption\na,\nb,\n")
    report = score_run(ScoreRequest(tmp_path / "run.csv", tmp_path / "references.csv", metrics=("rouge1",)), print)
    assert report.notes == ["2 references are empty: most metrics score an empty caption 1 there, any other 0"]
    assert report.scores[0].value == 0.5

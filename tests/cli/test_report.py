"""`engine report` without a browser: what is read, said, written and refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from engine.attention import write_attention
from engine.captions import Attention
from engine.cli.app import main
from engine.files.lock import OutputLock
from engine.report.gather import Column, ScoreColumn, coverage_curves
from engine.run.outputs import write_run
from engine.scoring.base import Measured
from tests.helpers.tiny import random_pictures

IDS = ["a", "b", "c"]
CAPTIONS = ["a chest film", "</script><script>alert(1)</script>", "<!--<script> & \u2028 é"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, picture in zip(IDS, random_pictures(3), strict=True):
        picture.save(tmp_path / "images" / f"{name}.png")
    write_run(tmp_path / "run.csv", zip(IDS, CAPTIONS, strict=True))
    return tmp_path


def report(work: Path, *flags: str, **options: object) -> Result:
    given = {"run": work / "run.csv", "images": work / "images", "out": work / "report"} | options
    several = [(name, one) for name, value in given.items() for one in (value if isinstance(value, list) else [value])]
    words = [word for name, value in several for word in (f"--{name.replace('_', '-')}", str(value))]
    return CliRunner().invoke(main, ["report", *flags, *words])


def page_data(work: Path) -> dict:
    page = (work / "report" / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def thumbnails(work: Path) -> set[str]:
    return set(os.listdir(work / "report" / "thumbnails"))


def test_captions_cannot_break_out_of_their_data_block(work):
    result = report(work)
    assert result.exit_code == 0, result.output
    page = (work / "report" / "index.html").read_text()
    assert page_data(work)["captions"] == [[" ".join(text.split("\u2028")) for text in CAPTIONS]]
    assert "alert(1)</script>" not in page
    assert page.count("<script>") == page.count("'sha256-", page.index("script-src")) == page.count("</script>") - 1


def test_page_loads_only_its_thumbnails(work):
    report(work)
    page = (work / "report" / "index.html").read_text()
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'; img-src 'self' file:;" in policy
    assert "unsafe" not in policy
    assert not re.search(r'(src|href)="(?!#)', page)
    assert set(page_data(work)["pictures"]) == thumbnails(work)


def test_thumbnails_are_made_once_and_again_when_an_image_changes(work):
    assert "3 new thumbnails" in report(work).stderr
    before = thumbnails(work)
    assert "0 new thumbnails" in report(work).stderr
    next(iter(random_pictures(1))).rotate(90).save(work / "images" / "b.png")
    os.utime(work / "images" / "b.png", ns=(1, 1))
    assert "1 new thumbnail" in report(work).stderr
    assert len(before & thumbnails(work)) == 2
    assert len(thumbnails(work)) == 3


@pytest.mark.parametrize("mode", ["CMYK", "P", "LA", "I;16", "1", "RGBA"])
def test_pictures_of_every_mode_become_small_rgb_ones(mode, work):
    picture = Image.new("L", (700, 300), 90).convert("L" if mode == "I;16" else mode).convert(mode)
    picture.save(work / "images" / "b.tiff")
    (work / "images" / "b.png").unlink()
    assert report(work, thumbnail_px=64).exit_code == 0
    with Image.open(work / "report" / "thumbnails" / page_data(work)["pictures"][1]) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (64, 27))
    assert "3 new thumbnails" in report(work, thumbnail_px=128).stderr
    assert len(thumbnails(work)) == 3


def test_missing_ids_are_reported_in_one_line_and_on_the_page(work):
    write_run(work / "references.csv", [("a", "a chest film"), ("c", "an x-ray"), ("z", "no such image")])
    (work / "images" / "b.png").unlink()
    (work / "scores.csv").write_text("ID,rouge1@12345678\na,1.0\nb,0.5\n")
    (work / "run.jsonl").write_text('{"id": "a", "hypotheses": [{"text": "a chest film", "sum_log_prob": -1.0}]}\n')
    result = report(work, references=work / "references.csv", scores=work / "scores.csv", n_best=work / "run.jsonl")
    assert result.exit_code == 0, result.output
    for line in (
        f"{work}/references.csv lacks 1 of 3 ids of {work}/run.csv: b",
        f"{work}/references.csv has 1 id that {work}/run.csv lacks, not shown: z",
        f"{work}/scores.csv lacks 1 of 3 ids of {work}/run.csv: c",
        f"{work}/run.jsonl lacks 2 of 3 ids of {work}/run.csv: b, c",
        f"{work}/images lacks 1 of 3 ids of {work}/run.csv: b",
    ):
        assert line in result.stderr.splitlines()
        assert line in page_data(work)["notes"]
    assert page_data(work)["scores"][0]["values"] == [1.0, 0.5, None]


def n_best_line(name: str, **keys: object) -> str:
    return json.dumps({"id": name, "hypotheses": [{"text": name, "sum_log_prob": -1.0}]} | keys) + "\n"


def test_expected_scores_are_columns_with_a_curve(work):
    sure = {"a": (0.5, False, 0.9), "b": (0.2, True, 0.8), "c": (0.5, False, 0.95)}
    (work / "run.jsonl").write_text(
        "".join(
            n_best_line(
                name, expected_score=expected, review=review, confidence={"mean_token_prob": prob, "margin": None}
            )
            for name, (expected, review, prob) in sure.items()
        )
    )
    (work / "scores.csv").write_text(
        "ID,rouge1@1,bleu1@1,bleu1:0,bleu1:1,bleu1:2,bleu1:3\na,0.75,0,0,1,1,1\nb,0,0,0,1,1,1\nc,1,0,0,1,1,1\n"
    )
    result = report(work, n_best=work / "run.jsonl", scores=work / "scores.csv")
    assert result.exit_code == 0, result.output
    data = page_data(work)
    columns = {column["name"]: column["values"] for column in data["columns"] if column["source"] == "n-best"}
    assert columns == {
        "expected_score": [0.5, 0.2, 0.5],
        "review": ["no", "yes", "no"],
        "mean_token_prob": [0.9, 0.8, 0.95],
    }
    (curve,) = data["curves"]  # BLEU is not a mean over images
    assert curve["name"] == "rouge1"
    # c before a, whose expected score is equal but whose tokens are less likely
    assert [curve["values"][k] for k in (0, 12, 19)] == [1.0, 0.875, pytest.approx(1.75 / 3, abs=1e-6)]
    (work / "run.jsonl").write_text("".join(map(n_best_line, sure)))
    assert report(work, n_best=work / "run.jsonl", scores=work / "scores.csv").exit_code == 0
    assert page_data(work)["curves"] == page_data(work)["columns"] == []


def test_pictures_that_coco_numbers_are_found_by_their_files(work):
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(IDS)]
    notes = [{"image_id": i, "caption": name.upper()} for i, name in enumerate(IDS)]
    (work / "references.json").write_text(json.dumps({"images": images, "annotations": notes}))
    write_run(work / "run.csv", [("0", "zero"), ("1", "one"), ("2", "two")])
    assert report(work, references=work / "references.json").exit_code == 0
    assert page_data(work)["ids"] == IDS
    assert page_data(work)["references"] == [["A"], ["B"], ["C"]]


def test_unreadable_images_are_listed_with_placeholders(work):
    (work / "images" / "b.png").write_bytes(b"")
    (work / "images" / "c.png").unlink()
    os.mkfifo(work / "pipe")
    (work / "images" / "c.png").symlink_to(work / "pipe")
    result = report(work)
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if "cannot be read" in line]
    assert line.startswith(
        "2 images cannot be read, shown as a placeholder: b.png (empty file: copy or download it again), c"
    )
    assert page_data(work)["pictures"][1:] == [None, None]
    assert set(page_data(work)["unreadable"]) == {"1", "2"}


def test_two_runs_are_compared_by_the_scores_measured_in_one_way(work):
    write_run(work / "other.csv", [("a", "a film"), ("b", "b"), ("c", "c")])
    (work / "scores.csv").write_text("ID,rouge1@11111111,bleurt@1\na,1.0,0\nb,0.5,0\nc,0.2,0\n")
    (work / "others.csv").write_text("ID,rouge1@11111111,bleurt@2\nc,0.7,0\na,0.5,0\nb,0.5,0\n")
    scores = {"scores": work / "scores.csv", "against_scores": work / "others.csv"}
    result = report(work, against=work / "other.csv", **scores)
    assert result.exit_code == 0, result.output
    assert "bleurt: not compared, because the two files of scores differ in the signature" in result.stderr
    (one,) = page_data(work)["comparisons"]
    assert (one["name"], one["images"], one["found"]["wins"], one["found"]["losses"]) == ("rouge1", 3, 1, 1)
    assert one["found"]["difference"] == pytest.approx(0.0)
    assert page_data(work)["labels"] == ["run", "other"]


def test_runs_with_equal_names_are_named_by_their_folders(work):
    (work / "old").mkdir()
    write_run(work / "old" / "run.csv", zip(IDS, IDS, strict=True))
    assert report(work, against=work / "old" / "run.csv").exit_code == 0
    assert page_data(work)["labels"] == [f"{work.name}/run", "old/run"]


def test_further_columns_are_kept_and_numbers_are_known_as_such(work):
    (work / "run.csv").write_text("ID,Caption,latency_s,modality\na,x,0.5,CT\nb,y,1,\nc,z,,MR\n")
    report(work)
    columns = {column["name"]: column for column in page_data(work)["columns"]}
    assert columns["latency_s"]["values"] == [0.5, 1.0, None]
    assert columns["modality"]["values"] == ["CT", "", "MR"]


def test_columns_of_other_files_are_shown(work):
    (work / "timings.csv").write_text("ID,latency_s\na,0.5\nb,\nq,1\n")
    (work / "facts.csv").write_text("file_name,modality,run\na.png,CT,1\nb.png,MR,2\nc.png,MR,3\n")
    result = report(work, columns=[work / "timings.csv", work / "facts.csv"])
    assert result.exit_code == 0, result.output
    assert "timings.csv lacks 1 of 3 ids" in result.stderr
    assert "timings.csv has 1 id that" in result.stderr
    columns = {(column["source"], column["name"]): column for column in page_data(work)["columns"]}
    assert columns["timings", "latency_s"]["values"] == [0.5, None, None]
    assert columns["facts", "modality"]["values"] == ["CT", "MR", "MR"]
    assert columns["facts", "run"]["is_number"]
    assert re.search(r"\|columns_1:[0-9a-f]{12}\|columns_2:[0-9a-f]{12}\|", page_data(work)["signature"])


def test_files_of_a_run_with_file_names_as_ids(work):
    """As `engine caption --ids path` writes them: names with folders, here also with suffixes."""
    names = [f"s1/{name}.png" for name in IDS]
    (work / "images/s1").mkdir()
    (work / "maps/s1").mkdir(parents=True)
    for name in IDS:
        (work / f"images/{name}.png").rename(work / f"images/s1/{name}.png")
    write_run(work / "run.csv", zip(names, CAPTIONS, strict=True))
    (work / "timings.csv").write_text("ID,latency_s\n" + "".join(f"{name},0.5\n" for name in names))
    lines = [{"id": name, "hypotheses": [{"text": "x", "sum_log_prob": -1}]} for name in names]
    (work / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attention = Attention((7, 3), np.full((2, 2, 2), 0.25, np.float16), ("film",), (0, -1), (0,))
    for name in names:
        write_attention(work / f"maps/{name}.npz", attention)
    given = {"columns": "timings.csv", "n_best": "run.jsonl", "attention": "maps"}
    result = report(work, "--recursive", **{option: work / name for option, name in given.items()})
    assert result.exit_code == 0, result.output
    data = page_data(work)
    assert next(column for column in data["columns"] if column["name"] == "latency_s")["values"] == [0.5] * 3
    assert [texts[0][0] for texts in data["candidates"]] == ["x"] * 3


def test_coco_numbers_are_known_by_the_references_of_all_files(work):
    numbers = dict(enumerate(IDS, 1))
    annotations = [{"image_id": number, "caption": name} for number, name in numbers.items()]
    files = [{"id": number, "file_name": f"{name}.png"} for number, name in numbers.items()]
    (work / "coco.json").write_text(json.dumps({"images": files, "annotations": annotations}))
    for name in ("run.json", "other.json"):
        (work / name).write_text(json.dumps(annotations))
    lines = [
        {"id": str(number), "hypotheses": [{"text": name, "sum_log_prob": -1}]} for number, name in numbers.items()
    ]
    (work / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (work / "facts.csv").write_text("image_id|modality\n1|CT\n2|MR, 3 T\n3|\n")
    given = {"references": "coco.json", "against": "other.json", "n_best": "run.jsonl", "columns": "facts.csv"}
    result = report(work, run=work / "run.json", **{option: work / name for option, name in given.items()})
    assert result.exit_code == 0, result.output
    data = page_data(work)
    assert data["ids"] == IDS
    assert data["captions"] == [IDS, IDS]
    assert [[text for text, _ in several] for several in data["candidates"]] == [[name] for name in IDS]
    assert data["columns"][0]["values"] == ["CT", "MR, 3 T", ""]


def test_values_that_only_look_like_numbers_are_unchanged(work):
    (work / "facts.tsv").write_text(
        "ID\tdate\tcode\tuid\tshare\na\t20240131\t00012\t12345678901234567\t1e-3\n"
        "b\t20240229\t7\t1\t-.5\nc\t20240301\t8\t2\t2.\n"
    )
    assert report(work, columns=work / "facts.tsv").exit_code == 0
    columns = {column["name"]: column for column in page_data(work)["columns"]}
    assert columns["date"]["values"] == [20240131, 20240229, 20240301]
    assert columns["code"]["values"] == ["00012", "7", "8"]
    assert columns["uid"]["values"] == ["12345678901234567", "1", "2"]
    assert columns["share"]["values"] == [0.001, -0.5, 2.0]


def test_the_signature_changes_with_every_file_shown(work):
    first = report(work).stderr.splitlines()
    write_run(work / "run.csv", [("a", "another caption"), ("b", "b"), ("c", "c")])
    second = report(work).stderr.splitlines()
    (one,), (other,) = ([line for line in lines if line.startswith("engine:")] for lines in (first, second))
    assert re.fullmatch(r"engine:[^|]+\|report:\d+\|run:[0-9a-f]{12}\|images:3", one)
    assert one != other
    assert page_data(work)["signature"] == other


@pytest.mark.parametrize(
    ("options", "exit_code", "sentence"),
    [
        ({"images": "{tmp}/nowhere"}, 2, "nowhere is not a directory: --images takes"),
        ({"run": "{tmp}/nowhere.csv"}, 2, "nowhere.csv cannot be read"),
        ({"out": "{tmp}/images"}, 2, "contains other files: name a new folder"),
        ({"out": "{tmp}/run.csv"}, 2, "is a file: name a folder"),
        ({"out": "{tmp}/no/report"}, 2, "no does not exist, create it first"),
        ({"references": "{tmp}/strangers.csv"}, 1, "have no id in common (a against q)"),
        ({"scores": "{tmp}/run.csv"}, 1, "is not a file of --per-image"),
        ({"n_best": "{tmp}/run.csv"}, 1, "run.csv, line 1: not a line of --n-best-out"),
        ({"columns": "{tmp}/strangers.csv"}, 1, "have no id in common (a against q)"),
        ({"columns": "{tmp}/ragged.csv"}, 1, "ragged.csv, line 3: 3 columns, but the header has 2"),
        ({"columns": "{tmp}/twice.csv"}, 1, "twice.csv, line 3: id a is repeated"),
        ({"columns": "{tmp}/ids.csv"}, 1, "ids.csv has only an id column"),
        ({"against_scores": "{tmp}/run.csv"}, 2, "--against-scores needs --against"),
    ],
)
def test_wrong_inputs_give_one_error_line_and_no_page(options, exit_code, sentence, work):
    write_run(work / "strangers.csv", [("q", "a caption")])
    (work / "ragged.csv").write_text("ID,latency_s\na,1\nb,1,2\n")
    (work / "twice.csv").write_text("ID,latency_s\na,1\na,2\n")
    (work / "ids.csv").write_text("ID\na\n")
    kept = sorted(os.listdir(work / "images"))
    result = report(work, **{name: value.format(tmp=work) for name, value in options.items()})
    assert result.exit_code == exit_code
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (work / "report").exists()
    assert sorted(os.listdir(work / "images")) == kept


def test_scores_that_are_not_numbers_get_one_line(work):
    for name in ("scores.csv", "other.csv"):
        (work / name).write_text("ID,rouge1@12345678\na,0.5\nb,nan\nc,1.0\n")
    write_run(work / "other_run.csv", zip(IDS, CAPTIONS, strict=True))
    given = {"scores": work / "scores.csv", "against": work / "other_run.csv", "against_scores": work / "other.csv"}
    result = report(work, **given)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "scores.csv is not a file of --per-image: b has a value that is not a number" in line


def test_failed_report_keeps_the_earlier_page(work, monkeypatch):
    report(work)
    page = (work / "report" / "index.html").read_bytes()
    shown = set(page_data(work)["pictures"])
    next(iter(random_pictures(1))).save(work / "images" / "a.png")
    os.utime(work / "images" / "a.png", ns=(1, 1))

    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.report.build.render", fail)
    assert report(work).exit_code == 1
    assert (work / "report" / "index.html").read_bytes() == page
    assert shown <= thumbnails(work)
    monkeypatch.undo()
    assert report(work).exit_code == 0
    assert thumbnails(work) == set(page_data(work)["pictures"]) != shown


def test_two_reports_are_not_written_into_one_folder_at_once(work):
    report(work)
    with OutputLock(work / "report" / "index.html"):
        result = report(work)
    assert result.exit_code == 2
    assert "index.html is being written by process" in result.stderr
    assert report(work).exit_code == 0


def test_report_resumes_in_an_unfinished_folder(work):
    report(work)
    (work / "report" / "index.html").unlink()
    (work / "report" / "thumbnails" / ("." + "0" * 24 + ".jpg.tmp")).write_bytes(b"half")
    (work / "report" / "thumbnails" / "mine.jpg").write_bytes(b"not ours")
    assert "0 new thumbnails" in report(work).stderr
    assert (work / "report" / "index.html").exists()
    assert thumbnails(work) == {*page_data(work)["pictures"], "mine.jpg"}


def test_thumbnails_of_equal_names_sizes_and_times_are_not_shared(work):
    for folder, shade in (("s1", "red"), ("s2", "blue")):
        (work / "images" / folder).mkdir()
        path = work / "images" / folder / "7.bmp"
        Image.new("RGB", (16, 16), shade).save(path)
        os.utime(path, (1, 1))
    (work / "run.csv").write_text("ID,Caption\ns1/7,red\ns2/7,blue\n")
    options = ["--run", work / "run.csv", "--images", work / "images", "--recursive", "--out", work / "report"]
    assert CliRunner().invoke(main, ["report", *map(str, options)]).exit_code == 0
    assert len(thumbnails(work)) == 2


def test_surest_captions_have_the_largest_score():
    """Among equal ones the mean token probability decides."""
    columns = [
        Column(name, "n-best", values, is_number=True)
        for name, values in (("mean_token_prob", [0.9, 0.1, 0.2, 0.8]), ("expected_score", [0.5, 0.9, 0.9, 0.1]))
    ]
    measured = Measured(np.array([10.0, 20.0, 30.0, 80.0]), 35.0)
    ((_, curve),) = coverage_curves([ScoreColumn("x", "", 0, np.arange(4), measured, 0.0, 0.0)], columns)
    found = dict(zip(curve.shares.round(2).tolist(), curve.values.tolist(), strict=True))
    assert [found[share] for share in (0.25, 0.5, 0.75, 1.0)] == [30.0, 25.0, 20.0, 35.0]

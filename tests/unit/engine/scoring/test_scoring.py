"""Metrics against worked values, against the libraries they come from, and against each other."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engine.cli.app import main
from engine.cli.scoring import PROFILE_NAMES
from engine.cli.submission import FORMAT_NAMES
from engine.errors import DataError, EngineError, UsageError
from engine.scoring import bootstrap
from engine.scoring.base import Items, Measured, MetricInputs, UnavailableError, mean
from engine.scoring.clip import clip_scores, harmonic
from engine.scoring.describe import constant_caption, describe
from engine.scoring.overlap import Bleu1, Cider, Rouge1
from engine.scoring.plugin import Plugin
from engine.scoring.preprocess import preprocess
from engine.scoring.profiles import PROFILES, make_metric, organisers_names
from engine.scoring.score import ScoreRequest, measure, score_run
from engine.submission.formats import FORMATS

REFERENCES = [
    "computed tomography ct shows floating thrombosis white arrow",
    "early sagittal tnumberweighted mri",
    "chest xray showing cardiomegaly",
]
CANDIDATES = [
    "contrastenhanced computed tomography image of the aortic arch white arrow",
    "sagittal tnumberweighted mri of the thoracic spine",
    "chest xray showing cardiomegaly",
]


def items(candidates: list[str], references: list) -> Items:
    several = [reference if isinstance(reference, tuple) else (reference,) for reference in references]
    return Items([str(i) for i in range(len(candidates))], candidates, several)


WORKED = items(CANDIDATES, REFERENCES)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("CT: 3 mm nodule (arrow), T2-weighted.", "ct number mm nodule arrow tnumberweighted"),
        ("Size 3.5 × 2.1 cm (L3–L4).", "size numbernumber × numbernumber cm lnumber–lnumber"),
        ("contrast - enhanced image ( white arrow ).", "contrast  enhanced image  white arrow "),
        ("...", ""),
        ("12", "number"),
        ("A\tB\nC  D", "a\tb\nc  d"),
    ],
)
def test_preprocessing_is_the_organisers(raw, expected):
    assert preprocess(raw) == expected


def test_bleu_1_of_the_run_and_of_its_images():
    measured = Bleu1().measure(WORKED)
    assert measured.value == pytest.approx(11 / 21, abs=1e-6)
    assert measured.per_image.mean() == pytest.approx(0.609524, abs=1e-6)
    assert "0.609524" in measured.note
    assert measured.combine(measured.counts.sum(0)) == pytest.approx(measured.value, abs=1e-9)


def test_cider_by_image():
    np.testing.assert_allclose(Cider().measure(WORKED).per_image, [1.653513, 2.988529, 10.0], atol=1e-6)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("sagittal t2 - weighted mri of the thoracic spine.", "Early sagittal T2-weighted MRI.", 1 / 3),
        ("sagittal t2-weighted mri of the thoracic spine.", "Early sagittal T2-weighted MRI.", 6 / 11),
        ("CT shows 35 cm mass", "CT shows 3.5 cm mass", 0.8),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_1(candidate, reference, expected):
    assert Rouge1().measure(items([candidate], [reference])).value == pytest.approx(expected, abs=1e-6)


def test_the_best_of_several_references_counts():
    assert Rouge1().measure(items(["a b"], [("c d", "a b")])).value == 1.0


def test_clipscore_and_refclipscore():
    image, text = np.array([[1.0, 0.0]]), np.array([[0.33, np.sqrt(1 - 0.33**2)]])
    score = clip_scores(image, text)
    assert score[0] == pytest.approx(0.825, abs=1e-6)
    assert harmonic(score, np.array([0.8]))[0] == pytest.approx(0.812308, abs=1e-6)
    assert clip_scores(image, -text)[0] == 0.0
    assert harmonic(np.zeros(1), np.zeros(1))[0] == 0.0


def test_the_averages_of_2026():
    values = dict(
        zip(
            ("bertscore", "rouge1", "similarity", "bleurt", "umls_f1", "alignscore"),
            (0.6250, 0.3234, 1.0104, 0.3555, 0.2160, 0.1287),
            strict=True,
        )
    )
    found = organisers_names(PROFILES["imageclef2026"], values)
    assert list(found) == [
        "score",
        "score_secondary",
        "overall",
        "bert",
        "rouge",
        "similarity",
        "bleurt",
        "medcat",
        "align",
    ]
    assert found["score"] == pytest.approx(0.5786, abs=5e-5)
    assert found["score_secondary"] == pytest.approx(0.1724, abs=5e-5)
    assert found["overall"] == pytest.approx(0.3755, abs=5e-5)
    without = organisers_names(PROFILES["imageclef2026"], values | {"bleurt": None})
    assert without["score"] is None
    assert without["overall"] is None
    assert without["score_secondary"] is not None


WORDS = [
    "ct",
    "mri",
    "of",
    "the",
    "chest",
    "showing",
    "mass",
    "in",
    "left",
    "lobe",
    "arrow",
    "t2-weighted",
    "3.5",
    "(white)",
]


def generated(count: int, seed: int = 0) -> Items:
    chance = random.Random(seed)

    def caption() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, 25)))

    references = [caption() for _ in range(count)]
    candidates = []
    for reference in references:
        words = reference.split()
        kept = [word for word in words if chance.random() < 0.7] + chance.choices(WORDS, k=chance.randint(0, 4))
        candidates.append(" ".join(kept) or "a")
    return items(candidates, references)


def test_two_thousand_pairs_agree_with_other_libraries():
    from collections import Counter

    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider as CocoCider
    from sacrebleu.metrics import BLEU

    pairs = generated(2000)
    text = pairs.preprocessed()
    bleu = Bleu1().measure(pairs).value
    other = BLEU(max_ngram_order=1, tokenize="none", smooth_method="none")
    theirs = other.corpus_score(list(text.candidates), [[several[0] for several in text.references]]).score / 100
    assert bleu == pytest.approx(theirs, abs=1e-6)
    gts = {i: list(several) for i, several in enumerate(text.references)}
    res = {i: [candidate] for i, candidate in enumerate(text.candidates)}
    value, per_image = Bleu(1).compute_score(gts, res, verbose=0)
    assert bleu == pytest.approx(value[0], abs=1e-9)
    value, per_image = CocoCider().compute_score(gts, res)
    measured = Cider().measure(pairs)
    assert measured.value == pytest.approx(value, abs=1e-9)
    np.testing.assert_allclose(measured.per_image, per_image, atol=1e-9)

    def overlap(candidate: str, reference: str) -> float:
        a, b = (Counter(part.split()) for part in (candidate, reference))
        shared = (a & b).total()
        return 2 * shared / (a.total() + b.total())

    by_hand = [overlap(c, r[0]) for c, r in zip(text.candidates, text.references, strict=True)]
    np.testing.assert_allclose(Rouge1().measure(pairs).per_image, by_hand, atol=1e-9)


def test_a_challenge_sized_run_is_scored_quickly():
    """17,237 captions in a minute on 2 cores is the promise; a tenth of them here, with room for a busy machine."""
    pairs = generated(1724)
    start = time.perf_counter()
    for metric in (Rouge1(), Bleu1(), Cider()):
        bootstrap.interval(metric.measure(pairs))
    assert time.perf_counter() - start < 12


def test_an_interval_holds_the_value_and_narrows_with_the_images():
    few, many = (Rouge1().measure(generated(count)) for count in (50, 800))
    widths = []
    for measured in (few, many):
        low, high = bootstrap.interval(measured)
        assert low < measured.value < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_comparison_finds_a_difference_and_only_where_there_is_one():
    rng = np.random.default_rng(0)
    base = rng.random(400)
    noise = rng.normal(0, 0.05, 400)
    better = bootstrap.compare(mean(base), mean(base + noise + 0.03))
    assert better.difference == pytest.approx(0.03 + noise.mean())
    assert better.low > 0
    assert better.p < 0.01
    same = bootstrap.compare(mean(base), mean(base + rng.normal(0, 0.05, 400) * 0))
    assert (same.difference, same.wins, same.losses, same.ties) == (0.0, 0, 0, 400)
    assert same.p == 1.0
    corpus = Bleu1().measure(generated(200))
    assert bootstrap.compare(corpus, corpus).difference == 0.0


def test_a_corpus_metric_is_resampled_by_its_counts():
    whole = generated(100)
    half = Items(whole.ids[:50], whole.candidates[:50], whole.references[:50])
    corpus = Bleu1().measure(whole)
    assert corpus.resampled(np.arange(100)) == pytest.approx(corpus.value, abs=1e-9)
    assert corpus.resampled(np.arange(50)) == pytest.approx(Bleu1().measure(half).value, abs=1e-9)


def test_the_constant_caption_knows_only_what_is_frequent():
    found = items(["x"] * 3, ["ct of the chest", "ct of the head", "ct"])
    assert constant_caption(found) == "ct of the chest"
    assert describe(found)["unique_ratio"] == round(1 / 3, 4)


PLUGIN = Path("examples/plugins/term_f1.py").absolute()


def plugin(command: str) -> MetricInputs:
    return MetricInputs(plugins={"umls_f1": command})


def test_a_plugin_runs_in_its_own_interpreter(tmp_path):
    (tmp_path / "terms.txt").write_text("cardiomegaly\nchest xray\nwhite arrow\n")
    metric = Plugin("umls_f1", plugin(f"{sys.executable} -I {PLUGIN} {tmp_path / 'terms.txt'}"))
    measured = metric.measure(WORKED)
    assert measured.per_image.tolist() == [1.0, 1.0, 1.0]
    worse = metric.measure(items(["chest xray", "white arrow, nothing"], ["chest xray, cardiomegaly", "cardiomegaly"]))
    assert worse.per_image.tolist() == pytest.approx([2 / 3, 0.0])
    assert metric.signature().startswith("umls_f1|plugin:terms:3")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("", "gave no score for 3 images, 0 among them"),
        ('print(\'{"id": "9", "score": 1}\')', "gave no score"),
        ('for i in \'01233\': print(\'{"id": "%s", "score": 1}\' % i)', "line 5 of its answer: 3 is there twice"),
        ('for i in \'0123\': print(\'{"id": "%s", "score": 1}\' % i)', "gave a score for 3, which is not in the run"),
        ("print('hello')", "line 1 of its answer is not of the contract"),
        ('print(\'{"id": "0", "score": NaN}\')', "has no finite score"),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ('print(\'{"id": 0, "score": 1}\')', "is no text"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_an_error(code, sentence, tmp_path):
    (tmp_path / "x.py").write_text("import sys; sys.stdin.read()\n" + code)
    with pytest.raises(EngineError, match=sentence):
        Plugin("umls_f1", plugin(f"{sys.executable} {tmp_path / 'x.py'}")).measure(WORKED)


@pytest.mark.parametrize(
    ("command", "sentence"), [("python 'a", "a command that is not one"), (" ", "an empty command")]
)
def test_a_plugin_command_that_is_none(command, sentence):
    with pytest.raises(EngineError, match=sentence):
        Plugin("umls_f1", plugin(command)).measure(WORKED)


def test_a_plugin_that_is_not_there_is_named():
    with pytest.raises(EngineError, match="cannot be started: No such file"):
        Plugin("umls_f1", plugin("/nowhere/at-all")).measure(WORKED)


@pytest.mark.parametrize("name", ["clinicalbleurt", "medbertscore", "similarity", "umls_f1", "alignscore"])
def test_what_is_not_built_in_says_what_it_needs(name):
    with pytest.raises(UnavailableError, match=f"--plugin {name}=COMMAND"):
        make_metric(name, MetricInputs(), {}).measure(WORKED)


@pytest.mark.parametrize("name", ["bertscore", "bleurt", "clipscore", "refclipscore"])
def test_metrics_without_weights_say_which(name):
    metric = make_metric(name, MetricInputs(), {})
    with_images = Items(WORKED.ids, WORKED.candidates, WORKED.references, [Path("x")] * 3)
    with pytest.raises(UnavailableError, match="needs weights: --weights "):
        metric.measure(with_images)


# The command


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


def test_coco_results_meet_coco_annotations(files):
    annotations = [{"image_id": 10 + i, "caption": c} for i, c in enumerate(REFERENCES)]
    images = [{"id": 10 + i, "file_name": f"COCO_{i}.jpg"} for i in range(3)]
    (files / "references.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    results = [{"image_id": 10 + i, "caption": c} for i, c in enumerate(CANDIDATES)]
    (files / "run.json").write_text(json.dumps(results))
    given = ("--run", files / "run.json", "--references", files / "references.json", "--out", files / "scores.json")
    result = run("score", *given)
    assert result.exit_code == 0, result.output
    assert json.loads((files / "scores.json").read_text())["bleu1"] == pytest.approx(11 / 21, abs=1e-6)


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
    said = [f"{n},{'a caption' if i % 2 else 'nothing'}" for i, n in enumerate(names)]
    (files / "run.csv").write_text("ID,Caption\n" + "\n".join(said) + "\n")
    assert score(files, "--metrics", "rouge1", "--by", "Modality").exit_code == 0
    groups = json.loads((files / "scores.json").read_text())["details"]["groups"]
    assert groups["CT"] == {"images": 12, "rouge1": 0.5}
    assert groups["MR"] == {"images": 6, "rouge1": 1.0}
    result = score(files, "--by", "colour")
    assert result.exit_code == 2
    assert "has no column 'colour' but Modality" in result.stderr


@pytest.mark.parametrize(
    ("run_text", "references", "sentence"),
    [
        ("ID,Caption\n0,a\n1,b\n", None, "lacks 1 ids"),
        ("ID,Caption\n0,a\n1,b\n2,c\n3,d\n", None, "has 1 ids that"),
        ("ID,Caption\n0,a\n0,b\n1,c\n2,d\n", None, "more than one caption for 0"),
        ("ID,Caption\nx,a\n", None, "references of another split?"),
        ("ID#Caption\n0#a\n", None, "is no table of captions"),
        ("", None, "is no table of captions"),
        (None, "ID,Caption\n", "holds no captions"),
        (None, "ID,Caption\n0,a,b\n", "line 2: 3 columns"),
    ],
)
def test_files_that_do_not_fit_get_one_line(run_text, references, sentence, files):
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
    assert "score needs --run" in run("score").stderr
    assert "--weights bert=... is for no metric of this run" in score(files, "--weights", "bert=/").stderr
    assert "--labels needs --by" in score(files, "--labels", files / "references.csv").stderr
    assert "no folder with config.json" in score(files, "--metrics", "bertscore", "--weights", "bertscore=/").stderr


def test_two_runs_are_compared_by_file_or_by_what_was_kept_of_them(files):
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
    (files / "better.pi").write_text("ID,rouge1@12345678\n0,1.0\n")
    assert "not of the same images" in run("score", "compare", files / "run.pi", files / "better.pi").stderr
    (files / "better.pi").write_text("ID,rouge1@12345678\n0,1.0\n1,1.0\n2,1.0\n")
    assert "no metric measured in one way" in run("score", "compare", files / "run.pi", files / "better.pi").stderr
    assert "is no file of --per-image" in run("score", "compare", files / "run.csv", files / "better.csv").stderr
    (files / "better.pi").write_text("ID,recall@12345678,recall:0\n0,1.0,2\n1,1.0,2\n2,1.0,2\n")
    assert "holds counts of recall" in run("score", "compare", files / "run.pi", files / "better.pi").stderr


def test_options_that_would_do_nothing_are_refused(files):
    assert score(files, "--per-image", files / "run.pi").exit_code == 0
    for arguments, said in (
        (["score", "compare", "run.pi", "run.pi", "--metrics", "bleu1"], "--metrics: only with --references"),
        (["score", "compare", "run.pi", "run.pi", "--weights", "bertscore=/x"], "--weights: only with --references"),
        (["score", "--metrics", "bleu1", "compare", "run.pi", "run.pi"], "--metrics: give what is for `score compare`"),
        (
            ["rerank", "--n-best", "run.jsonl", "--out", "x.csv", "--weights", "bertscore=/x"],
            "is for no metric of this",
        ),
    ):
        result = run(*(files / word if word.startswith(("run.", "x.")) else word for word in arguments))
        assert result.exit_code != 0
        assert said in result.stderr


def test_the_command_line_offers_every_profile_and_format():
    assert set(PROFILE_NAMES) == set(PROFILES)
    assert set(FORMAT_NAMES) == set(FORMATS)


def test_measured_values_that_are_kept_are_read_back_exactly(files):
    from engine.scoring.files import read_per_image

    score(files, "--per-image", files / "per_image.csv")
    ids, measured = read_per_image(files / "per_image.csv")
    assert ids == ["0", "1", "2"]
    rouge, bleu, _ = measured.values()
    np.testing.assert_array_equal(rouge.per_image, Rouge1().measure(WORKED).per_image)
    assert isinstance(bleu, Measured)
    assert bleu.value == pytest.approx(11 / 21, abs=1e-9)


# Consensus


def test_rerank_takes_what_the_others_agree_with(tmp_path):
    lists = {
        "a": [("ct of the head", -1.0), ("mri of the brain", -1.1), ("mri of the brain now", -1.2)],
        "b": [("only one", -3.0)],
    }
    lines = [
        json.dumps({"id": k, "hypotheses": [{"text": t, "sum_log_prob": s} for t, s in several]})
        for k, several in lists.items()
    ]
    (tmp_path / "n.jsonl").write_text("\n".join(lines) + "\n")
    result = run("rerank", "--n-best", tmp_path / "n.jsonl", "--out", tmp_path / "run.csv")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run.csv").read_text() == 'ID,Caption\na,"mri of the brain"\nb,"only one"\n'
    assert "2 captions, 1 of them another" in result.stderr


def test_candidates_count_by_their_probability_and_equal_ones_together(tmp_path):
    from engine.scoring.rerank import read_n_best, rerank_candidates

    (tmp_path / "n.jsonl").write_text(
        '{"id": "a", "hypotheses": [{"text": "x", "sum_log_prob": -0.1}, {"text": "y z", "sum_log_prob": -9},'
        ' {"text": "y", "sum_log_prob": -9}]}\n'
    )
    candidates = read_n_best([tmp_path / "n.jsonl"])
    assert sum(one.share for one in candidates["a"]) == pytest.approx(1.0)
    assert rerank_candidates(candidates, "rouge1", MetricInputs()) == {"a": "x"}
    assert rerank_candidates(candidates, "rouge1", MetricInputs(), uniform=True) == {"a": "y z"}
    hypotheses = [{"text": "x", "sum_log_prob": -1}] * 3 + [{"text": "y", "sum_log_prob": -2}]
    (tmp_path / "drawn.jsonl").write_text(json.dumps({"id": "a", "drawn": True, "hypotheses": hypotheses}) + "\n")
    drawn = {one.text: one.share for one in read_n_best([tmp_path / "drawn.jsonl"])["a"]}
    assert drawn == {"x": 0.75, "y": 0.25}, "a drawn caption counts as often as it was drawn"
    (tmp_path / "more.jsonl").write_text((tmp_path / "n.jsonl").read_text().replace('"a"', '"b"'))
    for files in (("n", "more"), ("more", "n")):
        with pytest.raises(DataError, match="differ in 2 ids: a, b"):
            read_n_best([tmp_path / f"{name}.jsonl" for name in files])
    two = read_n_best([tmp_path / "n.jsonl", tmp_path / "n.jsonl"])
    assert [one.share for one in two["a"]] == pytest.approx([one.share for one in candidates["a"]])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no candidates"),
        ("{}\n", "line 1: not a line of --n-best-out"),
        ('{"id": "a", "hypotheses": []}\n', "line 1: no candidates"),
        ('{"id": "a", "hypotheses": [{"text": "x", "sum_log_prob": "nan"}]}\n', "without a finite sum_log_prob"),
        ('{"id": "a", "hypotheses": [{"text": "x", "sum_log_prob": 0}]}\n' * 2, "line 2: a is there twice"),
    ],
)
def test_n_best_files_that_are_none(content, sentence, tmp_path):
    from engine.scoring.rerank import read_n_best

    (tmp_path / "n.jsonl").write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_n_best([tmp_path / "n.jsonl"])


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
        (OverflowError("int too big to convert\nmore"), "it failed: OverflowError: int too big to convert"),
        (IndexError(), "it failed: IndexError"),
        (MemoryError("no room"), "it failed: MemoryError: no room"),
        (UsageError("--weights x: no folder"), "--weights x: no folder"),
    ],
)
def test_a_metric_that_fails_takes_no_other_with_it(error, reason):
    said = []
    scores, measured = measure({"failing": Failing(error), "rouge1": Rouge1()}, WORKED, said.append)
    assert [score.unavailable for score in scores] == [reason, ""]
    assert list(measured) == ["rouge1"]
    assert said[0] == f"failing: unavailable: {reason}"


def test_metrics_say_where_they_say_nothing():
    greek = items(["ακτινογραφία θώρακος", "ct"], ["ακτινογραφία θώρακος", "ct"])
    assert Rouge1().measure(greek).note == (
        "1 of 2 references hold no token that rouge-score knows, [a-z0-9]+: they say nothing"
    )
    assert "; 1 of 1 images have no word that another image lacks" in Cider().measure(items(["a b"], ["a b"])).note
    assert "whatever is said" not in Cider().measure(WORKED).note


def test_empty_references_are_counted(tmp_path):
    (tmp_path / "run.csv").write_text("ID,Caption\na,x\nb,\n")
    (tmp_path / "references.csv").write_text("ID,Caption\na,\nb,\n")
    report = score_run(ScoreRequest(tmp_path / "run.csv", tmp_path / "references.csv", metrics=("rouge1",)), print)
    assert report.notes == ["2 references are empty: an empty caption scores 1 there in most metrics, any other 0"]
    assert report.scores[0].value == 0.5

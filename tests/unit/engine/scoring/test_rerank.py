"""Reranking with several weighted files and with training captions as support, against values computed by hand."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner

from engine.cli.app import main
from engine.errors import DataError, UsageError
from engine.inputs.tables import Table
from engine.scoring.base import Items, MetricInputs
from engine.scoring.overlap import Bleu, Rouge1
from engine.scoring.rerank import POOL, Candidate, Support, SupportCaptions, read_n_best, rerank_candidates

HEAD = 'ID,Caption\na,"{}"\n'
TRAINING = "ID,Caption\nt1,MRI of brain\nt2,foot\nt3,Brain MRI.\nt4,CT chest\n"


def n_best(path, **drawn):
    """Write an n-best file of sampled captions; a caption's share is the number of times it was sampled."""
    lines = [
        {"id": name, "drawn": True, "hypotheses": [{"text": text, "sum_log_prob": -1} for text in texts]}
        for name, texts in drawn.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def rerank(tmp_path, monkeypatch):
    """Run rerank in a folder with files of candidates and training captions; return the result and the output."""
    monkeypatch.chdir(tmp_path)
    n_best(tmp_path / "one.jsonl", a=["ct head"] * 3 + ["mri brain"])
    n_best(tmp_path / "two.jsonl", a=["mri brain scan"])
    n_best(tmp_path / "three.jsonl", a=["ct head", "ct head", "mri brain", "mri spine"])
    (tmp_path / "training.csv").write_text(TRAINING)

    def run(line):
        result = CliRunner().invoke(main, ["rerank", "--out", "run.csv", *line.split()])
        out = tmp_path / "run.csv"
        return result, out.read_text() if out.exists() else None

    return run


# Shares of files


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        # ct head 3/8; mri brain 1/8 + 1/2 * 4/5 = 0.525; mri brain scan 1/2 + 1/8 * 4/5 = 0.6
        ("", "mri brain scan"),
        ("--share 7 --share 7", "mri brain scan"),
        # ct head 1/2; mri brain 1/6 + 1/3 * 4/5 = 0.433; mri brain scan 1/3 + 1/6 * 4/5 = 0.467
        ("--share 2 --share 1", "ct head"),
        ("--share 1 --share 2", "mri brain scan"),
    ],
)
def test_share_weights_a_file(shares, expected, rerank):
    result, written = rerank(f"--n-best one.jsonl --n-best two.jsonl {shares}")
    assert result.exit_code == 0, result.output
    assert written == HEAD.format(expected)


def test_shares_are_normalised_and_equal_ones_change_nothing(tmp_path):
    files = [n_best(tmp_path / f"{i}.jsonl", a=["x"] * (i + 2) + ["y"] * 3 + [f"z{i}"]) for i in range(3)]
    shares = {one.text: one.share for one in read_n_best(files, [5, 3, 2])["a"]}
    assert shares == pytest.approx(
        {
            "x": 0.5 * 2 / 6 + 0.3 * 3 / 7 + 0.2 * 4 / 8,
            "y": 0.5 * 3 / 6 + 0.3 * 3 / 7 + 0.2 * 3 / 8,
            "z0": 0.5 / 6,
            "z1": 0.3 / 7,
            "z2": 0.2 / 8,
        }
    )
    alike = read_n_best(files)
    assert alike == read_n_best(files, [0.25] * 3)
    assert alike["a"][2] == Candidate("z0", 1 / 6 / 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--share 2", "--share 2: 1 for 2 files of --n-best"),
        ("--share 2 --share 1 --share 1", "--share 2, 1, 1: 3 for 2 files"),
        ("--share 1 --share 0", "--share 1, 0: takes finite numbers above 0"),
        ("--share -1 --share 1", "takes finite numbers above 0"),
        ("--share nan --share 1", "takes finite numbers above 0"),
        ("--share 1 --share inf", "takes finite numbers above 0"),
        ("--share 1e308 --share 1e308", "takes finite numbers above 0"),
        ("--share 1e-320 --share 1", "takes finite numbers above 0"),
        ("--share two --share 1", "--share must be a number, not 'two'"),
        ("--share 2 --share 1 --uniform", "--share has no effect with --uniform"),
        ("--nearest 3", "--nearest: only with --support"),
        ("--support-share 0.1", "--support-share: only with --support"),
        ("--support training.csv --nearest 0", "--nearest"),
        ("--support training.csv --support-share 1", "--support-share 1: takes a number from 0 to below 1"),
        ("--support training.csv --support-share -0.1", "--support-share -0.1: takes"),
        ("--support training.csv --support-share nan", "--support-share nan: takes"),
        ("--support training.csv --utility cider", "--utility cider needs the image or the whole run"),
        ("--support nowhere.csv", "nowhere.csv cannot be read"),
        ("--support empty.csv", "empty.csv holds no captions"),
        ("--support greek.csv", "greek.csv holds no caption with a word"),
        ("--support damaged.csv", "damaged.csv, line 3: 3 columns"),
    ],
)
def test_invalid_options_are_refused_in_one_line(line, message, rerank, tmp_path):
    (tmp_path / "empty.csv").write_text("ID,Caption\n")
    (tmp_path / "greek.csv").write_text("ID,Caption\nt1,ακτινογραφία\nt2,\n")
    (tmp_path / "damaged.csv").write_text("ID,Caption\nt1,a\nt2,b,c\n")
    result, written = rerank(f"--n-best one.jsonl --n-best two.jsonl {line}")
    (error,) = result.stderr.splitlines()
    assert message in error
    assert result.exit_code in (1, 2)
    assert written is None


def test_support_file_is_not_overwritten(rerank, tmp_path):
    result, _ = rerank("--n-best one.jsonl --support training.csv --out training.csv")
    assert "would overwrite the input training.csv" in result.stderr
    assert (tmp_path / "training.csv").read_text() == TRAINING


# Support


@pytest.mark.parametrize(
    ("support", "expected"),
    [
        # alone: ct head 1/2; mri brain 1/4 + 1/4 * 1/2 = 0.375, as mri spine
        ("", "ct head"),
        ("--support training.csv --support-share 0", "ct head"),
        # how near: Brain MRI 1/4 * 1 + 1/4 * 1/2 = 0.375; MRI of brain 1/4 * 4/5 + 1/4 * 2/5 = 0.3; CT chest 1/2 * 1/2
        # the two nearest at 0.1: ct head 0.9 * 0.5 = 0.45; mri brain 0.9 * 0.375 + 0.1 * 0.9 = 0.4275
        ("--support training.csv --nearest 2 --support-share 0.1", "ct head"),
        # at 0.2: ct head 0.8 * 0.5 = 0.4; mri brain 0.8 * 0.375 + 0.2 * 0.9 = 0.48
        ("--support training.csv --nearest 2 --support-share 0.2", "mri brain"),
        # three of them: ct head 0.4 + 0.2 * 0.5 / 3 = 0.433; mri brain 0.3 + 0.2 * 1.8 / 3 = 0.42
        ("--support training.csv --nearest 3 --support-share 0.2", "ct head"),
        # "foot" shares no word and is no fourth: eight are as three
        ("--support training.csv --support-share 0.2", "ct head"),
        # ct head 0.25 + 0.5 * 0.5 / 3 = 0.333; mri brain 0.1875 + 0.5 * 1.8 / 3 = 0.4875
        ("--support training.csv", "mri brain"),
    ],
)
def test_the_nearest_training_captions_vote(support, expected, rerank):
    result, written = rerank(f"--n-best three.jsonl {support}")
    assert result.exit_code == 0, result.output
    assert written == HEAD.format(expected)
    is_on = support and not support.endswith("-share 0")
    message = ", supported by 4 distinct captions ->" if is_on else "differ from the first candidate ->"
    assert message in result.stderr


def test_support_join_by_hand():
    """The two nearest of training.csv, in another order, at one half."""
    support = Support({}, nearest=2, share=0.5)
    utilities = [[0.0, 0.5, 0.0, 0.0], [0.8, 0.0, 0.0, 1.0], [0.4, 0.0, 0.0, 0.5]]
    gains = [0.5, 0.375, 0.375]
    assert support.join(gains, [0.5, 0.25, 0.25], utilities) == pytest.approx([0.25, 0.6375, 0.4125])
    doubled = [2 * gain for gain in gains]
    assert support.join(doubled, [1.0, 0.5, 0.5], utilities) == pytest.approx([0.25, 0.6375, 0.4125])


@pytest.mark.parametrize(("other", "expected"), [("head", "ct head"), ("mri brain", "mri brain")])
def test_image_is_not_supported_by_its_own_caption(other, expected, rerank, tmp_path):
    """The caption is found by its id, however that is written. A caption that another image shares still votes."""
    (tmp_path / "training.csv").write_text(f"file_name,text\nx/a.png,mri brain\nx/b.png,{other}\n")
    _, written = rerank("--n-best three.jsonl --support training.csv --support-share 0.9")
    assert written == HEAD.format(expected)


def test_images_without_near_captions_use_candidates_only(rerank, tmp_path):
    n_best(tmp_path / "many.jsonl", a=["ct head", "ct head", "mri"], b=["x y", "x", "x"], c=["foot"])
    result, written = rerank("--n-best many.jsonl --support training.csv")
    assert "supported by 4 distinct captions (1 image has no near caption) -> run.csv" in result.stderr
    _, alone = rerank("--n-best many.jsonl")
    assert written.splitlines()[2:] == alone.splitlines()[2:] == ['b,"x"', 'c,"foot"']


def made_up(count, chance):
    """Return random captions from a small vocabulary, with repeated words and with text that preprocessing changes."""
    words = ("ct", "CT", "mri", "of", "the", "head", "T2-weighted", "12", "x-ray", "(arrow)", "…")
    return [" ".join(chance.choices(words, k=chance.randint(1, 9))) for _ in range(count)]


def test_search_by_words_equals_rouge_1_of_all_pairs():
    chance = random.Random(0)
    training = list(dict.fromkeys(made_up(300, chance)))
    captions = SupportCaptions(Table("training.csv", {f"t{i}": (text,) for i, text in enumerate(training)}))
    for nearest in (1, 7, 250):
        texts = list(dict.fromkeys(made_up(5, chance)))
        candidates = [Candidate(text, share) for text, share in zip(texts, (0.4, 0.3, 0.2, 0.1, 0.05), strict=False)]
        pairs = [(candidate.text, text) for candidate in candidates for text in training]
        items = Items(["i"] * len(pairs), [text for text, _ in pairs], [(reference,) for _, reference in pairs])
        shares = [candidate.share for candidate in candidates]
        expected = shares @ Rouge1().measure(items).per_image.reshape(len(candidates), -1)
        (near,) = captions.near({"a": candidates}, Rouge1(), nearest=nearest, share=0.5).near.values()
        indices = [training.index(text) for text in near]
        assert all(first < second for first, second in pairwise(indices))
        best = np.sort(expected[expected > 0])[-nearest:]
        np.testing.assert_allclose(np.sort(expected[indices]), best, rtol=1e-12)


def test_other_utility_chooses_among_rouge_1_results():
    """BLEU-1 prefers the short caption: 0.95 * 1/4 + 0.05 = 0.29, against 0.95 * 3/4 * exp(1 - 9/4) = 0.20.

    ROUGE-1 prefers the long one: 0.95 * 2/5 + 0.05 = 0.43, against 0.95 * 6/13 + 0.05 * 2/10 = 0.45. With the long one
    as the only support, the long candidate would be chosen.
    """
    training = {"short": ("ct",), "long": ("ct of the big old aorta wall here now",)}
    training |= {f"t{i}": (f"head {i} {i}",) for i in range(9)}
    captions = SupportCaptions(Table("training.csv", training))
    candidates = {"a": [Candidate("ct of the head", 0.95), Candidate("ct", 0.05)], "b": [Candidate("ct", 1.0)]}
    support = captions.near(candidates, Bleu(1), nearest=1, share=0.9)
    assert {name: len(near) for name, near in support.near.items()} == {"a": POOL}
    assert rerank_candidates(candidates, "bleu1", MetricInputs(), support=support) == {"a": "ct", "b": "ct"}
    support = captions.near(candidates, Rouge1(), nearest=1, share=0.9)
    assert support.near == {"a": list(training["long"])}
    assert rerank_candidates(candidates, "bleu1", MetricInputs(), support=support)["a"] == "ct of the head"


def test_support_checks_its_numbers():
    with pytest.raises(UsageError, match="--nearest 0"):
        Support({}, nearest=0, share=0.5)


def test_rerank_chooses_the_consensus(tmp_path):
    lists = {
        "a": [("ct of the head", -1.0), ("mri of the brain", -1.1), ("mri of the brain now", -1.2)],
        "b": [("only one", -3.0)],
    }
    lines = [
        json.dumps({"id": k, "hypotheses": [{"text": t, "sum_log_prob": s} for t, s in several]})
        for k, several in lists.items()
    ]
    (tmp_path / "n.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["rerank", "--n-best", tmp_path / "n.jsonl", "--out", tmp_path / "run.csv"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run.csv").read_text() == 'ID,Caption\na,"mri of the brain"\nb,"only one"\n'
    assert "2 captions, 1 differs from the first candidate" in result.stderr


def test_candidates_are_weighted_and_equal_ones_merged(tmp_path):
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
    assert drawn == {"x": 0.75, "y": 0.25}, "a sampled caption counts as often as it was sampled"
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
        ('{"id": "a", "hypotheses": [{"text": "x \\ud83d", "sum_log_prob": 0}]}\n', "line 1: a caption with half"),
        ('{"id": "a", "hypotheses": [{"text": "x", "sum_log_prob": "nan"}]}\n', "without a finite sum_log_prob"),
        ('{"id": "a", "hypotheses": [{"text": "x", "sum_log_prob": 0}]}\n' * 2, "line 2: a occurs twice"),
    ],
)
def test_invalid_n_best_files(content, sentence, tmp_path):
    from engine.scoring.rerank import read_n_best

    (tmp_path / "n.jsonl").write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_n_best([tmp_path / "n.jsonl"])

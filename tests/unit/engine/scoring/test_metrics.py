"""Metrics against values computed by hand, against reference libraries, and against each other."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from engine.scoring import base
from engine.scoring.base import Items, UnavailableError, mean, preprocess
from engine.scoring.neural import clip_scores, harmonic
from engine.scoring.overlap import Bleu, Cider, Rouge1, RougeL, longest_shared
from engine.scoring.profiles import PROFILES, organisers_names
from engine.scoring.score import constant_caption, describe
from tests.helpers.worked import WORKED, items


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
def test_preprocessing_equals_the_organisers(raw, expected):
    assert preprocess(raw) == expected


def test_bleu_1_of_run_and_images():
    measured = Bleu(1).measure(WORKED)
    assert measured.value == pytest.approx(11 / 21, abs=1e-6)
    assert measured.per_image.mean() == pytest.approx(0.609524, abs=1e-6)
    assert "0.609524" in measured.note
    assert measured.combine(measured.counts.sum(0)) == pytest.approx(measured.value, abs=1e-9)


def test_cider_per_image():
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


@pytest.mark.parametrize("candidate", ["ct of a left mass", "mri", ""])
def test_bleu_and_rouge_l_equal_pycocoevalcap_with_references(candidate):
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge

    references = ("ct of the chest with a mass", "a left lung mass", "ct")
    pair = items([candidate], [references])
    values, _ = BleuScorer(candidate, list(references), n=4).compute_score(option="closest")
    assert [Bleu(n).measure(pair).value for n in (1, 2, 3, 4)] == values
    assert RougeL().measure(pair).value == Rouge().calc_score([candidate], list(references))


def test_cider_of_empty_references_is_unavailable():
    with pytest.raises(UnavailableError, match="needs a reference with a word"):
        Cider().measure(items(["ct", "mri"], ["", "..."]))


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

    from pycocoevalcap.bleu.bleu import Bleu as CocoBleu
    from pycocoevalcap.cider.cider import Cider as CocoCider
    from pycocoevalcap.rouge.rouge import Rouge as CocoRouge
    from sacrebleu.metrics import BLEU

    pairs = generated(2000)
    text = pairs.preprocessed()
    bleu = Bleu(1).measure(pairs).value
    other = BLEU(max_ngram_order=1, tokenize="none", smooth_method="none")
    theirs = other.corpus_score(list(text.candidates), [[several[0] for several in text.references]]).score / 100
    assert bleu == pytest.approx(theirs, abs=1e-6)
    gts = {i: list(several) for i, several in enumerate(text.references)}
    res = {i: [candidate] for i, candidate in enumerate(text.candidates)}
    values, per_image = CocoBleu(4).compute_score(gts, res, verbose=0)
    for n in (1, 2, 3, 4):
        measured = Bleu(n).measure(pairs)
        assert measured.value == values[n - 1]
        assert measured.combine(measured.counts.sum(0)) == pytest.approx(measured.value, abs=1e-12)
        np.testing.assert_array_equal(measured.per_image, per_image[n - 1])
    value, per_image = CocoRouge().compute_score(gts, res)
    assert RougeL().measure(pairs).value == pytest.approx(value, abs=1e-12)
    np.testing.assert_array_equal(RougeL().measure(pairs).per_image, per_image)
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
    """The goal is 17,237 captions in a minute on 2 cores. Here a tenth of them, with a margin for a busy machine."""
    pairs = generated(1724)
    start = time.perf_counter()
    for metric in (Rouge1(), Bleu(1), Cider()):
        base.interval(metric.measure(pairs))
    assert time.perf_counter() - start < 12


def test_coverage_curve_of_the_surest_images():
    scores = np.random.default_rng(0).random(40)
    order = np.argsort(-scores)  # the surest images are the best ones
    curve = base.coverage_curve(order, scores)
    for share, value in zip(curve.shares, curve.values, strict=True):
        assert value == pytest.approx(np.sort(scores)[::-1][: round(share * 40)].mean())
    assert (np.diff(curve.values) < 0).all()
    assert (curve.low <= curve.values).all()
    assert (curve.values <= curve.high).all()
    ends = base.interval(base.mean(scores))
    assert (curve.low[-1], curve.high[-1]) == pytest.approx(ends)  # all images: the interval of the run
    shuffled = base.coverage_curve(np.random.default_rng(1).permutation(40), scores)
    assert shuffled.values[0] < curve.values[0]
    few = base.coverage_curve(np.array([1, 0]), np.array([0.0, 1.0]))
    assert few.values.tolist() == [1.0] * 10 + [0.5] * 10


def test_interval_holds_the_value_and_narrows_with_n():
    few, many = (Rouge1().measure(generated(count)) for count in (50, 800))
    widths = []
    for measured in (few, many):
        low, high = base.interval(measured)
        assert low < measured.value < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_comparison_finds_only_real_differences():
    rng = np.random.default_rng(0)
    values = rng.random(400)
    noise = rng.normal(0, 0.05, 400)
    better = base.compare(mean(values), mean(values + noise + 0.03))
    assert better.difference == pytest.approx(0.03 + noise.mean())
    assert better.low > 0
    assert better.p < 0.01
    same = base.compare(mean(values), mean(values.copy()))
    assert (same.difference, same.wins, same.losses, same.ties) == (0.0, 0, 0, 400)
    assert same.p == 1.0
    corpus = Bleu(1).measure(generated(200))
    assert base.compare(corpus, corpus).difference == 0.0


def test_p_value_counts_the_observed_sample():
    """With r resamples the smallest p is 2 / (r + 1), never 0 (Davison and Hinkley 1997, section 4.2.5)."""
    values = np.arange(50.0)
    assert base.compare(mean(values), mean(values + 1), resamples=99).p == pytest.approx(2 / 100)


def test_a_corpus_metric_is_resampled_by_its_counts():
    whole = generated(100)
    half = Items(whole.ids[:50], whole.candidates[:50], whole.references[:50])
    corpus = Bleu(1).measure(whole)
    assert corpus.resampled(np.arange(100)) == pytest.approx(corpus.value, abs=1e-9)
    assert corpus.resampled(np.arange(50)) == pytest.approx(Bleu(1).measure(half).value, abs=1e-9)


def test_the_shorter_of_two_equally_near_references_counts():
    """Resamples and groups have the brevity penalty of the whole score, which is pycocoevalcap's."""
    for references, expected in ((("a b c", "a b c d e"), 1.0), (("a b c d e", "a b c d e f g"), np.exp(1 - 5 / 4))):
        measured = Bleu(1).measure(items(["a b c d"], [references]))
        assert measured.value == pytest.approx(expected, abs=1e-6)
        assert measured.combine(measured.counts.sum(0)) == pytest.approx(expected, abs=1e-6)


def test_constant_caption_has_the_frequent_words():
    found = items(["x"] * 3, ["ct of the chest", "ct of the head", "ct"])
    assert constant_caption(found) == "ct of the chest"
    for texts in (["b a", "c d"], ["c d", "b a"]):
        assert constant_caption(items(["x"] * 2, texts)) == "a b", "the order of the images must not decide"
    assert describe(found)["unique_ratio"] == round(1 / 3, 4)


def test_notes_on_references_that_cannot_be_scored():
    greek = items(["ακτινογραφία θώρακος", "ct"], ["ακτινογραφία θώρακος", "ct"])
    assert Rouge1().measure(greek).note == (
        "1 of 2 references without a token that rouge-score reads ([a-z0-9]+), which score 0"
    )
    assert "; 1 of 1 image has only words that all images share" in Cider().measure(items(["a b"], ["a b"])).note
    for scored in (WORKED, items(["x", "y", "z"], ["", "one cat", "two dogs"])):
        assert "score 0 with any caption" not in Cider().measure(scored).note


def test_longest_shared_n_gram_equals_brute_force():
    rng = np.random.default_rng(0)
    texts, others = ([[*map(str, rng.integers(0, 4, rng.integers(0, 9)))] for _ in range(40)] for _ in range(2))
    texts.append(others[0] + others[1])
    texts.append(["none"])

    def grams(words):
        return {tuple(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}

    known = set().union(*map(grams, others))
    expected = [max((len(gram) for gram in grams(words) if gram in known), default=0) for words in texts]
    assert longest_shared(texts, others) == expected
    assert longest_shared(texts, []) == [0] * len(texts)

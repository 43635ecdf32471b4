"""The confidence of a caption, the isotonic fit against its closed form, and files of calibrations."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from engine.calibration import CONFIDENCES, Calibration, KnownConfidences, isotonic, rank_correlation
from engine.captions import Alternative, Caption
from engine.cli.calibrate import CONFIDENCE_NAMES
from engine.errors import DataError, UsageError

BEST = Alternative("a Cat on a mat", "", (1, 2, 3), -1.0, -0.5, (float(np.log(0.8)), float(np.log(0.2))))
MAP = Calibration("score", 2, "rouge1", "rouge1:F", 4, (-2.0, -1.0, -0.5), (0.25, 0.5, 1.0))
PAIRS = st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 8)), min_size=1, max_size=12)


def caption(*texts: str) -> Caption:
    others = (Alternative(text, "", (1,), -3.0, -0.75 - i) for i, text in enumerate(texts))
    return Caption("a", (BEST, *others))


def test_confidence_of_a_caption():
    found = caption("a cat on the mat", "dogs").confidence
    assert found.score == -0.5
    assert found.margin == 0.25
    assert found.agreement == pytest.approx((2 * 4 / 10 + 0) / 2)  # "a" counts once: the other text has it once
    assert found.mean_token_prob == pytest.approx(0.5)
    assert found.min_token_prob == pytest.approx(0.2)
    alone = Caption("a", (replace(BEST, token_log_probs=()),)).confidence
    assert vars(alone) == {"score": -0.5} | dict.fromkeys(CONFIDENCES[1:])
    assert Caption("a", (replace(BEST, text=""),) * 2).confidence.agreement == 1.0


def test_names_of_confidences_are_those_of_the_option():
    assert CONFIDENCE_NAMES == CONFIDENCES


@given(PAIRS)
@settings(deadline=None)
def test_isotonic_equals_the_closed_form(pairs):
    """The solution at i is the maximum over a <= i of the minimum over b >= i of the mean from a to b."""
    x, y = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    knots, expected = isotonic(x, y)
    values = np.unique(x)
    for i, value in enumerate(values):
        means = [[y[(x >= a) & (x <= b)].mean() for b in values[i:]] for a in values[: i + 1]]
        assert np.interp(value, knots, expected) == pytest.approx(max(map(min, means)))
    assert (np.diff(knots) > 0).all()
    assert (np.diff(expected) >= 0).all()
    fit = np.interp(x, knots, expected)
    assert fit.mean() == pytest.approx(y.mean())


@given(PAIRS)
@settings(deadline=None)
def test_rank_correlation_equals_scipy(pairs):
    x, y = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)
    else:
        assert rank_correlation(x, y) == 0.0


def test_expected_score_between_and_beyond_the_knots():
    for score, expected in ((-9.0, 0.25), (-1.5, 0.375), (-0.75, 0.75), (0.0, 1.0)):
        assert MAP.expected_score(Caption("a", (replace(BEST, score=score),))) == expected
    unknown = replace(MAP, confidence="margin")
    assert unknown.expected_score(Caption("a", (BEST,))) is None


def test_alternatives_that_a_calibration_needs():
    MAP.require(1)
    replace(MAP, confidence="margin").require(3)
    replace(MAP, confidence="agreement").require(2)
    with pytest.raises(UsageError, match="needs the margin of several captions: set --n-best 2 or more"):
        replace(MAP, confidence="margin").require(1)
    with pytest.raises(UsageError, match="agreement of 2 captions per image, not 4: set --n-best 2"):
        replace(MAP, confidence="agreement").require(4)


def test_file_comes_back_as_it_was(tmp_path):
    MAP.write(tmp_path / "map.json")
    assert Calibration.read(tmp_path / "map.json") == MAP


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": 2},
        {"confidence": "hope"},
        {"knots": [-2.0, -1.0]},
        {"knots": [-1.0, -2.0, -0.5]},
        {"knots": [-2.0, -1.0, None]},
        {"expected": [0.25, 0.5, 0.4]},
        {"expected": [0.25, 0.5, float("nan")]},
        {"knots": [], "expected": []},
        {"n_best": "many"},
        {"more": 1},
    ],
)
def test_damaged_files_are_refused(change, tmp_path):
    path = tmp_path / "map.json"
    MAP.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"map\.json is not a file of `engine calibrate` \(.*\): fit it again"):
        Calibration.read(path)
    for text in ("", "[]", "7", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(DataError, match="is not a file of `engine calibrate`"):
            Calibration.read(path)


def test_confidences_of_a_file(tmp_path):
    path = tmp_path / "run.jsonl"
    lines = [
        {"id": "a", "confidence": {"score": -1, "margin": None}, "hypotheses": [{}]},
        {"id": "b", "confidence": {"score": -2, "margin": 0.5}, "hypotheses": [{}, {}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    known = KnownConfidences.read(path)
    assert known.n_best == 2
    assert known.column("score", ["b", "a"]).tolist() == [-2.0, -1.0]
    assert known.column("margin", ["b", "a"]) is None
    assert known.column("margin", ["b"]).tolist() == [0.5]
    path.write_text(json.dumps({"id": "a", "hypotheses": []}) + "\n")
    with pytest.raises(DataError, match="line 1: no confidence"):
        KnownConfidences.read(path)

"""`python -m export.parity`: its report, and how it distinguishes a tie from a real mismatch."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from engine.bundle.manifest import Bundle
from engine.options import DecodeOptions
from export.bundle import checkpoint_sha256, write_manifest
from export.parity import SettingReport, compare_setting, judge, main
from export.reference.golden import golden_pictures
from export.reference.huggingface import PrefixBackend, Reference, ReferenceCaption, UncachedBackend
from export.reference.trace import Trace
from export.restore import restore_checkpoint
from tests.helpers.tiny import make_checkpoint, random_pictures, save_pictures


@pytest.fixture
def image_dir(tmp_path):
    return save_pictures(tmp_path / "images", 6)


def run_parity(checkpoint, bundle, image_dir, out):
    arguments = ["--checkpoint", checkpoint, "--bundle", bundle, "--images", image_dir, "--beams", "1,3", "--out", out]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_correct_bundle_passes(tiny_checkpoint, tiny_bundle, image_dir, tmp_path):
    result = run_parity(tiny_checkpoint, tiny_bundle, image_dir, tmp_path / "parity.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["real_mismatches"] == 0
    assert [s["options"]["num_beams"] for s in report["settings"]] == [1, 1, 3, 3]
    for setting in report["settings"]:
        assert setting["identical"] == setting["identical_text"] == setting["images"] == 6
        assert setting["max_score_difference"] < 1e-4
    assert report["versions"]["transformers"] == "4.57.6"


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("other") / "checkpoint", seed=5)


def test_real_mismatches_fail(other_checkpoint, tiny_bundle, image_dir, tmp_path):
    """The manifest is changed to name the other checkpoint, so only the captions show that the weights differ."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    write_manifest(bundle, manifest | {"checkpoint": {"sha256": checkpoint_sha256(other_checkpoint)}})
    arguments = [
        "--checkpoint",
        other_checkpoint,
        "--bundle",
        bundle,
        "--images",
        image_dir,
        "--limit",
        2,
        "--beams",
        2,
    ]
    result = CliRunner().invoke(main, [str(one) for one in [*arguments, "--out", tmp_path / "parity.json"]])
    assert result.exit_code == 1
    report = json.loads((tmp_path / "parity.json").read_text())
    mismatches = [m for setting in report["settings"] for m in setting["mismatches"]]
    assert report["real_mismatches"] > 0
    assert all(m["gap"] > 1e-4 for m in mismatches if m["verdict"] == "real")


def test_bundle_of_another_checkpoint_is_refused(other_checkpoint, tiny_bundle, image_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("export.parity.compare_setting", lambda *_: pytest.fail("captioning has begun"))
    result = run_parity(other_checkpoint, tiny_bundle, image_dir, tmp_path / "parity.json")
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert f"was exported from another checkpoint than {other_checkpoint}" in result.output


def test_same_weights_in_other_files_are_accepted(tiny_bundle, tmp_path):
    restored = restore_checkpoint(tiny_bundle, tmp_path / "restored")
    weights = load_file(restored / "model.safetensors")
    save_file(weights, restored / "model.safetensors", {"format": "pt", "note": "other bytes"})
    assert checkpoint_sha256(restored) != Bundle.load(tiny_bundle).checkpoint["sha256"]
    arguments = ["--checkpoint", restored, "--bundle", tiny_bundle, "--beams", 1, "--no-repeat-ngram", 0]
    result = CliRunner().invoke(main, [str(one) for one in [*arguments, "--out", tmp_path / "parity.json"]])
    assert result.exit_code == 0, result.output


def test_decoding_options_apply_to_both_sides(tiny_checkpoint, tiny_bundle, image_dir, tmp_path):
    """The bundle's n best captions equal those of `generate` under options that change them."""
    (tmp_path / "words.txt").write_text("lesion\n")
    given = ["--min-new-tokens", 6, "--max-new-tokens", 9, "--length-penalty", -1.5, "--early-stopping", "true"]
    given += ["--repetition-penalty", 1.4, "--suppress-tokens", 59, "--n-best", 2, "--prompt", "a chest"]
    given += ["--bad-words", tmp_path / "words.txt", "--beams", 3, "--no-repeat-ngram", 2]
    paths = ["--checkpoint", tiny_checkpoint, "--bundle", tiny_bundle, "--images", image_dir]
    result = CliRunner().invoke(main, [str(one) for one in [*paths, *given, "--out", tmp_path / "parity.json"]])
    assert result.exit_code == 0, result.output
    (report,) = json.loads((tmp_path / "parity.json").read_text())["settings"]
    assert report["identical"] == report["identical_text"] == 6
    assert (
        report["options"] | {"min_new_tokens": 6, "bad_words": ["lesion"], "suppress_tokens": [59]} == report["options"]
    )


def test_different_alternatives_are_a_mismatch(tiny_captioner, tiny_reference, monkeypatch):
    """The best captions agree, the second ones do not."""
    pictures = {"x": random_pictures(1)[0]}
    options = tiny_captioner.bundle.options(num_beams=3, num_return_sequences=2)
    ((first, second),) = tiny_reference.generate(tiny_reference.pixels(list(pictures.values())), options)
    wrong = replace(second, ids=(*second.ids[:-1], 9, second.ids[-1]))
    monkeypatch.setattr(Reference, "generate", lambda *_: [[first, wrong]])
    report = compare_setting(tiny_reference, tiny_captioner, pictures, options, batch_size=1)
    assert [(one.ours, one.theirs, one.verdict) for one in report.mismatches] == [
        (list(second.ids), list(wrong.ids), "real")
    ]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--sample"], "No such option"),
        (["--n-best", "4"], "need at least as many beams"),
        (
            ["--min-new-tokens", "30", "--max-new-tokens", "20"],
            "the minimum length (31 tokens) is larger than the maximum (21)",
        ),
    ],
)
def test_invalid_options_are_refused_before_captioning(
    given, sentence, tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr("export.parity.compare_setting", lambda *_: pytest.fail("captioning has begun"))
    arguments = ["--checkpoint", tiny_checkpoint, "--bundle", tiny_bundle, "--out", tmp_path / "parity.json", *given]
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == 2
    assert sentence in result.output


class Words(PrefixBackend):
    """Gives the same log-probabilities after each prefix: `words` {id: log-probability}, all others far lower.

    In float64 all of them are `error` larger after prefixes of even length, and smaller after others.
    """

    def __init__(self, vocab_size: int, words: dict[int, float], error: float = 0.0) -> None:
        self.error, self.shift = error, 0.0
        self.row = (-9.0 - 0.1 * np.arange(vocab_size)).astype(np.float32)
        for word, log_prob in words.items():
            self.row[word] = log_prob

    @property
    def in_float64(self):
        exact = copy.copy(self)
        exact.shift = self.error
        return exact

    def log_probs(self, image, prefixes):  # noqa: ARG002
        rows = np.tile(self.row, (len(prefixes), 1))
        return rows + [[self.shift * (-1) ** len(prefix)] for prefix in prefixes] if self.shift else rows


@pytest.fixture
def explain(tiny_captioner, tiny_reference, monkeypatch):
    """Judge an image for which the engine has the log-probabilities `ours` and the reference has `theirs`."""

    def run(ours: dict[int, float], theirs: dict[int, float], num_beams: int = 1, error: float = 0.0):
        size = tiny_captioner.bundle.model.vocab_size
        monkeypatch.setattr("export.reference.trace.UncachedBackend", lambda _: Words(size, theirs, error))
        options, picture = DecodeOptions(num_beams=num_beams, max_new_tokens=4), random_pictures(1)[0]
        search, pixels = tiny_captioner.search(options), np.zeros((32, 32, 3), np.uint8)
        expected = Trace(Words(size, theirs), search, pixels).ids
        monkeypatch.setattr(tiny_captioner, "backend", Words(size, ours))
        monkeypatch.setattr(Reference, "generate", lambda *_: [[ReferenceCaption(expected, None)]])
        (mine,) = tiny_captioner.caption([picture], options)
        return judge(tiny_reference, tiny_captioner, picture, options, mine.best)

    return run


@pytest.mark.parametrize(("nudge", "verdict"), [(1e-6, "tie"), (1e-2, "real")])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_gap_at_first_divergence_decides(nudge, verdict, num_beams, explain):
    """Two tokens whose scores differ by `nudge`, in opposite directions."""
    found, divergence = explain({7: -1.0 + nudge / 2, 8: -1.0}, {7: -1.0 - nudge / 2, 8: -1.0}, num_beams)
    assert found == verdict
    assert divergence.step == 0
    assert divergence.gap == pytest.approx(nudge, rel=0.6)


@pytest.mark.parametrize(
    ("nudge", "error", "verdict"),
    [(8e-5, 5e-5, "tie"), (8e-5, 1e-6, "real"), (8e-5, 0.0, "real"), (4e-4, 1.0, "real")],
)
def test_rounding_error_of_the_reference_widens_a_tie(nudge, error, verdict, explain):
    """The first two tokens are `nudge` apart, and the reference's log-probabilities are `error` off those of float64.

    4e-4 is not rounding, whatever the reference's error: the score is -1, and scores may differ by 1e-4.
    """
    found, divergence = explain(
        {7: -1.0 + nudge / 2, 8: -1.0}, {7: -1.0 - nudge / 2, 8: -1.0}, num_beams=2, error=error
    )
    assert found == verdict
    assert divergence.step == 0


def test_reference_in_float64(tiny_captioner, tiny_reference):
    bundle, pixels = tiny_captioner.bundle, golden_pictures(tiny_captioner.bundle.image.height)[0]
    backend, prefix = UncachedBackend(tiny_reference), (bundle.tokens.bos, 7, 12)
    rows, exact = (b.log_probs(pixels, [prefix]) for b in (backend, backend.in_float64))
    assert (rows.dtype, exact.dtype) == (np.float32, np.float64)
    assert 0 < np.abs(rows - exact).max() < 1e-5
    assert tiny_reference.in_float64 is tiny_reference.in_float64, "a copy for every image"
    assert tiny_reference.model.dtype == torch.float32


def test_wrong_score_outside_reference_candidates_is_real(explain):
    verdict, divergence = explain({7: -1.0, 8: -1.0 - 1e-6}, {7: -8.5, 8: -1.0 - 1e-6})
    assert verdict == "real"
    assert divergence.gap > 7


def test_tie_does_not_excuse_a_later_error(explain):
    """Tokens 7 and 8 tie and change ranks; the end token's score is wrong by 3, which decides the caption."""
    ours, theirs = {7: -1.0, 8: -1.0 - 1e-7, 3: -2.0}, {7: -1.0 - 1e-7, 8: -1.0, 3: -5.0}
    verdict, _ = explain(ours, theirs, num_beams=2)
    assert verdict == "real"


@pytest.mark.parametrize(
    ("gap", "score_error", "verdict"), [(1e-7, 0.0, "batch"), (1e-2, 0.0, "real"), (1e-7, 0.5, "real")]
)
def test_batch_verdict_needs_a_tie_and_correct_score(
    gap, score_error, verdict, tiny_captioner, tiny_reference, monkeypatch
):
    """Alone, both choose token 7. In a batch the engine chose token 8, `gap` lower, its score off by `score_error`."""
    words = Words(tiny_captioner.bundle.model.vocab_size, {7: -1.0, 8: -1.0 - gap})
    monkeypatch.setattr("export.reference.trace.UncachedBackend", lambda _: words)
    monkeypatch.setattr(tiny_captioner, "backend", words)
    options, picture = DecodeOptions(num_beams=2, max_new_tokens=1), random_pictures(1)[0]
    (mine,) = tiny_captioner.caption([picture], options)
    monkeypatch.setattr(Reference, "generate", lambda *_: [[ReferenceCaption(mine.ids, None)]])
    assert mine.ids[1] == 7
    in_batch = replace(mine.best, ids=(mine.ids[0], 8), sum_log_prob=-1.0 - gap + score_error)
    found, _ = judge(tiny_reference, tiny_captioner, picture, options, in_batch)
    assert found == verdict


@pytest.mark.parametrize(
    ("gap", "num_beams", "error", "verdict"),
    [
        (1e-7, 1, 0.0, "batch"),
        (1e-7, 2, 0.0, "batch"),
        (1e-2, 1, 0.0, "real"),
        (1e-2, 2, 0.0, "real"),
        (8e-5, 2, 0.0, "real"),
        (8e-5, 2, 5e-5, "batch"),
    ],
)
def test_generate_with_caches_takes_another_path(
    gap, num_beams, error, verdict, tiny_captioner, tiny_reference, monkeypatch
):
    """Both traces end in token 7, but `generate` returned token 8, whose score is `gap` lower."""
    words = Words(tiny_captioner.bundle.model.vocab_size, {7: -1.0, 8: -1.0 - gap}, error)
    monkeypatch.setattr("export.reference.trace.UncachedBackend", lambda _: words)
    monkeypatch.setattr(tiny_captioner, "backend", words)
    options, picture = DecodeOptions(num_beams=num_beams, max_new_tokens=1), random_pictures(1)[0]
    (mine,) = tiny_captioner.caption([picture], options)
    assert mine.ids[1] == 7
    monkeypatch.setattr(Reference, "generate", lambda *_: [[ReferenceCaption((mine.ids[0], 8), None)]])
    assert judge(tiny_reference, tiny_captioner, picture, options, mine.best)[0] == verdict


def test_caption_that_no_trace_gives_is_real(tiny_captioner, tiny_reference, monkeypatch):
    options, picture = DecodeOptions(num_beams=2, max_new_tokens=4), random_pictures(1)[0]
    (mine,) = tiny_captioner.caption([picture], options)
    monkeypatch.setattr(Reference, "generate", lambda *_: [[ReferenceCaption((*mine.ids, 9), None)]])
    found, _ = judge(tiny_reference, tiny_captioner, picture, options, mine.best)
    assert found == "real"


def test_different_text_or_scores_for_equal_ids_fail():
    good = SettingReport({}, images=2, identical=2, identical_text=2, max_score_difference=1e-6, mismatches=[])
    assert good.passed
    assert not replace(good, identical_text=1).passed
    assert not replace(good, max_score_difference=2e-4).passed

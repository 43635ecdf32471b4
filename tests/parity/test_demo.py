"""The embedded demo bundle: its captions equal Hugging Face's on the same weights, and they fit the images."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from engine.backends import open_backend
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.machine.verify import verify
from engine.options import DecodeOptions
from engine.runtime import Runtime
from export.reference.huggingface import Reference
from export.restore import restore_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo() -> Captioner:
    bundle = Bundle.load()
    return Captioner(bundle, open_backend(bundle, Runtime("cpu")))


@pytest.fixture(scope="module")
def captions() -> dict[str, str]:
    with (EXAMPLES / "captions.csv").open(newline="") as stream:
        return {row["ID"]: row["Caption"] for row in csv.DictReader(stream)}


def test_golden_recordings_replay(demo):
    assert all(check.passed for check in verify(demo.bundle, demo.backend))


def test_example_captions_fit_their_images(demo, captions):
    """A bound far below the README's figures, which detects a broken bundle but measures nothing."""
    paths = sorted((EXAMPLES / "images").iterdir())
    assert len(paths) == len(captions) == 32
    overlap, wrong = [], []
    for caption in demo.caption(paths):
        expected = captions[caption.id].lower()
        wrong += [caption.id] * (caption.text.split()[0] != expected.split()[0])
        overlap.append(len(set(caption.text.split()) & set(expected.split())) / len(set(expected.split())))
    assert wrong == ["icbm09c_sagittal_096"]  # close to the midline; its caption says coronal
    assert sum(overlap) / len(overlap) > 0.85


WINNER = DecodeOptions(
    num_beams=3, repetition_penalty=2.5, length_penalty=2.0, min_new_tokens=8, max_new_tokens=64, bad_words=["the head"]
)


@pytest.mark.parametrize("options", [DecodeOptions(max_new_tokens=40).over({}), WINNER.over({}), None])
def test_captions_equal_generate_on_restored_checkpoint(options, demo, tmp_path_factory):
    """Greedy search, the winner's settings, and the bundle's defaults (4 beams, 3-gram ban)."""
    reference = Reference.load(restore_checkpoint(demo.bundle.path, tmp_path_factory.mktemp("restored")))
    paths = sorted((EXAMPLES / "images").iterdir())[::8]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    theirs = reference.generate(reference.pixels(pictures), options or demo.bundle.options())
    for mine, (expected, *_) in zip(demo.caption(paths, options), theirs, strict=True):
        assert mine.ids == expected.ids
        assert mine.raw_text == reference.tokenizer.decode(expected.ids, skip_special_tokens=True)
        if expected.score is not None:
            assert mine.score == pytest.approx(expected.score, abs=1e-4)

"""An ensemble of bundles gives the captions of generate on a model that averages their log-probabilities."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from engine.backends.ensemble import EnsembleBackend
from engine.backends.shapes import PaddedBackend
from engine.bundle.manifest import LOG_PROBS, Bundle
from engine.bundle.open import BundleRef, combine
from engine.captioner import Captioner
from engine.cli import main
from engine.errors import BundleError, OutOfMemoryError, UsageError
from engine.files.atomic import file_sha256
from engine.options import DecodeOptions
from engine.runtime import Runtime
from export.bundle import export_bundle
from export.parity import main as parity
from export.reference.golden import golden_pictures
from export.reference.huggingface import Reference, UncachedBackend, ensemble
from tests.helpers.cores import two_cores
from tests.helpers.tiny import make_checkpoint, random_pictures, save_pictures

WEIGHTS = (1.0, 0.5)
SHAPE = {"text": {"num_hidden_layers": 3}, "vision": {"hidden_size": 36, "num_attention_heads": 3}}
"""Sizes of the second model, which differ from those of the first."""


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory) -> Path:
    text = SHAPE["text"] | {"encoder_hidden_size": SHAPE["vision"]["hidden_size"]}
    return make_checkpoint(tmp_path_factory.mktemp("other") / "checkpoint", seed=1, text=text, vision=SHAPE["vision"])


@pytest.fixture(scope="module")
def other_bundle(other_checkpoint) -> Path:
    export_bundle(other_checkpoint, other_checkpoint.parent / "bundle", lambda _: None)
    return other_checkpoint.parent / "bundle"


@pytest.fixture(scope="module")
def both(tiny_bundle, other_bundle) -> Captioner:
    return Captioner.load([tiny_bundle, str(other_bundle)], weights=WEIGHTS, backend="cpu", threads=1)


@pytest.fixture(scope="module")
def reference(tiny_reference, other_checkpoint, both) -> Reference:
    return ensemble([tiny_reference, Reference.load(other_checkpoint)], both.bundle.weights)


def test_several_bundles_load_no_torch(tiny_bundle, other_bundle, tmp_path):
    images = save_pictures(tmp_path / "images", 2)
    bundles = ["--bundle", tiny_bundle, "--bundle", other_bundle]
    words = ["caption", "--input", images, *bundles, "--out", tmp_path / "run.csv"]
    code = (
        "import sys; from click.testing import CliRunner; from engine.cli import main\n"
        f"assert CliRunner().invoke(main, {[str(word) for word in words]}).exit_code == 0\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


SETTINGS = [
    {"num_beams": 1},
    {"num_beams": 1, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "no_repeat_ngram_size": 3},
    {"num_beams": 3, "repetition_penalty": 2.5, "length_penalty": 2.0, "min_new_tokens": 8},
    {"num_beams": 5, "num_return_sequences": 5, "early_stopping": True, "prompt": "axial ct of the"},
    {"num_beams": 2, "suppress_tokens": (9, 10), "bad_words": ("white arrow",)},
]


def test_mean_of_models_in_float64(both, reference):
    pixels = golden_pictures(both.bundle.image.height)[0]
    backend = UncachedBackend(reference)
    rows, exact = (b.logits(pixels, [(both.bundle.tokens.bos, 7)]) for b in (backend, backend.in_float64))
    assert exact.dtype == np.float64
    assert not np.array_equal(exact, exact.astype(np.float32)), "rounded to float32 on the way"
    np.testing.assert_allclose(rows, exact, atol=1e-5)


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: ",".join(f"{k}={v}" for k, v in given.items()))
def test_ids_and_scores_equal_generate_on_the_mean(given, both, reference):
    options = both.bundle.options(**{"max_new_tokens": 24} | given)
    pictures = random_pictures(6)
    theirs = reference.generate(reference.pixels(pictures), options)
    ours = list(both.caption(pictures, options, rows=3 * options.num_beams))
    assert [[one.ids for one in found.alternatives] for found in ours] == [[one.ids for one in o] for o in theirs]
    if options.num_beams > 1:
        scores = [one.score for found in ours for one in found.alternatives]
        assert scores == pytest.approx([one.score for several in theirs for one in several], abs=1e-5)


def test_ensemble_differs_from_each_member(both, tiny_captioner, other_bundle):
    """Otherwise the tests above would pass with only one of the bundles."""
    pictures, other = random_pictures(6), Captioner.load(other_bundle, backend="cpu", threads=1)
    runs = [[one.ids for one in c.caption(pictures, num_beams=4)] for c in (both, tiny_captioner, other)]
    assert all(len({runs[i][n] for i in range(3)}) > 1 for n in range(6))
    assert all(runs[0] != run for run in runs[1:])


def test_tiny_weight_has_no_effect(tiny_bundle, other_bundle, tiny_captioner):
    pictures = random_pictures(6)
    nearly = Captioner.load([tiny_bundle, other_bundle], weights=(1, 1e-9), backend="cpu", threads=1)
    alone = [one.ids for one in tiny_captioner.caption(pictures, num_beams=4)]
    assert [one.ids for one in nearly.caption(pictures, num_beams=4)] == alone


def test_out_of_memory_in_choice_is_reported(both, monkeypatch):
    """A run then continues with fewer images in parallel."""

    def full(*_):
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", full)  # the other graphs have bound memory
    with pytest.raises(OutOfMemoryError, match="the cpu backend failed"):
        list(both.caption(random_pictures(1)))


def test_padded_shapes_change_no_caption(both):
    padded = Captioner(both.bundle, PaddedBackend(EnsembleBackend.load(both.bundle, Runtime("cpu", threads=1))))
    pictures, options = random_pictures(9), DecodeOptions(num_beams=3, no_repeat_ngram_size=2, max_new_tokens=30)
    found, expected = ([one.ids for one in c.caption(pictures, options, rows=12)] for c in (padded, both))
    assert found == expected


def test_members_may_have_different_precisions(tiny_bundle, rounded_bundles, tiny_captioner):
    mixed = Captioner.load([tiny_bundle, *rounded_bundles.values()], weights=(8, 1, 1), backend="cpu", threads=1)
    assert mixed.bundle.precision == "fp32+fp16+int8"
    pictures = random_pictures(4)
    found, alone = ([one.ids for one in c.caption(pictures, num_beams=3)] for c in (mixed, tiny_captioner))
    assert found == alone  # all three are the same model


@pytest.fixture
def pictures(tmp_path) -> Path:
    return save_pictures(tmp_path / "pictures", 5)


def test_verify_checks_the_split_decoder(other_bundle, tmp_path):
    bundle = Path(shutil.copytree(other_bundle, tmp_path / "bundle"))

    def verified():
        result = CliRunner().invoke(main, ["verify", "--bundle", str(bundle), "--json"])
        checks = json.loads(result.stdout)["checks"]
        halves = [one["passed"] for one in checks if one["setting"].startswith("as one of several bundles: ")]
        return result.exit_code, [one["passed"] for one in checks[: -len(halves)]], halves

    assert verified() == (0, [True] * 6, [True] * 5), (
        "the setting with a greedy penalty is not replayed: it changes logits, which the split decoder does not return"
    )
    path = bundle / "choice.onnx"
    graph = onnx.load(str(path))
    for node in graph.graph.node:
        node.input[:] = ["turned" if name == LOG_PROBS else name for name in node.input]
    graph.graph.node.insert(0, onnx.helper.make_node("Neg", [LOG_PROBS], ["turned"]))
    path.write_bytes(graph.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][path.name] = file_sha256(path)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert verified() == (1, [True] * 6, [False] * 5)


def caption(*arguments):
    return CliRunner().invoke(main, ["caption", *map(str, arguments)])


@two_cores
def test_several_bundles_from_the_command_line(pictures, tiny_bundle, other_bundle, both, tmp_path):
    bundles = ("--bundle", tiny_bundle, "--bundle", other_bundle, "--bundle-weight", 1, "--bundle-weight", 0.5)
    common = (*bundles, "--input", pictures, "--beams", 3, "--max-new-tokens", 12)
    result = caption(*common, "--out", tmp_path / "run.csv")
    assert result.exit_code == 0, result.output
    first, second = (Bundle.load(path).digest[:12] for path in (tiny_bundle, other_bundle))
    assert f"bundle:1.0*{first}+0.5*{second}|" in result.stderr
    expected = both.caption(sorted(pictures.iterdir()), num_beams=3, max_new_tokens=12)
    lines = ["ID,Caption", *(f"{one.id},{one.text}" for one in expected)]
    assert (tmp_path / "run.csv").read_text().replace('"', "").splitlines() == lines
    again = caption(*common, "--processes", 2, "--out", tmp_path / "again.csv")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "run.csv").read_bytes()


def test_parity_command_accepts_several_bundles(tiny_checkpoint, tiny_bundle, other_checkpoint, other_bundle, tmp_path):
    pairs = ["--checkpoint", tiny_checkpoint, "--bundle", tiny_bundle]
    pairs += ["--checkpoint", other_checkpoint, "--bundle", other_bundle]
    more = ["--beams", 3, "--no-repeat-ngram", 3, "--max-new-tokens", 20, "--out", tmp_path / "parity.json"]
    result = CliRunner().invoke(parity, [*map(str, pairs), *map(str, more)])
    assert result.exit_code == 0, result.output
    (setting,) = json.loads((tmp_path / "parity.json").read_text())["settings"]
    assert setting["identical"] == setting["images"] == 3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--bundle", "A", "--bundle", "A"), "a bundle is given twice: give it once"),
        (("--bundle", "A", "--bundle", "B", "--bundle-weight", 1), "2 bundles and 1 weight"),
        (("--bundle", "A", "--bundle", "B", "--bundle-weight", 1, "--bundle-weight", 0), "must be a number above 0"),
        (("--bundle", "A", "--bundle", "B", "--bundle-weight", 1, "--bundle-weight", "nan"), "must be a number above"),
        (("--bundle", "A", "--bundle-weight", 1), "--bundle-weight needs at least two --bundle options"),
        (("--bundle", "A", "--bundle", "DEMO"), "differ in the tokenizer"),
        (("--bundle", "A", "--bundle", "B", "--backend", "openvino"), "caption together on cpu, cuda, torch, not on"),
    ],
)
def test_invalid_options_are_one_line_errors(given, sentence, pictures, tiny_bundle, other_bundle, tmp_path):
    names = {"A": tiny_bundle, "B": other_bundle, "DEMO": "engine/assets/demo"}
    arguments = [names.get(one, one) for one in given]
    result = caption(*arguments, "--input", pictures, "--out", tmp_path / "run.csv")
    assert result.exit_code != 0
    assert sentence in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run.csv").exists()


def test_old_bundle_must_be_exported_again(tiny_bundle, other_bundle, tmp_path):
    older = tmp_path / "older"
    older.mkdir()
    manifest = json.loads((other_bundle / "manifest.json").read_text())
    for graph in ("log_probs.onnx", "choice.onnx"):
        del manifest["files"][graph]
    for name in manifest["files"]:
        (older / name).hardlink_to(other_bundle / name)
    (older / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="was exported before bundles could caption together"):
        BundleRef((tiny_bundle, older)).open()
    assert [*Captioner.load(older, backend="cpu", threads=1).caption(random_pictures(1))]


def test_bundles_with_other_image_settings_are_refused(tiny_captioner):
    bundle = tiny_captioner.bundle
    for what, image in (("image size", {"height": 64}), ("resize filter", {"resample": "lanczos"})):
        with pytest.raises(BundleError, match=f"differ in the {what}"):
            combine([bundle, replace(bundle, image=replace(bundle.image, **image))], (1.0, 1.0))
    with pytest.raises(UsageError, match="no bundle is given"):
        Captioner.load([], weights=[1.0])

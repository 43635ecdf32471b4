"""The openvino backend: parity with generate, and bf16, which has no parity. Its cache: tests/unit/engine/backends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from engine.backends import open_backend
from engine.backends.openvino import OpenVinoBackend, import_openvino
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.cli.app import main
from engine.errors import UsageError
from engine.machine.verify import verify
from engine.options import DecodeOptions
from engine.runtime import Runtime
from export.precision import encoder_error
from export.precision import main as precision_main
from tests.helpers.earlier import bundle_of_084ae4d
from tests.helpers.tiny import random_pictures, save_pictures

IMAGES = 17
SCORE_TOLERANCE = 1e-4
"""As in test_generate.py; measured 2e-6."""
SETTINGS = {
    "greedy": {"no_repeat_ngram_size": 2},
    "greedy, penalty": {"repetition_penalty": 2.5, "prompt": "a picture of the chest"},
    "3 beams, prompt": {"num_beams": 3, "prompt": "a picture of the chest", "no_repeat_ngram_size": 3},
    "4 beams": {"num_beams": 4, "no_repeat_ngram_size": 3, "length_penalty": 2.0, "early_stopping": True},
    "4 beams, at least 6": {"num_beams": 4, "min_new_tokens": 6, "length_penalty": 0.6, "early_stopping": "never"},
    "3 beams, penalty, words": {"num_beams": 3, "repetition_penalty": 1.2, "bad_words": ("the", "white arrow")},
    "10 beams": {"num_beams": 10, "no_repeat_ngram_size": 2},
}
openvino = import_openvino()
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Path:
    """Use a separate cache for this module."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def captioner(tiny_bundle) -> Captioner:
    return Captioner.load(str(tiny_bundle), backend="openvino", threads=1)


@pytest.fixture(scope="module")
def pictures():
    return random_pictures(IMAGES)


@pytest.fixture(scope="module")
def pixel_values(pictures, tiny_reference):
    return tiny_reference.pixels(pictures)


def ids(captioner: Captioner, pictures, rows=20, **given):
    return [c.ids for c in captioner.caption(pictures, rows=rows, max_new_tokens=14, **given)]


@pytest.mark.parametrize("name", SETTINGS)
def test_captions_equal_generate(name, captioner, pictures, pixel_values, tiny_reference):
    num_beams = SETTINGS[name].get("num_beams", 1)
    options = DecodeOptions(**SETTINGS[name], max_new_tokens=14, num_return_sequences=num_beams)
    theirs = tiny_reference.generate(pixel_values, options)
    for slots in (IMAGES, 5, 1):
        count = 3 if slots == 1 else IMAGES
        ours = captioner.caption(pictures[:count], options, rows=slots * num_beams)
        for mine, expected in zip(ours, theirs[:count], strict=True):
            assert [a.ids for a in mine.alternatives] == [e.ids for e in expected]
            if num_beams > 1:
                np.testing.assert_allclose(
                    [a.score for a in mine.alternatives], [e.score for e in expected], atol=SCORE_TOLERANCE
                )


def test_prompts_and_sampling_equal_onnx_runtime(captioner, tiny_captioner, pictures):
    prompts = {str(i): ("", "a", "ct of the left upper lobe showing")[i % 3] for i in range(IMAGES)}
    for given in (
        {"num_beams": 3, "prompts": prompts},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 40, "seed": 5},
    ):
        assert ids(captioner, pictures, **given) == ids(tiny_captioner, pictures, **given)


def test_golden_recordings_replay(captioner, tmp_path):
    assert all(check.passed for check in verify(captioner.bundle, captioner.backend))
    earlier = Bundle.load(bundle_of_084ae4d(tmp_path / "bundle"))  # of format 1
    assert all(check.passed for check in verify(earlier, open_backend(earlier, Runtime("openvino"))))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fp16_and_int8_bundles_pass_verify(precision, rounded_bundles):
    bundle = Bundle.load(rounded_bundles[precision])
    assert all(check.passed for check in verify(bundle, open_backend(bundle, Runtime("openvino", threads=1))))
    with pytest.raises(UsageError, match=f"is {precision}, but --cpu-precision bf16 is for fp32 bundles"):
        OpenVinoBackend(bundle, cpu_precision="bf16")


def test_interleaved_iterations_are_independent(captioner, pictures):
    """Each iteration has its own keys and values; a shared request would mix them up."""
    expected = ids(captioner, pictures, num_beams=3), ids(captioner, pictures[::-1], num_beams=4)
    first, second = (
        captioner.caption(some, rows=8, max_new_tokens=14, num_beams=beams)
        for some, beams in ((pictures, 3), (pictures[::-1], 4))
    )
    found = [(one.ids, other.ids) for one, other in zip(first, second, strict=True)]
    assert tuple(zip(*found, strict=True)) == tuple(map(tuple, expected))


def test_threads_share_a_captioner(captioner, pictures):
    expected = [caption.ids for caption in captioner.caption(pictures, num_beams=2)]
    found: list[object] = []

    def caption() -> None:
        found.append([caption.ids for caption in captioner.caption(pictures, num_beams=2, rows=4)])

    threads = [threading.Thread(target=caption) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_streams_are_not_for_openvino():
    with pytest.raises(UsageError, match="streams are for the backend cpu, not for openvino: remove --streams"):
        Runtime("openvino", streams=2)


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("images"), IMAGES, name="{:02}.png")


def run(image_dir: Path, bundle: Path, out: Path, *more: object):
    words = ["caption", "--input", image_dir, "--bundle", bundle, "--out", out, "--beams", 3, "--rows", 6, *more]
    return CliRunner().invoke(main, [*map(str, words), "--json"])


def test_interrupted_run_resumes_only_on_same_backend(image_dir, tiny_bundle, tmp_path, monkeypatch):
    out, step, steps = tmp_path / "run.csv", OpenVinoBackend.step, []

    def interrupted(backend, cache, inputs):
        steps.append(1)
        if len(steps) > 40:
            raise KeyboardInterrupt
        return step(backend, cache, inputs)

    whole = run(image_dir, tiny_bundle, tmp_path / "whole.csv", "--backend", "cpu")
    assert whole.exit_code == 0, whole.output
    monkeypatch.setattr(OpenVinoBackend, "step", interrupted)
    cut = run(image_dir, tiny_bundle, out, "--backend", "openvino")
    assert cut.exit_code == 130, cut.output
    monkeypatch.undo()
    resumed = run(image_dir, tiny_bundle, out, "--backend", "openvino")
    assert resumed.exit_code == 0, resumed.output
    summary = json.loads(resumed.stdout.splitlines()[-1])
    assert 0 < summary["resumed"] < IMAGES
    assert "|backend:openvino|" in summary["signature"]
    assert "cpu_precision" not in summary["signature"]
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    out.unlink()
    steps.clear()
    monkeypatch.setattr(OpenVinoBackend, "step", interrupted)
    assert run(image_dir, tiny_bundle, out, "--backend", "openvino").exit_code == 130
    restarted = run(image_dir, tiny_bundle, out, "--backend", "cpu")
    assert "was moved to" in restarted.stderr
    assert json.loads(restarted.stdout.splitlines()[-1])["resumed"] == 0


def test_openvino_telemetry_is_off(tmp_path):
    """Its import would send data to Google Analytics and write an identifier to the home folder."""
    code = "import sys; from engine.backends import require_backend; require_backend('openvino')"
    code = f"{code}; print([name for name in sys.modules if 'telemetry' in name and '_stub' not in name])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "openvino_telemetry" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_environment_names_openvino_only_for_its_backend():
    from engine.bundle.signature import environment

    assert f"openvino:{openvino.__version__.partition('-')[0]}" in environment("openvino")
    assert "openvino" not in environment("cpu")


def test_bf16_rounds_products(captioner, pictures):
    """Uses the class itself, which does not check the processor: without bf16, OpenVINO may multiply in float32."""
    bundle = captioner.bundle
    rounded = OpenVinoBackend(bundle, threads=1, cpu_precision="bf16")
    pixels = np.stack([np.asarray(picture.resize((32, 32))) for picture in pictures])
    error = encoder_error(captioner.backend, rounded, pixels)
    assert error < 0.05
    if HAS_BF16:
        assert error > 1e-3, "nothing was rounded"
    rounded_ids = ids(Captioner(bundle, rounded), pictures, num_beams=4)
    same = sum(one == other for one, other in zip(rounded_ids, ids(captioner, pictures, num_beams=4), strict=True))
    assert same > IMAGES // 2


@pytest.mark.skipif(not HAS_BF16, reason="this processor has no instructions for bf16")
def test_bf16_run_is_labelled_and_reported(image_dir, tiny_bundle, tmp_path):
    rounded = ("--backend", "openvino", "--cpu-precision", "bf16")
    result = run(image_dir, tiny_bundle, tmp_path / "run.csv", *rounded)
    assert result.exit_code == 0, result.output
    assert "|cpu_precision:bf16 (not parity)|" in json.loads(result.stdout.splitlines()[-1])["signature"]
    words = ["--bundle", tiny_bundle, "--against", tiny_bundle, "--images", image_dir, "--out", tmp_path / "out.json"]
    compared = CliRunner().invoke(precision_main, [*map(str, words), *rounded])
    assert compared.exit_code == 0, compared.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["backend"], report["cpu_precision"], report["precision"]) == ("openvino", "bf16", "fp32")
    assert report["identical"] + len(report["differences"]) == IMAGES
    assert 1e-3 < report["encoder_error"] < 0.05
    assert 0 < report["max_score_drift"] < 0.1


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        ("openvino", "this processor has no instructions for bf16 (AVX512_BF16 or AMX)"),
        ("cpu", "ONNX Runtime supports bf16 only on ARM processors with bf16 instructions"),
        ("auto", "use --backend openvino, or remove --cpu-precision"),
    ],
)
def test_bf16_is_refused_without_cpu_support(backend, sentence, image_dir, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    result = run(image_dir, tiny_bundle, tmp_path / "run.csv", "--backend", backend, "--cpu-precision", "bf16")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert re.search(re.escape(sentence), line)
    assert not list(tmp_path.glob("run.csv*"))


def test_onnx_runtime_uses_bf16_fast_math_on_arm(tiny_bundle, tmp_path, monkeypatch):
    """Checks only the session setting, which has no effect on x86."""
    import onnxruntime

    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    monkeypatch.setattr("engine.host.CPUINFO", tmp_path / "cpuinfo")
    seen, session = [], onnxruntime.InferenceSession

    def watched(path, options, **more):
        try:
            seen.append(options.get_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16"))
        except RuntimeError:
            seen.append("")
        return session(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    bundle = Bundle.load(tiny_bundle)
    open_backend(bundle, Runtime("cpu", threads=1, cpu_precision="bf16"))
    assert set(seen) == {"1"}
    seen.clear()
    open_backend(bundle, Runtime("cpu", threads=1))
    assert set(seen) == {""}
    info = CliRunner().invoke(main, ["info", "--json"])
    assert json.loads(info.stdout)["bf16"] == "this processor supports --backend cpu --cpu-precision bf16 (not parity)"

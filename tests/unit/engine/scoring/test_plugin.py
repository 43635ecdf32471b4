"""Plug-ins, and metrics that need weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.scoring.base import Items, MetricInputs, UnavailableError
from engine.scoring.plugin import Plugin
from engine.scoring.profiles import make_metric
from tests.helpers.worked import WORKED, items

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


def test_the_spice_plugin_keeps_the_contract(tmp_path, monkeypatch):
    """Uses a stand-in for SPICE, which would download files."""
    package = tmp_path / "pycocoevalcap" / "spice"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "spice.py").write_text(
        "class Spice:\n"
        "    def compute_score(self, gts, res):\n"
        "        print('parsing')\n"
        "        assert list(gts) == list(res) == [0, 1, 2]\n"
        "        values = [len(set(res[i][0].split()) & set(gts[i][0].split())) / 10 for i in gts]\n"
        "        return 0.5, [{'All': {'f': value}} for value in values]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = f"{sys.executable} {PLUGIN.parent / 'spice.py'}"
    metric = Plugin("spice", MetricInputs(plugins={"spice": command}))
    candidates = ["a dog runs", "cat", "ct scan"]
    measured = metric.measure(items(candidates, [("a dog", "x"), "mri", "ct"]))
    assert measured.per_image.tolist() == [0.2, 0.0, 0.1]
    assert metric.signature().startswith("spice|plugin:spice:F1|text:raw|pycocoevalcap:")


@pytest.mark.parametrize(
    ("arguments", "expected", "signature"),
    [
        ("radgraph", [0.2, 0.0, 0.1], "radeval:radgraph/radgraph_simple|text:raw|radeval:2.2.1"),
        ("radgraph radgraph_partial", [0.4, 0.0, 0.2], "radeval:radgraph/radgraph_partial|text:raw|radeval:2.2.1"),
        ("ratescore", [0.2, 0.0, 0.1], "radeval:ratescore/ratescore|text:raw|radeval:2.2.1"),
    ],
)
def test_the_radeval_plugin_keeps_the_contract(tmp_path, monkeypatch, arguments, expected, signature):
    """Uses a stand-in for RadEval with its interface of 2.2.1: RadGraph F1 and RaTEScore would download models."""
    (tmp_path / "radeval").mkdir()
    (tmp_path / "radeval" / "__init__.py").touch()
    (tmp_path / "radeval" / "radeval.py").write_text(
        "class RadEval:\n"
        "    def __init__(self, metrics=None, per_sample=False, show_progress=True):\n"
        "        assert per_sample\n"
        "        (self.name,) = metrics\n"
        "    def __call__(self, refs, hyps):\n"
        "        print('loading')\n"
        "        values = [len(set(a.split()) & set(b.split())) / 10 for a, b in zip(refs, hyps, strict=True)]\n"
        "        if self.name == 'ratescore':\n"
        "            return {'ratescore': values}\n"
        "        return {'radgraph_simple': values, 'radgraph_partial': [2 * value for value in values]}\n"
    )
    info = tmp_path / "radeval-2.2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: radeval\nVersion: 2.2.1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = f"{sys.executable} {PLUGIN.parent / 'rad_eval.py'}"
    metric = Plugin("radgraph", MetricInputs(plugins={"radgraph": f"{command} {arguments}"}))
    texts = items(["a dog runs", "cat", "ct scan"], [("x", "a dog"), "mri", "ct"])
    assert metric.measure(texts).per_image.tolist() == expected
    assert metric.signature() == f"radgraph|plugin:{signature}"
    with pytest.raises(EngineError, match="exited with code 1"):
        Plugin("radgraph", MetricInputs(plugins={"radgraph": f"{command} radgraph f2"})).measure(texts)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("", "returned no score for 3 images, for example 0"),
        ('print(\'{"id": "9", "score": 1}\')', "returned no score"),
        (
            'for i in \'01233\': print(\'{"id": "%s", "score": 1}\' % i)',
            r"returned 3 twice or without a finite score \(line 5\)",
        ),
        (
            'for i in \'0123\': print(\'{"id": "%s", "score": 1}\' % i)',
            "returned a score for 3, which is not in the run",
        ),
        ("print('hello')", "returned an invalid line 1"),
        ('print(\'{"id": "0", "score": NaN}\')', "without a finite score"),
        ("raise SystemExit(3)", "exited with code 3"),
        ('print(\'{"id": 0, "score": 1}\')', "is not a string"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_an_error(code, sentence, tmp_path):
    (tmp_path / "x.py").write_text("import sys; sys.stdin.read()\n" + code)
    with pytest.raises(EngineError, match=sentence):
        Plugin("umls_f1", plugin(f"{sys.executable} {tmp_path / 'x.py'}")).measure(WORKED)


@pytest.mark.parametrize(
    ("command", "sentence"), [("python 'a", "a command that cannot be parsed"), (" ", "an empty command")]
)
def test_plugin_with_an_invalid_command(command, sentence):
    with pytest.raises(EngineError, match=sentence):
        Plugin("umls_f1", plugin(command)).measure(WORKED)


def test_plugin_that_does_not_exist_is_named():
    with pytest.raises(EngineError, match="cannot be started: No such file"):
        Plugin("umls_f1", plugin("/nowhere/at-all")).measure(WORKED)


@pytest.mark.parametrize("name", ["clinicalbleurt", "medbertscore", "similarity", "umls_f1", "alignscore"])
def test_metric_that_is_not_built_in_names_its_needs(name):
    with pytest.raises(UnavailableError, match=f"--plugin {name}=COMMAND"):
        make_metric(name, MetricInputs(), {}).measure(WORKED)


@pytest.mark.parametrize("name", ["bertscore", "bleurt", "clipscore", "refclipscore"])
def test_metrics_without_weights_name_the_option(name):
    metric = make_metric(name, MetricInputs(), {})
    with_images = Items(WORKED.ids, WORKED.candidates, WORKED.references, [Path("x")] * 3)
    with pytest.raises(UnavailableError, match="needs weights: --weights "):
        metric.measure(with_images)


# The command

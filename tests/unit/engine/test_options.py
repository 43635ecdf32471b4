"""Options are declared once, checked on construction, and override a bundle's settings everywhere."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from engine.captioner import Captioner
from engine.errors import UsageError
from engine.options import DECODE_OPTIONS, DecodeOptions, options_from
from engine.runtime import BACKENDS, Runtime, Workers


def test_given_options_override_the_bundle_and_defaults():
    options = options_from({"num_beams": 4, "max_length": 30}, {"num_beams": 2, "max_new_tokens": None})
    assert (options.num_beams, options.max_total_length(1), options.length_penalty) == (2, 30, 1.0)
    assert options_from({"max_length": 30}, {"max_new_tokens": 5}).max_total_length(4) == 9
    assert DecodeOptions().max_total_length(4) == 24


def test_options_know_what_was_given():
    asked = DecodeOptions(num_beams=1, prompt="a")
    assert asked.given == {"num_beams", "prompt"}
    assert asked.over({"num_beams": 4, "max_length": 64}) == DecodeOptions(num_beams=1, max_length=64, prompt="a")
    for copied in (replace(asked, min_length=3), pickle.loads(pickle.dumps(asked)), copy.deepcopy(asked)):
        assert copied.over({"num_beams": 4, "top_k": 9, "max_length": 64}).max_length == 64
        assert copied.num_beams == copied.over({"num_beams": 4}).num_beams == 1
    assert asked.replace(num_beams=2, top_k=50).given == {"num_beams", "prompt", "top_k"}
    everything = DecodeOptions(num_beams=2).over({})
    assert everything.over({"num_beams": 3, "max_length": 64}) == everything
    with pytest.raises(UsageError, match="3 captions per image need at least as many beams, not 1"):
        DecodeOptions(num_return_sequences=3).over({})
    assert DecodeOptions(num_return_sequences=3).over({"num_beams": 3}).num_return_sequences == 3
    with pytest.raises(UsageError, match="top_k: only for sampling"):
        DecodeOptions(top_k=50).over({})
    with pytest.raises(UsageError, match="unknown decoding options: beams"):
        DecodeOptions().over({"beams": 3})
    with pytest.raises(UsageError, match=r"unknown decoding options: beams, colour: use num_beams$"):
        DecodeOptions().replace(beams=3, colour="red")


@pytest.fixture(scope="module")
def demo_captioner() -> Captioner:
    return Captioner.load(backend="cpu")


def test_python_options_override_the_bundle(demo_captioner):
    long = demo_captioner.search(demo_captioner.bundle.options(num_beams=2))
    assert (long.num_beams, long.max_length, long.no_repeat_ngram_size) == (2, 64, 3)
    assert demo_captioner.search(DecodeOptions(num_beams=2)) == long
    images = sorted(Path("examples/images").iterdir())[:3]
    wanted = list(demo_captioner.caption(images, demo_captioner.bundle.options(num_beams=2)))
    assert list(demo_captioner.caption(images, DecodeOptions(num_beams=2))) == wanted
    assert list(demo_captioner.caption(images, num_beams=2)) == wanted
    assert list(demo_captioner.caption(images, DecodeOptions(num_beams=3), num_beams=2)) == wanted
    with pytest.raises(UsageError, match="beams: use num_beams"):
        demo_captioner.caption(images, beams=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_beams": 0},
        {"num_beams": 1.5},
        {"num_beams": True},
        {"no_repeat_ngram_size": -1},
        {"max_new_tokens": 0},
        {"length_penalty": float("nan")},
        {"length_penalty": "long"},
        {"early_stopping": "sometimes"},
        {"early_stopping": 1},
        {"length_penalty": 11},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"bad_words": "mass"},
        {"bad_words_ids": [[7], []]},
        {"bad_words_ids": [7]},
        {"suppress_tokens": [1.5]},
        {"begin_suppress_tokens": [-1]},
        {"num_beams": 1, "num_return_sequences": 2},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        DecodeOptions(**wrong)


@pytest.mark.parametrize("name", DECODE_OPTIONS)
def test_every_option_with_a_flag_is_on_the_command_line_with_its_help(name):
    from engine.cli.app import caption

    declaration, _ = DECODE_OPTIONS[name]
    (*_, parameter) = [p for p in caption.params if p.name == f"decoding_{name}"] or [None]
    if not declaration.flag:
        assert parameter is None
    else:
        assert (parameter.opts, parameter.help) == ([declaration.flag], declaration.help)
        assert parameter.default is None, "what a bundle may decide has no default on the command line"


def test_banned_words_replace_those_of_the_bundle():
    bundle = {"bad_words_ids": [[7], [8, 9]], "suppress_tokens": [3]}
    assert DecodeOptions().over(bundle).bad_words_ids == ((7,), (8, 9))
    words = DecodeOptions(bad_words=["the mass"]).over(bundle)
    assert (words.bad_words, words.bad_words_ids, words.suppress_tokens) == (("the mass",), None, (3,))
    assert not {"bad_words", "bad_words_ids"} & set(DecodeOptions(bad_words=[]).over(bundle).in_force())
    with pytest.raises(UsageError, match="give one of them"):
        DecodeOptions(bad_words=["a"], bad_words_ids=[[7]]).over({})


def test_runtime_and_workers_are_checked():
    with pytest.raises(UsageError, match=f"unknown backend 'gpu': choose one of {', '.join(BACKENDS)}"):
        Runtime("gpu")
    with pytest.raises(UsageError, match="--plans and --cuda-graphs are for the backend trt, not for cpu"):
        Runtime("cpu", cuda_graphs=True)
    with pytest.raises(UsageError, match="bf16 is for --backend cpu or openvino or torch, not for trt"):
        Runtime("trt", cpu_precision="bf16")
    with pytest.raises(UsageError, match="cpu_precision must be fp32, fp16 or bf16, not 'fp8'"):
        Runtime("cpu", cpu_precision="fp8")
    with pytest.raises(UsageError, match="--ray-actors is the number of workers on a Ray cluster"):
        Workers(actors=2)
    with pytest.raises(UsageError, match="--ray starts its workers on the cluster: remove --processes"):
        Workers("local", processes=2)
    with pytest.raises(UsageError, match="--devices starts one worker process per GPU: remove --processes"):
        Workers(processes=2, devices="cuda:0")
    with pytest.raises(UsageError, match="--devices cuda:0, cuda:00 lists a GPU twice"):
        Workers(devices="cuda:0, cuda:00")
    for none in ("gpu", "cuda", "0,1", "cuda:0,", "cuda:-1", "cpu", ""):
        with pytest.raises(UsageError, match=r"--devices expects GPUs such as cuda:0,cuda:1, not '"):
            Workers(devices=none)
    assert Workers(devices="cuda:0, cuda:3").gpus == [0, 3]

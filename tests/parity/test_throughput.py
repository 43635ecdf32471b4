"""The speed benchmark is void if a program gives a different caption that is not a tie."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks.programs import PROGRAMS, Timing, Worker
from benchmarks.throughput import agreement_of, fidelity_of, is_valid, main
from benchmarks.workload import EXAMPLES, Workload, read_references, write_corpus
from engine.bundle.manifest import Bundle, demo_bundle
from engine.bundle.tokenizer import CaptionTokenizer
from engine.options import DecodeOptions
from export.bundle import checkpoint_sha256
from tests.helpers.tiny import save_pictures

OPTIONS = DecodeOptions(num_beams=3, no_repeat_ngram_size=3, max_new_tokens=10).over({})
IMAGES = 6


@pytest.mark.parametrize("wrong", ["engine", "generate"])
def test_real_mismatch_voids_the_measurement(wrong, tiny_checkpoint, tiny_bundle, tiny_captioner, tmp_path):
    pictures = save_pictures(tmp_path / "pictures", IMAGES, name="{:02}.png")
    workload = Workload("tiny", tiny_checkpoint, tiny_bundle, pictures, 10)
    ids = [caption.ids for caption in tiny_captioner.caption(sorted(pictures.iterdir()), OPTIONS)]
    agreed = {"tie": 0, "batch": 0, "real": 0}
    counts = agreement_of(workload, OPTIONS, {"engine": ids, "generate": list(ids)})
    assert counts == {"generate": {"identical": IMAGES, **agreed}}
    assert is_valid(counts)
    fewer = agreement_of(workload, OPTIONS, {"engine": ids, "generate": ids[:2]})
    assert fewer == {"generate": {"identical": 2, **agreed}}
    other = [*ids[:-1], (*ids[-1][:-2], ids[-1][-2] + 1, ids[-1][-1])]
    counts = agreement_of(workload, OPTIONS, {"engine": ids, "generate": ids} | {wrong: other})
    assert counts == {"generate": {"identical": IMAGES - 1, **agreed, "real": 1}}
    assert not is_valid(counts)


def test_fidelity_counts_captions_and_compares_rouge1(tmp_path):
    workload = Workload("demo", tmp_path, demo_bundle(), write_corpus(tmp_path / "pictures", 40, EXAMPLES), 40)
    references = read_references(workload)
    assert len(references) == 40
    assert references[0] == references[32]  # made from the same example
    tokenizer = CaptionTokenizer(Bundle.load(demo_bundle()))
    ids = [tokenizer.prompt_ids(reference.lower()) for reference in references]
    assert fidelity_of(workload, ids, ids) == {
        "images": 40,
        "identical": 40,
        "rouge1": {"difference": 0.0, "low": 0.0, "high": 0.0},
    }
    worse = fidelity_of(workload, ids, [ids[1], *ids[1:]])
    assert worse["identical"] == 39
    assert worse["rouge1"]["difference"] < 0 == worse["rouge1"]["high"]
    fewer = fidelity_of(replace(workload, name="base"), ids, ids[:3])
    assert fewer == {"images": 3, "identical": 3, "rouge1": None}
    fewer = fidelity_of(workload, ids, ids[:3])
    assert (fewer["images"], fewer["rouge1"]["difference"]) == (3, 0.0)


class InProcess(Worker):
    """A program in this process: a process of its own would import torch again, which takes half a minute."""

    def __init__(self, name, setting):
        self.name, self.load_s, self._caption = name, 0.0, PROGRAMS[name](setting)

    def caption(self, count, batch=1):
        ids, unfilled_s = self._caption(count, batch)
        return Timing(0.1, ids, 0.5, unfilled_s)

    def stop(self):
        pass


def test_own_checkpoint_next_to_generate(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # as if it had been exported by an earlier measurement
    build = tmp_path / f"build/workload/{tiny_checkpoint.name}-{checkpoint_sha256(tiny_checkpoint)[:12]}"
    build.mkdir(parents=True)
    (build / "bundle").symlink_to(tiny_bundle)
    monkeypatch.setattr("benchmarks.throughput.Worker", InProcess)
    save_pictures(tmp_path / "images", 3)
    words = ["--checkpoint", str(tiny_checkpoint), "--input", "images", "--repeats", "1", "--beams", "2"]
    done = CliRunner().invoke(main, [*words, "--forced-tokens", "5"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    (path,) = (tmp_path / "build/benchmarks").iterdir()
    assert record == json.loads(path.read_text()), "one JSON line, and never a tracked record"
    assert list(record["programs"]) == ["engine", "generate"]
    assert record["agreement"]["generate"]["identical"] == record["setting"]["images"] == 3
    assert record["new_tokens"]["least"] == record["new_tokens"]["most"] == 5
    assert record["machine"]["processor"] in done.stderr
    assert re.search(r"^generate +\d+ .* GiB +3 of 3$", done.stderr, re.MULTILINE)
    for more in (["--record"], ["--workload", "base"], ["--program", "engine-int8"]):
        refused = CliRunner().invoke(main, [*words, *more])
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert CliRunner().invoke(main, words[:2]).exit_code == 2
    tracked = CliRunner().invoke(main, [*words, "--out", "benchmarks/results/x.json"])
    assert "would be among the tracked records" in tracked.stderr

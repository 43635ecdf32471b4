"""The work that the benchmarks count, and the corpus that they run on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.neighbour import neighbour, timed
from benchmarks.roofline import (
    CONFIGS,
    DEVICES,
    ModelWork,
    Work,
    count_work,
    floor_s,
    forced_work,
    host_s_per_image,
    measure_matmul,
)
from benchmarks.soak import tenth_speed
from benchmarks.tables import agreement
from benchmarks.workload import Workload, describe_machine, record_path, write_corpus
from engine.host import descendants
from engine.options import DecodeOptions
from tests.helpers.tiny import random_pictures, save_pictures

EXAMPLES = Path(__file__).parents[3] / "examples/images"


def pixels(captioner, count):
    from engine.inputs.pixels import read_image

    spec = captioner.bundle.image
    return np.stack([read_image(p, spec.height, spec.width, spec.resample) for p in random_pictures(count)])


def test_corpus_is_reproducible_and_has_no_duplicates(tmp_path):
    first, second = (write_corpus(tmp_path / name, 40, EXAMPLES) for name in ("a", "b"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(first.iterdir())]
    assert digests == [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(second.iterdir())]
    assert len(set(digests)) == 40


def test_encoder_work_matches_torch(tiny_checkpoint, tiny_reference):
    encoder = tiny_reference.family.encoder(tiny_reference.model, (1 / 255, [0.5] * 3, [0.5] * 3))
    size = tiny_reference.sizes.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    # the class position has no patch embedding, but ModelWork counts one for it
    vision = tiny_reference.model.config.vision_config
    patch = 2 * 3 * vision.patch_size**2 * vision.hidden_size
    assert ModelWork.of(tiny_checkpoint).encoder_flops == counter.get_total_flops() + patch


@pytest.mark.parametrize(("rows", "cached"), [(1, 0), (3, 5)])
def test_row_and_position_work_match_torch(tiny_checkpoint, tiny_reference, rows, cached):
    from export.graphs.exporters import DecoderSpec

    step = tiny_reference.family.step(tiny_reference.model)
    config = DecoderSpec(step)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step(
            torch.ones(1, rows, dtype=torch.long),
            torch.zeros(1, rows, dtype=torch.long),
            torch.zeros(1, rows),
            torch.full((1, rows, 1), -1),
            torch.ones(2),
            torch.ones(1, rows, cached + rows, dtype=torch.bool),
            torch.tensor([2]),
            config.cache(1, step.sizes.encoder_positions),
            config.cache(1, cached),
            config.cache(1, 0),
        )
    model = ModelWork.of(tiny_checkpoint)
    assert Work(0, 1, rows, rows * (cached + rows)).flops(model) == counter.get_total_flops()


def test_only_useful_rows_count(tiny_captioner):
    """Five images, two beams, captions of exactly four tokens: one row in the first step, two in the other three."""
    options = DecodeOptions(num_beams=2, max_new_tokens=4, min_new_tokens=4)
    work = count_work(tiny_captioner, pixels(tiny_captioner, 5), options)
    assert (work.images, work.image_steps, work.rows) == (5, 20, 5 * (1 + 3 * 2))
    assert work.positions == 5 * (1 + 2 * (2 + 3 + 4))


def test_measure_matmul_for_both_libraries():
    peak = measure_matmul(threads=1, seconds=0.05)
    assert all(speed > 1e8 for speed in peak.values()), peak


def test_floor_is_bound_by_arithmetic_or_memory():
    model = ModelWork(1e9, 1e8, 0, 4e8, 4e8, 1e7, 0)
    work = Work(images=10, image_steps=200, rows=800, positions=0)
    a100 = DEVICES["a100"]
    assert floor_s(work, model, a100, 1000, "fp32") == pytest.approx(100 * work.flops(model) / 19.5e12)
    assert floor_s(work, model, a100, 1000, "fp16") == pytest.approx(100 * work.least_bytes(model, 256) / 1.555e12 / 2)


@pytest.mark.parametrize(("name", "gflop"), [("base", 35.1 + 5.6), ("large", 123 + 7.4)])
def test_encoder_flops_match_published_vit(name, gflop):
    """ViT-B/16 takes 17.6 GMACs at 224 px, ViT-L/16 61.6 (Dosovitskiy et al.); cross keys and values come on top."""
    assert ModelWork.of_config(CONFIGS[name]).encoder_flops == pytest.approx(gflop * 1e9, rel=0.02)


def test_forced_work_has_every_beam_in_every_step():
    work = forced_work(images=3, beams=4, tokens=5)
    assert (work.image_steps, work.rows, work.positions) == (15, 60, 3 * 4 * 15)


def test_host_s_per_image():
    assert 0 < host_s_per_image(4, images=20, rows=40) < 0.1


def test_tenth_speed():
    stamps = [0.1 * i for i in range(1, 91)] + [9.0 + 0.2 * i for i in range(1, 11)]
    assert tenth_speed(stamps, 1) == pytest.approx(10)
    assert tenth_speed(stamps, 10) == pytest.approx(5)


def test_plot_soak_with_faults(tmp_path):
    from benchmarks.plots import plot_soak

    samples = [(float(i), i * 20, 1.0) for i in range(1, 60)]
    faults = [(10.0, "kill", 200), (30.0, "full disk", 600), (40.0, "term", 800)]
    parts = {"undisturbed": {"samples": samples}, "disturbed": {"samples": samples, "faults": faults}}
    plot_soak([{"benchmark": "soak", "setting": {"images": 1200}, **parts}]).savefig(tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_tracked_records_are_only_overwritten_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record_path("x.json") == Path("build/benchmarks/x.json")
    assert record_path("x.json", record=True) == Path("benchmarks/results/x.json")
    assert record_path("x.json", tmp_path / "new" / "y.json") == tmp_path / "new" / "y.json"
    assert (tmp_path / "new").is_dir()


def test_records_name_the_processor():
    machine = describe_machine()
    assert machine["processor"]
    assert set(machine["instructions"]) <= {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16"} | {
        "amx_int8",
        "amx_bf16",
    }


def test_policies_of_a_busy_neighbour(tiny_bundle, tmp_path):
    workload = Workload("tiny", tmp_path, tiny_bundle, tmp_path / "pictures", 6)
    save_pictures(workload.pictures, 3)
    before = descendants(os.getpid())
    with neighbour(2):
        assert len(descendants(os.getpid())) == len(before) + 2
    runs = [timed(policy, workload, 2, 1) for policy in ("", "--threads 2 --streams 1")]
    assert runs[0][1] == runs[1][1]
    assert descendants(os.getpid()) == before
    with pytest.raises(click.ClickException, match="--colour"):
        timed("--colour red", workload, 2, 1)


def test_agreement_says_all_only_if_every_program_agrees():
    equal, tie = ({"identical": count, "tie": 2 - count, "batch": 0, "real": 0} for count in (2, 1))
    assert agreement({"agreement": {"generate": equal, "openvino": equal}}) == "all"
    assert agreement({"agreement": {"generate": tie, "openvino": equal}}) == "1 of 2 (1 tie); 2 of 2"

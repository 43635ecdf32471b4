"""The number of slots that a search, a model and the available memory allow."""

from __future__ import annotations

import pytest

from engine.backends.device import MEMORY_SHARE, slot_bytes, slots_for
from engine.bundle.manifest import ModelDims
from engine.decoding.backend import BatchSizes
from engine.decoding.beam import Search
from engine.host import available_memory

BASE = ModelDims(num_layers=12, num_heads=12, head_width=64, vocab_size=30524, max_positions=512, encoder_positions=197)
BATCH_SIZES = BatchSizes(rows=256, encode_batch=2)


def search(num_beams: int, max_length: int = 65) -> Search:
    return Search((30522,), num_beams, max_length, 0, 1.0, False, 3, 1, 102, 30524)


@pytest.mark.parametrize(("num_beams", "slots"), [(1, 256), (4, 64), (10, 25), (300, 1)])
def test_slots_with_plenty_of_memory(num_beams, slots):
    assert slots_for(search(num_beams), [BASE], BATCH_SIZES, memory_bytes=1 << 40) == slots


def test_slots_stay_within_memory_share():
    memory = 4 << 30
    slots = slots_for(search(4), [BASE], BATCH_SIZES, memory_bytes=memory)
    assert 1 < slots < 64
    assert slots * slot_bytes(search(4), BASE) <= MEMORY_SHARE * memory < (slots + 1) * slot_bytes(search(4), BASE)


def test_one_slot_without_memory():
    assert slots_for(search(10), [BASE], BATCH_SIZES, memory_bytes=0) == 1


def test_explicit_rows_are_not_limited():
    assert slots_for(search(4), [BASE], BATCH_SIZES, rows=2000, memory_bytes=1) == 500
    assert slots_for(search(4), [BASE], BATCH_SIZES, rows=3, memory_bytes=1) == 1


def test_cross_attention_of_base_takes_14_5_mb_a_slot():
    """12 layers x keys and values x 197 positions x 768 x 4 bytes."""
    grown = slot_bytes(search(4), BASE) - slot_bytes(search(4), ModelDims(12, 12, 64, 30524, 512, 0))
    assert grown == 2 * 12 * 197 * 768 * 4 == 14_524_416


def test_slot_bytes_grow_with_length_and_beams():
    assert slot_bytes(search(4, 200), BASE) > slot_bytes(search(4), BASE)
    assert slot_bytes(search(10), BASE) > slot_bytes(search(4), BASE)


def test_available_memory_is_plausible():
    assert 1 << 20 < available_memory() < 1 << 50


def test_available_memory_in_nested_cgroups(tmp_path, monkeypatch):
    """A group without a limit, below a batch job limited to 3 GB, of which 1 GB is used, half of it page cache."""
    job, step = tmp_path / "job", tmp_path / "job" / "step"
    step.mkdir(parents=True)
    for group, limit in ((job, "3000000000"), (step, "max")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("1000000000\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    monkeypatch.setattr("engine.host._groups", lambda _: [step, job, tmp_path])
    monkeypatch.setattr("engine.host._machine_memory", lambda: 1 << 40)
    assert available_memory() == 2_500_000_000

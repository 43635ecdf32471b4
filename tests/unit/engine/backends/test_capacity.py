"""How many images are decoded side by side."""

from __future__ import annotations

import pytest

from engine.backends.device import MEMORY_SHARE, slot_bytes, slots_for
from engine.bundle.manifest import ModelDims
from engine.decoding.backend import BatchSizes
from engine.decoding.beam import Search
from engine.host import available_memory

BASE = ModelDims(num_layers=12, num_heads=12, head_width=64, vocab_size=30524, max_positions=512, encoder_positions=197)
APPETITE = BatchSizes(rows=256, encode_batch=2)


def search(num_beams: int, max_length: int = 65) -> Search:
    return Search((30522,), num_beams, max_length, 0, 1.0, False, 3, 1, 102, 30524)


@pytest.mark.parametrize(("num_beams", "slots"), [(1, 256), (4, 64), (10, 25), (300, 1)])
def test_with_plenty_of_memory_the_device_decides(num_beams, slots):
    assert slots_for(search(num_beams), [BASE], APPETITE, memory_bytes=1 << 40) == slots


def test_keys_and_values_stay_within_their_share_of_the_memory():
    memory = 4 << 30
    slots = slots_for(search(4), [BASE], APPETITE, memory_bytes=memory)
    assert 1 < slots < 64
    assert slots * slot_bytes(search(4), BASE) <= MEMORY_SHARE * memory < (slots + 1) * slot_bytes(search(4), BASE)


def test_one_image_is_decoded_however_little_memory_there_is():
    assert slots_for(search(10), [BASE], APPETITE, memory_bytes=0) == 1


def test_rows_that_are_asked_for_are_taken_at_their_word():
    assert slots_for(search(4), [BASE], APPETITE, rows=2000, memory_bytes=1) == 500
    assert slots_for(search(4), [BASE], APPETITE, rows=3, memory_bytes=1) == 1


def test_cross_attention_keys_of_base_take_14_5_mb_a_slot():
    """12 layers x keys and values x 197 positions x 768 x 4 bytes."""
    grown = slot_bytes(search(4), BASE) - slot_bytes(search(4), ModelDims(12, 12, 64, 30524, 512, 0))
    assert grown == 2 * 12 * 197 * 768 * 4 == 14_524_416


def test_longer_captions_and_more_beams_need_more():
    assert slot_bytes(search(4, 200), BASE) > slot_bytes(search(4), BASE)
    assert slot_bytes(search(10), BASE) > slot_bytes(search(4), BASE)


def test_some_memory_is_available_here():
    assert 1 << 20 < available_memory() < 1 << 50


def test_the_tightest_group_above_this_process_counts_and_file_cache_does_not(tmp_path, monkeypatch):
    """A batch job limited to 3 GB with 1 GB in use, half of it cache, in a group without a limit of its own."""
    job, step = tmp_path / "job", tmp_path / "job" / "step"
    step.mkdir(parents=True)
    for group, limit in ((job, "3000000000"), (step, "max")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("1000000000\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    monkeypatch.setattr("engine.host._groups", lambda _: [step, job, tmp_path])
    monkeypatch.setattr("engine.host._machine_memory", lambda: 1 << 40)
    assert available_memory() == 2_500_000_000

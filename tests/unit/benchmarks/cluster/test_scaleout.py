"""The simulation of a cluster, where the answer can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cluster.scaleout_model import Stages, simulate
from engine.cluster.driver import BLOCKS_PER_ACTOR, MOST_IN_BLOCK, block_size
from engine.cluster.worker import MESSAGES_PER_BLOCK

FREE = Stages(read_s=0, caption_s=1, start_s=0, list_s=0, write_s=0, block_s=0, message_s=0, record_s=0)


@pytest.mark.parametrize("actors", [1, 4, 16])
def test_workers_that_never_wait_share_the_work(actors):
    outcome = simulate(FREE, 1024, actors)
    assert outcome.seconds == 1024 / actors
    assert (outcome.worker_busy, outcome.driver_busy, outcome.bottleneck) == (1, 0, "captioning")


def test_a_driver_that_takes_as_long_as_a_worker_bounds_many():
    outcome = simulate(replace(FREE, record_s=1), 1024, 64)
    first = block_size(1024, 64) / MESSAGES_PER_BLOCK  # nothing to record before the first message
    assert outcome.seconds == pytest.approx(1024 + max(1, first))
    assert outcome.bottleneck == "driver: messages and journal"


def test_what_is_serial_is_added_once():
    stages = replace(FREE, list_s=0.5, write_s=0.25, start_s=7)
    assert simulate(stages, 64, 4).seconds == 64 * 0.75 + 7 + 16
    assert simulate(stages, 64, 4).bottleneck == "driver: listing and writing"
    assert simulate(replace(stages, list_s=0, write_s=0), 64, 4).bottleneck == "starting the workers"


def test_reading_goes_on_beside_captioning():
    assert simulate(replace(FREE, read_s=2, readers=4), 100, 1).seconds == 100
    slow = simulate(replace(FREE, read_s=8, readers=4), 100, 1)
    assert (slow.seconds, slow.bottleneck) == (200, "reading")


def test_more_workers_than_images_leave_some_idle():
    assert simulate(FREE, 4, 100).seconds == 1
    assert simulate(FREE, 4, 100).bottleneck == "too few images"


def test_blocks_are_small_enough_for_all_and_large_enough_for_slots():
    assert block_size(1, 8) == 1
    assert block_size(300, 2) * 2 * BLOCKS_PER_ACTOR >= 300
    assert block_size(10**6, 2) == MOST_IN_BLOCK

"""How many workers a cluster gets; without a cluster."""

from __future__ import annotations

import pytest

from engine.errors import EngineError, UsageError
from engine.workers.cluster import WorkerPlan, plan_actors

ONE, TWO, EIGHT = {"CPU": 2.0}, [{"CPU": 16.0}, {"CPU": 8.0}], [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0}]


@pytest.mark.parametrize(
    ("nodes", "gpus", "actors", "threads", "team"),
    [
        ([ONE], 0, None, None, WorkerPlan(1, 2, 0, 1)),
        ([ONE], 0, 2, None, WorkerPlan(2, 1, 0, 2)),
        ([ONE], 0, None, 1, WorkerPlan(2, 1, 0, 2)),
        (TWO, 0, None, None, WorkerPlan(3, 8, 0, 2)),
        (TWO, 0, 6, None, WorkerPlan(6, 4, 0, 4)),
        (EIGHT, 8, None, None, WorkerPlan(8, 1, 1, 8)),
        (EIGHT, 8, 2, 4, WorkerPlan(2, 4, 1, 2)),
        (EIGHT, 8, None, 16, WorkerPlan(4, 16, 1, 4)),
    ],
)
def test_workers_are_as_many_as_there_is_room_for(nodes, gpus, actors, threads, team):
    assert plan_actors(nodes, gpus, actors=actors, threads=threads) == team


def test_more_workers_than_there_is_room_for_are_refused():
    with pytest.raises(UsageError, match="room for 2 workers with 1 CPU"):
        plan_actors([ONE], 0, actors=3, threads=None)
    with pytest.raises(UsageError, match="room for 8 workers with a GPU and 1 CPU"):
        plan_actors(EIGHT, 8, actors=9, threads=None)
    with pytest.raises(UsageError, match="room for 0 workers with a GPU and 1 CPU"):
        plan_actors([{"GPU": 4.0}], 4, actors=None, threads=None)
    with pytest.raises(EngineError, match="has no CPUs"):
        plan_actors([{"memory": 1.0}], 0, actors=None, threads=None)

"""Resources of each worker process, on simulated machines."""

from __future__ import annotations

import ctypes

import pytest

from engine.backends import providers
from engine.errors import UsageError
from engine.runtime import Runtime, Workers
from engine.workers import processes
from engine.workers.processes import WorkerResources, describe, plan_workers

FOUR = (frozenset({0, 1}), frozenset({2, 3}))


@pytest.fixture(autouse=True)
def _five_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: 5)
    monkeypatch.setattr(processes, "core_shares", lambda count: list(FOUR[:count]))


def test_processes_share_cores_and_threads():
    assert plan_workers(Runtime("cpu"), Workers(processes=2)) == [
        WorkerResources(3, FOUR[0]),
        WorkerResources(2, FOUR[1]),
    ]
    assert plan_workers(Runtime("cpu", threads=2), Workers(processes=2)) == [
        WorkerResources(1, FOUR[0]),
        WorkerResources(1, FOUR[1]),
    ]
    assert plan_workers(Runtime("cpu"), Workers()) == []
    assert describe(plan_workers(Runtime("cpu"), Workers(processes=2))) == "2 worker processes with 5 threads in all"


@pytest.mark.parametrize(
    ("runtime", "workers", "said"),
    [
        (Runtime("cuda"), Workers(processes=2), "works with the backends cpu and openvino, not with cuda"),
        (Runtime("cpu"), Workers(devices="cuda:0"), "--devices are GPUs, which the backend cpu does not use"),
        (Runtime("openvino"), Workers(devices="cuda:0"), "--devices are GPUs, which the backend openvino does not use"),
        (Runtime("cpu"), Workers(processes=6), "6 processes need at least as many cores, not 5: lower --processes"),
        (Runtime("cpu", threads=1), Workers(processes=2), "2 processes need at least as many threads, not 1"),
        (Runtime("trt"), Workers(devices="cuda:1,cuda:2"), "no cuda:2, only cuda:0, cuda:1"),
    ],
)
def test_impossible_workers_are_refused(runtime, workers, said, monkeypatch):
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(UsageError, match=said):
        plan_workers(runtime, workers)


class Driver:
    """Stands in for NVIDIA's driver with three GPUs, as far as they are counted."""

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return flags

    def cuDeviceGetCount(self, count) -> int:  # noqa: N802
        count._obj.value = 3
        return 0


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, ["0", "2"]), ("5, GPU-3f,7", ["5", "7"]), ("5,6,7,-1,8", ["5", "7"])]
)
def test_worker_sees_only_its_gpu(visible, seen, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    if visible is None:
        monkeypatch.delenv(providers.VISIBLE, raising=False)
    else:
        monkeypatch.setenv(providers.VISIBLE, visible)
    first, second = plan_workers(Runtime("cuda"), Workers(devices="cuda:0,cuda:2"))
    assert [first.environment, second.environment] == [{providers.VISIBLE: name} for name in seen]
    assert (first.threads, second.threads, first.cores) == (3, 2, frozenset())
    assert describe([first, second]) == "2 worker processes on cuda:0, cuda:2"

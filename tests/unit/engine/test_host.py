"""Cores and memory that a container allows, and how cores are divided."""

from __future__ import annotations

import pytest

from engine import host


@pytest.mark.parametrize(
    ("files", "own", "cores"),
    [
        ({"cpu.max": "200000 100000"}, "0::/", 2),
        ({"cpu.max": "150000 100000", "job/cpu.max": "max 100000"}, "0::/job", 2),
        ({"cpu.max": "max 100000", "job/cpu.max": "50000 100000"}, "0::/job", 1),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/", 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", 64),
        ({"cpu.max": "broken"}, "0::/", 64),
        ({}, "0::/", 64),
    ],
)
def test_available_cores_follow_the_container_quota(files, own, cores, tmp_path, monkeypatch):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    (tmp_path / "own").write_text(own + "\n")
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert host.available_cores() == cores


SIBLINGS = {0: (0, 0), 1: (1, 0), 2: (0, 1), 3: (1, 1), 4: (0, 0), 5: (1, 0), 6: (0, 1), 7: (1, 1)}
"""Socket and physical core of a machine with two sockets of two cores, each of two threads, as Linux counts them."""


@pytest.mark.parametrize(
    ("count", "shares"),
    [
        (2, [{0, 4, 2, 6}, {1, 5, 3, 7}]),
        (4, [{0, 4}, {2, 6}, {1, 5}, {3, 7}]),
        (3, [{0, 4, 2}, {6, 1, 5}, {3, 7}]),
        (9, [set()] * 9),
    ],
)
def test_workers_get_neighbouring_cores(count, shares, tmp_path, monkeypatch):
    for number, (socket, core) in SIBLINGS.items():
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{socket}\n")
        (topology / "core_id").write_text(f"{core}\n")
    monkeypatch.setattr(host, "CPUS", tmp_path)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(SIBLINGS), raising=False)
    monkeypatch.setattr(host.os, "sched_setaffinity", lambda *_: None, raising=False)
    assert host.core_shares(count) == shares

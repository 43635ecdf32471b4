"""What a container allows this process."""

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
def test_cores_are_those_of_the_containers_quota(files, own, cores, tmp_path, monkeypatch):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    (tmp_path / "own").write_text(own + "\n")
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert host.available_cores() == cores

"""Memory and cores, with cgroup limits of both versions laid out in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from autoglm.deploy import machine


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(machine, "CGROUP_ROOT", root)
    monkeypatch.setattr(machine, "CGROUP_OF_PROCESS", tmp_path / "self")
    monkeypatch.setattr(machine, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpus")
    lay(tmp_path, meminfo=f"MemTotal:  9 kB\nMemAvailable:  {100 << 20} kB")
    lay_cores(tmp_path, 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    return root


def lay(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def lay_cores(folder: Path, count: int) -> None:
    """64 hardware threads on so many cores."""
    for cpu in range(64):
        lay(folder / "cpus" / f"cpu{cpu}" / "topology", core_cpus_list=f"core {cpu % count}")


def test_without_limits_the_system_decides(cgroup: Path) -> None:
    assert machine.available_memory_bytes() == 100 << 30
    assert machine.usable_cores() == 64


def test_version_2_takes_the_tightest_level(cgroup: Path) -> None:
    (cgroup.parent / "self").write_text("0::/pod/app\n")
    lay(cgroup / "pod" / "app", memory__max="max", memory__current="1000", cpu__max="max 100000")
    lay(
        cgroup / "pod",
        memory__max=str(8 << 30),
        memory__current=str(3 << 30),
        memory__stat=f"anon 5\ninactive_file {1 << 30}",
        cpu__max="250000 100000",
    )
    assert machine.available_memory_bytes() == 6 << 30, "limit - usage + droppable page cache"
    assert machine.usable_cores() == 3, "a quota of 2.5 cores keeps 3 threads busy"


def test_version_1_reads_its_own_files(cgroup: Path) -> None:
    (cgroup.parent / "self").write_text("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n")
    lay(cgroup / "memory" / "docker" / "x", memory__limit_in_bytes=str(4 << 30), memory__usage_in_bytes=str(1 << 30))
    lay(cgroup / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    lay(cgroup / "cpu,cpuacct" / "docker" / "x", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")
    assert machine.available_memory_bytes() == 3 << 30
    assert machine.usable_cores() == 1


def test_container_that_sees_only_its_own_root(cgroup: Path) -> None:
    (cgroup.parent / "self").write_text("0::/../../kubepods/x\n")
    lay(cgroup, memory__max=str(2 << 30), memory__current=str(3 << 30))
    assert machine.available_memory_bytes() == 0, "over its limit: nothing is free, and never less"


def test_affinity_and_physical_cores_bound_the_threads(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert machine.usable_cores() == 3
    lay_cores(cgroup.parent, 2)
    assert machine.usable_cores() == 2


def test_a_read_test_leaves_every_last_level_cache_behind(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = cgroup.parent / "cpus"
    assert machine.read_test_bytes() == 1 << 30, "no caches told"
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        lay(cpus / f"cpu{cpu}" / "cache" / "index2", level="2", size="1024K", shared_cpu_list=str(cpu))
        lay(cpus / f"cpu{cpu}" / "cache" / "index3", level="3", size="65536K", shared_cpu_list=shared)
    assert machine.read_test_bytes() == 16 * 2 * (64 << 20), "two caches of 64 MB, each shared by two"
    lay(cgroup.parent, meminfo=f"MemAvailable: {100 << 10} kB")
    assert machine.read_test_bytes() == 50 << 20


def test_this_machine_answers_sensibly() -> None:
    assert machine.available_memory_bytes() > 1 << 20
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)
    assert machine.cpu_name()


def test_the_system_tells_what_psutil_tells() -> None:
    assert machine._physical_cores() == psutil.cpu_count(logical=False)
    assert machine._system_free_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_without_the_systems_files_psutil_tells(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MEMORY_INFO", cgroup / "none")
    monkeypatch.setattr(machine, "CPUS", cgroup / "none")
    assert machine._physical_cores() == psutil.cpu_count(logical=False)
    assert machine._system_free_bytes() > 1 << 20

"""What this machine gives us: free memory and processor cores, inside a container's limits too.

Memory is what a new allocation can get without swapping: the smaller of the system's "available" and what the
cgroup (v1 or v2, every level up to the root) leaves. Cores are physical ones, since two hardware threads of a core
share the vector units the kernels live on, cut by CPU affinity and by the cgroup's CPU quota.
Sources: kernel documentation admin-guide/cgroup-v1/memory.rst and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_OF_PROCESS = Path("/proc/self/cgroup")
CPUS = Path("/sys/devices/system/cpu")
MEMORY_INFO = Path("/proc/meminfo")
# cgroup v1 writes "no limit" as a number near 2^63; no machine has an exabyte.
_NO_LIMIT_BYTES = 1 << 60


def available_memory_bytes() -> int:
    """Memory a new allocation can get now without swapping, in bytes."""
    available = _system_free_bytes()
    for free_bytes in _cgroup_free_bytes():
        available = min(available, free_bytes)
    return max(0, available)


def usable_cores() -> int:
    """Threads worth starting: physical cores this process may run on, within the cgroup's CPU quota."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    physical = _physical_cores() or logical
    cores = min(logical, physical)
    quota = _cgroup_cpu_quota()
    if quota is not None:
        cores = min(cores, max(1, math.ceil(quota)))
    return max(1, cores)


def cpu_name() -> str:
    """The processor's name for a report, or its architecture where the system does not tell."""
    for line in (_read_text(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def read_test_bytes() -> int:
    """How much to read so that it comes from memory: 16 times all last-level caches, 1 GB at least, and never more than
    half of what is free. Of 4 times as much a cache kept enough to show twice the memory's rate, of 8 times a tenth."""
    caches: dict[str, int] = {}
    for folder in CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        size = re.fullmatch(r"(\d+)K", _read_text(folder / "size") or "")
        if size and _read_text(folder / "level") in ("3", "4"):
            caches[f"{folder.name} {_read_text(folder / 'shared_cpu_list')}"] = 1024 * int(size[1])
    wanted = max(1 << 30, 16 * sum(caches.values()))
    return max(1, min(wanted, available_memory_bytes() // 2))


def _system_free_bytes() -> int:
    """The kernel's own estimate, which psutil tells too; other systems have no such file."""
    free_kb = re.search(r"^MemAvailable: +(\d+) kB$", _read_text(MEMORY_INFO) or "", re.MULTILINE)
    if free_kb:
        return 1024 * int(free_kb[1])
    import psutil

    return int(psutil.virtual_memory().available)


def _physical_cores() -> int | None:
    """As psutil counts them: the sets of hardware threads that share a core."""
    threads = {_read_text(path) for path in CPUS.glob("cpu[0-9]*/topology/core_cpus_list")} - {None}
    if threads:
        return len(threads)
    import psutil

    cores: int | None = psutil.cpu_count(logical=False)
    return cores


def _cgroup_free_bytes() -> Iterator[int]:
    """What each memory cgroup above this process leaves, page cache counted as free since it can be dropped."""
    for folder in _cgroup_folders("memory"):
        for limit_file, usage_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _read_int(folder / limit_file)
            usage = _read_int(folder / usage_file)
            if limit is None or usage is None or limit >= _NO_LIMIT_BYTES:
                continue
            yield limit - usage + _stat_value(folder / "memory.stat", cache_key)


def _cgroup_cpu_quota() -> float | None:
    """Cores' worth of CPU time the cgroups allow, or None without a quota."""
    quotas: list[float] = []
    for folder in _cgroup_folders("cpu"):
        fields = (_read_text(folder / "cpu.max") or "").split()
        if len(fields) == 2 and fields[0].isdigit() and fields[1].isdigit() and int(fields[1]) > 0:
            quotas.append(int(fields[0]) / int(fields[1]))
        quota, period = _read_int(folder / "cpu.cfs_quota_us"), _read_int(folder / "cpu.cfs_period_us")
        if quota is not None and period is not None and quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup for one controller, from its own up to the root."""
    for line in (_read_text(CGROUP_OF_PROCESS) or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and controllers == "":
            root = CGROUP_ROOT / "unified"  # where a machine that mounts both versions keeps version 2
            if not root.is_dir():
                root = CGROUP_ROOT
        elif controller in controllers.split(","):
            root = CGROUP_ROOT / controllers
            if not root.is_dir():
                root = CGROUP_ROOT / controller
        else:
            continue
        # In a container the path may name the host's group, which is not visible here: then only the root is.
        folder = root / group.lstrip("/")
        while True:
            if folder.is_dir():
                yield folder
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _read_int(path: Path) -> int | None:
    text = _read_text(path)
    try:
        return int(text) if text else None
    except ValueError:
        return None  # cgroup v2 writes "max"


def _stat_value(path: Path, key: str) -> int:
    for line in (_read_text(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0

"""What this process may use: cores and memory, by affinity and control group.

Machine totals mislead in a container; the smallest of all limits counts.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# Of the second version and of the first, where each controller has a tree of its own: limit, use
# and statistics.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
)


def num_cores() -> tuple[int, str]:
    """Cores this process may use, and which limit says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cpu_quota()
    if quota is not None and quota < (cores or 1):
        return max(1, math.floor(quota)), f"the control group grants {quota:g} CPUs"
    return cores or 1, "cores of the CPU affinity"


def process_started() -> float:
    """When this process started, in seconds of the epoch; now, where the system does not say."""
    try:
        # Fields behind the name, which may hold spaces: the 20th is in ticks since the boot.
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def step_aside() -> None:
    """Make this process the least of all: cores that nobody wants, and first to go without memory.

    Where the system refuses, it stays as it is.
    """
    with contextlib.suppress(OSError):
        os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def memory_limit_bytes() -> tuple[int, str]:
    """Memory this process may use in all, and which limit says so."""
    total = _meminfo("MemTotal")
    limits = _group_numbers(*(limit for limit, _, _ in _MEMORY_FILES))
    limit = min(limits, default=total)
    return (limit, "control group") if limit < total else (total, "machine")


def memory_available_bytes() -> int:
    """Memory that is free now or can be freed, in the machine and in each group with a limit.

    Pages of files that a group has read, lately or long ago, are given back under pressure.
    """
    free = _meminfo("MemAvailable")
    for limits, used, stat in _MEMORY_FILES:
        for path in _group_files(limits):
            limit = _number(path)
            if limit is not None and limit < _meminfo("MemTotal"):
                in_use = _number(path.parent / used) or 0
                free = min(free, max(0, limit - in_use + _file_bytes(path.parent / stat)))
    return free


def _cpu_quota() -> float | None:
    quotas = []
    for path in _group_files("cpu.max"):
        words = path.read_text().split()
        if len(words) == 2 and words[0].isdigit():
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _group_numbers(*names: str) -> list[int]:
    numbers = (_number(path) for name in names for path in _group_files(name))
    return [number for number in numbers if number is not None]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _group_files(name: str) -> list[Path]:
    """Files of this name in our control group and the groups above it, where readable.

    ``controller/name`` is one of the first version.
    """
    controller, _, name = name.rpartition("/")
    root = CGROUP / controller
    directories = [root]
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, owner, place = line.split(":", 2)
            if controller in owner.split(","):
                parts = place.strip("/").split("/")
                directories += [root.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    except (OSError, ValueError):
        pass
    return [d / name for d in dict.fromkeys(directories) if os.access(d / name, os.R_OK)]


def _file_bytes(stat: Path) -> int:
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(value) for key, value in lines if key in ("active_file", "inactive_file"))


def _meminfo(field: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""Limits of control groups, read from a folder that looks like the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxlm.runtime import machine

GIB = 1 << 30


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def test_no_limit_is_the_machine(group: Path) -> None:
    (group / "memory.max").write_text("max\n")
    (group / "cpu.max").write_text("max 100000\n")
    assert machine.memory_limit_bytes()[1] == "machine"
    assert machine.num_cores()[1] == "cores of the CPU affinity"


def test_memory_limit_of_the_group(group: Path) -> None:
    (group / "memory.max").write_text(f"{GIB // 4}\n")
    assert machine.memory_limit_bytes() == (GIB // 4, "control group")


def test_what_the_group_uses_is_not_available_but_its_cache_is(group: Path) -> None:
    (group / "memory.max").write_text(str(GIB // 4))
    (group / "memory.current").write_text(str(GIB // 8))
    pages = GIB // 32
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {pages}\nactive_file {pages}\n")
    assert machine.memory_available_bytes() == GIB // 4 - GIB // 8 + GIB // 16


def test_a_group_of_the_first_version_without_limit_uses_up_nothing(group: Path) -> None:
    (group / "memory").mkdir()
    (group / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (group / "memory" / "memory.usage_in_bytes").write_text(str(1 << 50))
    assert machine.memory_available_bytes() > 0


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("100000 100000", 1)])
def test_cpu_quota(group: Path, quota: str, cores: int) -> None:
    (group / "cpu.max").write_text(quota)
    assert machine.num_cores()[0] == cores

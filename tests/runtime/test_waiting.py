"""waiting: threads spin long on cores of their own, briefly where they stand in line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from fxlm.runtime import waiting as module
from fxlm.runtime.waiting import CROWDED, FREE, Waiting, line_delays


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    made = Waiting()
    yield made
    made.release()


def test_a_moment_in_line_changes_nothing(waiting: Waiting) -> None:
    waiting.choose(1.0)
    assert not waiting.brief


def test_threads_that_stay_in_line_sleep_soon_until_cores_are_free(waiting: Waiting) -> None:
    for _ in range(10):
        waiting.choose(2 * CROWDED)
    assert waiting.brief
    team = waiting.team
    assert team is not None
    assert team.is_alive()
    for _ in range(5):
        waiting.choose(0.0)
    assert waiting.brief  # not at once
    for _ in range(40):
        waiting.choose(FREE / 2)
    assert not waiting.brief
    assert not team.is_alive()


def test_looks_are_rare_and_leave_a_users_choice_alone(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def look() -> dict[int, int]:
        looks.append(1)
        return {}

    monkeypatch.setattr(module, "line_delays", look)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(module, "ours", lambda: True)
    for _ in range(100):
        waiting.look()
    assert len(looks) == 1
    monkeypatch.setattr(module, "ours", lambda: False)
    Waiting().look()
    assert len(looks) == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="Linux tells it")
def test_standing_in_line_is_seen() -> None:
    """Two of us on one core: each stands in line for about half of the time."""
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    before = os.sched_getaffinity(0)
    other = subprocess.Popen([sys.executable, "-c", code])
    try:
        os.sched_setaffinity(0, [core])
        first = line_delays()[threading.get_native_id()]
        while line_delays()[threading.get_native_id()] - first < 50e6:
            assert other.poll() is None
    finally:
        os.sched_setaffinity(0, before)
        other.kill()
        other.wait()

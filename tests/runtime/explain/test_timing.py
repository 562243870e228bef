"""timing: how many rounds a call is given."""

from __future__ import annotations

import pytest

from fxlm.runtime.explain import timing


def test_a_fast_call_is_timed_often() -> None:
    calls: list[str] = []
    timing.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls.count("a") == calls.count("b") == 1 + timing.MAX_ROUNDS
    assert calls[2:6] == ["a", "b", "a", "b"]


def test_a_slow_call_is_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LIMIT_S", 0.0)
    calls: list[int] = []
    timing.in_turns({"a": lambda: calls.append(0)})
    assert len(calls) == 1 + 2

"""What a step of decodes costs, with and without drafts: medians of what was measured.

Here: `StepCosts`. Not here: what follows for drafting (``lengths``), clocks (``speculator``).

A step without drafts takes what such steps of as many sequences took. Drafts add a part that comes
with the first of them, the host's above all, and a part a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

FIRST_SLOPE = 0.05  # a token more costs this share of a step of one, before that is seen
PLAIN_WINDOW = 8  # steps remembered of a number of sequences; they are rare where drafting pays
DRAFTED_WINDOW = 64
REFRESH = 16  # steps between looks at the medians

Line = tuple[float, float]  # at zero, and a unit


class StepCosts:
    """Measured steps, and what others would take."""

    def __init__(self) -> None:
        self._plain: dict[int, deque[float]] = {}
        self._drafted: deque[tuple[int, int, float]] = deque(maxlen=DRAFTED_WINDOW)
        self._age = 0
        self._known: dict[int, float] = {}
        self._line: Line = 0.0, 0.0
        self._extra: Line = 0.0, 0.0

    @property
    def ready(self) -> bool:
        """Whether there is anything to compare with."""
        return bool(self._plain)

    def num_plain(self, count: int) -> int:
        """Steps of ``count`` sequences without drafts that are remembered."""
        return len(self._plain.get(count, ()))

    def note(self, count: int, drafted: int, seconds: float) -> None:
        """A step of ``count`` sequences that verified ``drafted`` tokens took ``seconds``."""
        if drafted:
            self._drafted.append((count, drafted, seconds))
        else:
            self._plain.setdefault(count, deque(maxlen=PLAIN_WINDOW)).append(seconds)
        self._age += 1
        known = len(self._drafted) if drafted else self.num_plain(count)
        if self._age >= REFRESH or known < PLAIN_WINDOW:
            self._age = 0
            self.look()

    def plain(self, count: int) -> float:
        """Seconds of a step of ``count`` sequences without drafts."""
        known = self._known.get(count)
        return self._line[0] + self._line[1] * count if known is None else known

    @property
    def extra(self) -> Line:
        """Seconds that drafts add to a step: in any case, and each token."""
        return self._extra

    def look(self) -> None:
        """Take the medians anew, which is done now and then without being asked."""
        if not self._plain:
            return
        points = [(count, median(seen), len(seen)) for count, seen in self._plain.items()]
        self._known = {count: seconds for count, seconds, _ in points}
        self._line = _line(points)
        found = _medians((drafted, s - self.plain(count)) for count, drafted, s in self._drafted)
        self._extra = 0.0, FIRST_SLOPE * self.plain(1)
        if len(found) == 1:  # what comes with the first token shows with a second size
            ((drafted, seconds, _),) = found
            self._extra = 0.0, max(seconds / drafted, 0.0)
        elif found:
            self._extra = _line(found)


def _medians(seen: Iterable[tuple[int, float]]) -> list[tuple[int, float, int]]:
    """Size, median and number of each size."""
    by_size: dict[int, list[float]] = {}
    for size, seconds in seen:
        by_size.setdefault(size, []).append(seconds)
    return [(size, median(found), len(found)) for size, found in by_size.items()]


def _line(points: list[tuple[int, float, int]]) -> Line:
    """The line through (size, seconds, weight); neither of its parts is negative."""
    total = sum(weight for _, _, weight in points)
    x = sum(size * weight for size, _, weight in points) / total
    y = max(sum(seconds * weight for _, seconds, weight in points) / total, 0.0)
    if len(points) == 1:
        base = y / (1.0 + FIRST_SLOPE * x)
        return base, FIRST_SLOPE * base
    spread = sum(weight * (size - x) ** 2 for size, _, weight in points)
    joint = sum(weight * (size - x) * (seconds - y) for size, seconds, weight in points)
    slope = min(max(joint / spread, 0.0), y / x)
    return y - slope * x, slope

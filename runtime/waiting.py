"""How long threads that wait for one another spin: long on cores of their own, else briefly.

A step is some hundred operations, at the end of each of which threads wait. Sleeping there costs a
wake-up, on a virtual machine as much as a small operation itself; spinning holds a core that the
awaited thread may need. So: spin, unless the threads have lately stood in line for cores. GNU
OpenMP reads its number of turns once; but where a process has more threads of its teams than there
are cores, it takes the brief one. An idle second team puts it there, and the end of it back.

Here: what a worker asks before each step. Not here: the number of turns (`spins`).
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import torch

from fxlm.runtime.spins import ours

PERIOD_S = 0.1  # between two looks
CROWDED = 0.15  # of the time, stood in line by all threads together
FREE = 0.06
MEMORY = 0.9  # weight of what was before, a look
_TASKS = Path("/proc/self/task")


class Waiting:
    """Watches the threads of a step; one a process, as OpenMP's choice is the process's.

    Attributes:
        team: the thread of the second team, while there is one.
    """

    def __init__(self) -> None:
        self._next = 0.0
        self._before: tuple[float, dict[int, int]] | None = None
        self._share = 0.0
        self._leave = threading.Event()
        self.team: threading.Thread | None = None

    @property
    def brief(self) -> bool:
        """Whether threads sleep soon."""
        return self.team is not None

    def look(self) -> None:
        """Look at the threads if it is time to, and choose. To be called by the stepping thread."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PERIOD_S
        if torch.get_num_threads() == 1 or not ours():
            return
        before, delays = self._before, line_delays()
        self._before = now, delays
        # A look long after the last one says what the cores were like, and nothing of now.
        if before is None or now - before[0] > 10 * PERIOD_S:
            return
        stood = sum(delay - before[1].get(thread, delay) for thread, delay in delays.items())
        self.choose(stood / 1e9 / (now - before[0]))

    def choose(self, share: float) -> None:
        """Spin long or briefly.

        Args:
            share: of the time since the last look that threads stood in line, summed over them.
        """
        self._share = MEMORY * self._share + (1 - MEMORY) * share
        if self._share > CROWDED and not self.brief:
            self._hold()
        elif self._share < FREE and self.brief:
            self.release()

    def _hold(self) -> None:
        """Start a second team, which sleeps."""
        self._leave, ready = threading.Event(), threading.Event()

        def rest(leave: threading.Event) -> None:
            torch.zeros(1 << 20).add_(1)  # enough elements for a team
            ready.set()
            leave.wait()

        self.team = threading.Thread(
            target=rest, args=(self._leave,), name="fxlm-waiting", daemon=True
        )
        self.team.start()
        ready.wait()

    def release(self) -> None:
        """End the second team, if there is one: threads spin long again."""
        self._leave.set()
        if self.team is not None:
            self.team.join()
            self.team = None


def line_delays() -> dict[int, int]:
    """Nanoseconds that each thread of a step has stood in line for a core, ever; by thread.

    Threads of Python's other than the calling one are no part of a step. Empty where the system
    does not say.
    """
    others = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()}
    found: dict[int, int] = {}
    try:
        for name in os.listdir(_TASKS):
            if int(name) not in others:
                text = (_TASKS / name / "schedstat").read_text()
                found[int(name)] = int(text.split()[1])
    except (OSError, ValueError, IndexError):  # a thread that ended meanwhile, or no Linux
        pass
    return found


waiting = Waiting()

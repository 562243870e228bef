"""How long OpenMP's threads spin for one another before they sleep, by the environment.

Read when torch is loaded, by it and by our child processes, so ``import fxlm`` sets it. Not here:
when they sleep sooner (`waiting`).
"""

from __future__ import annotations

import os

TURNS = "20000"  # up to a millisecond; OpenMP's own choice is some 15


def choose() -> None:
    """Set our number of turns, unless the user has set something."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", TURNS)


def ours() -> bool:
    """Whether the number is ours."""
    return os.environ.get("GOMP_SPINCOUNT") == TURNS

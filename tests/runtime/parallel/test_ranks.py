"""Which rank is blamed when one is lost and takes the others with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxlm.runtime.parallel import ranks as module
from fxlm.runtime.parallel.messages import Lost
from fxlm.runtime.parallel.ranks import Ranks


class Told:
    """A rank's process that ends when it is told to."""

    def __init__(self) -> None:
        self.how: str | None = None

    def ended(self) -> str | None:
        return self.how

    def kill(self) -> None:
        self.how = "was ended by this one"

    def close(self) -> None:
        pass


@pytest.fixture
def handles() -> dict[int, Told]:
    return {rank: Told() for rank in (1, 2, 3)}


@pytest.fixture
def ranks(handles: dict[int, Told], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(module, "SETTLE_S", 0.3)
    made = Ranks(4, silence_s=60.0)
    made.watch(handles)
    made.start_pulse()
    yield made
    for handle in handles.values():
        handle.how = "left"
    made.close()


def test_one_that_was_killed_not_one_that_lost_it(ranks: Ranks, handles: dict[int, Told]) -> None:
    """Rank 1 notices first, and its process ends first."""
    ranks._note(Lost(1, "connection closed", False))
    handles[1].how = "ended with status 1"
    handles[2].how = "was killed by SIGKILL"
    assert ranks.explain("rank 0 noticed") == "rank 2 was killed by SIGKILL"
    assert ranks.trouble() == "rank 2 was killed by SIGKILL"


def test_ones_own_fault_before_all_else(ranks: Ranks, handles: dict[int, Told]) -> None:
    handles[1].how = "was killed by SIGABRT"
    ranks._note(Lost(2, "connection closed", False))
    ranks._note(Lost(3, "out of memory", True))
    assert ranks.trouble() == "rank 3: out of memory"


def test_one_that_is_silent_not_those_that_waited(ranks: Ranks, handles: dict[int, Told]) -> None:
    for rank in (1, 3):
        ranks._note(Lost(rank, "timed out", False))
        handles[rank].how = "ended with status 1"
    assert ranks.explain("timed out") == "rank 2 does not answer: timed out"


def test_ranks_that_are_ended_for_another_are_not_blamed(
    ranks: Ranks, handles: dict[int, Told]
) -> None:
    ranks._lost(2, module.Blame.SILENT, "has not been heard of")
    while not all(handle.how for handle in handles.values()):
        pass
    assert ranks.trouble() == "rank 2 has not been heard of"

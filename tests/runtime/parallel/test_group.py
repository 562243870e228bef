"""What is sent is let go of, and comes in order."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch._C import _distributed_c10d as c10d

from fxlm.runtime.parallel.group import RankGroup, join

STEPS, FLYING = 12, 3


def test_of_what_is_sent_only_the_last_steps_are_kept(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        store = c10d.FileStore(str(tmp_path / "store"), 2)
        first, second = pool.map(lambda r: join(store, "line", r, 2, "cpu", 20.0), range(2))
        sent: list[weakref.ref[torch.Tensor]] = []

        def one_by_one(group: RankGroup) -> None:
            for step in range(STEPS):
                values = [torch.full((3,), float(step)), torch.full((2,), step)]
                sent.extend(weakref.ref(value) for value in values)
                group.send(values, 1, FLYING)

        sending = pool.submit(one_by_one, first)
        for step in range(STEPS):
            for value in (torch.empty(3), torch.empty(2, dtype=torch.int64)):
                second.receive(value, 0)
                assert value.tolist() == [step] * len(value)
        sending.result(20)
    alive = [ref() is not None for ref in sent]
    assert alive == [False] * 2 * (STEPS - FLYING) + [True] * 2 * FLYING

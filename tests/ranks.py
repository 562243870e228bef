"""Several ranks in one process, for tests of sharded graphs: a thread each, meeting at barriers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from fxlm.compiler.ops.collectives import TENSOR_GROUP, use_group

Result = TypeVar("Result")
TIMEOUT_S = 60


class ThreadGroup:
    """The group of all threads of `run_ranks`; knows which one calls by the thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._local = threading.local()
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self._given: list[torch.Tensor | None] = [None] * size

    @property
    def rank(self) -> int:
        return int(self._local.rank)

    def enter(self, rank: int) -> None:
        self._local.rank = rank

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._given[self.rank] = x
        self._barrier.wait()
        parts = [p.clone() for p in self._given if p is not None]
        self._barrier.wait()
        return parts

    def all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(torch.stack(self.all_gather(x)).sum(0))

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.all_gather(x)).sum(0)[self.rank]

    def abort(self) -> None:
        self._barrier.abort()


@contextmanager
def thread_group(size: int) -> Iterator[ThreadGroup]:
    """A group of ``size`` threads that the collectives of this process run over."""
    group = ThreadGroup(size)
    use_group(TENSOR_GROUP, group)
    try:
        yield group
    finally:
        use_group(TENSOR_GROUP, None)


def run_ranks(size: int, run: Callable[[int], Result]) -> list[Result]:
    """Call ``run(rank)`` for every rank at once; gives the results in order of ranks."""
    with thread_group(size) as group, ThreadPoolExecutor(size) as pool:

        def one(rank: int) -> Result:
            group.enter(rank)
            try:
                return run(rank)
            except BaseException:
                group.abort()
                raise

        return list(pool.map(one, range(size)))

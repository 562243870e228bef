"""The group of ranks that sum and gather together, over torch.distributed's backends.

Here: `join`, and what stands behind the collectives of a graph in a process. Groups are made
directly, without ``init_process_group``: nothing is global, and Gloo listens on the address that
it is told alone. Not here: who the ranks are (``place``), how they are started (``ranks``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

from fxlm.compiler.errors import PeersLost

LOOPBACK = "127.0.0.1"


class RankGroup:
    """Collectives of one group.

    Args:
        backend: a process group of torch.distributed.
        rank, size: place in it.
        timeout_s: how long a rank waits for the others before it takes them for lost.

    Attributes:
        lost: what a collective failed with; compiled code keeps only the text of what it raised.
    """

    def __init__(self, backend: Any, rank: int, size: int, timeout_s: float) -> None:
        self._backend = backend
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self.lost: PeersLost | None = None
        self._sending: deque[tuple[list[Any], list[torch.Tensor]]] = deque()

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        options = c10d.AllreduceOptions()
        options.timeout = timedelta(seconds=self.timeout_s)
        self._wait("all_reduce", self._backend.allreduce([x], options))

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of [size, ...]; gives this rank's entry.

        Gloo's own sums everything on every rank. Here each rank gets its entry from all others and
        adds them: the bytes of a ring, in one round.
        """
        if not x.is_cuda:
            given = torch.empty_like(x)
            exchange = c10d.AllToAllOptions()
            exchange.timeout = timedelta(seconds=self.timeout_s)
            self._wait("reduce_scatter", self._backend.alltoall_base(given, x, [], [], exchange))
            return given.sum(0)
        total = torch.empty_like(x[0])
        options = c10d.ReduceScatterOptions()
        options.timeout = timedelta(seconds=self.timeout_s)
        work = self._backend._reduce_scatter_base(total, x, options)
        self._wait("reduce_scatter", work)
        return total

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each rank gave, in order of ranks."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        options = c10d.AllgatherOptions()
        options.timeout = timedelta(seconds=self.timeout_s)
        self._wait("all_gather", self._backend.allgather([parts], [x], options))
        return parts

    def send(self, values: Sequence[torch.Tensor], to: int, flying: int) -> None:
        """Hand values to another rank of the group; returns at once, they must not change.

        A rank takes what is sent to it when it comes to it, so this one must not wait for it.
        Only what was sent ``flying`` calls ago is waited for, and so let go of: with so many
        steps in flight at most, it has been taken.
        """
        given = [x.contiguous() for x in values]
        self._sending.append(([self._backend.send([x], to, self.rank) for x in given], given))
        while len(self._sending) > flying:
            for work in self._sending.popleft()[0]:
                self._wait("send", work, timedelta(seconds=self.timeout_s))

    def receive(self, x: torch.Tensor, source: int) -> None:
        """Fill ``x`` with what rank ``source`` sends; from one rank, things come in order."""
        work = self._backend.recv([x], source, source)
        self._wait("receive", work, timedelta(seconds=self.timeout_s))

    def _wait(self, name: str, work: Any, *timeout: timedelta) -> None:
        """Raises PeersLost where the other ranks are gone or silent."""
        try:
            work.wait(*timeout)
        except RuntimeError as error:  # Gloo's and NCCL's own classes derive from it
            first = str(error).strip().splitlines()[0]
            self.lost = PeersLost(
                f"{name} over {self.size} ranks failed on rank {self.rank} "
                f"(other ranks gone, or silent for {self.timeout_s:g} s; if their steps take "
                f"that long, raise --distributed-timeout-seconds): {first}"
            )
            raise self.lost from error


def join(
    store: c10d.Store, name: str, rank: int, size: int, device: str, timeout_s: float,
    host: str = LOOPBACK,
) -> RankGroup:  # fmt: skip
    """Meet the other ranks of a group; blocks until all are there.

    Args:
        store: shared by them.
        name: of the group, the same on all ranks.
        rank, size: place in the group.
        device: ``cpu`` (Gloo) or ``cuda`` (NCCL).
        timeout_s: for meeting, and later for each collective.
        host: address on which the other ranks reach this one (Gloo).
    """
    shared = c10d.PrefixStore(name, store)
    if device.startswith("cuda"):
        # Not in every build of torch.
        kind: Any = c10d.ProcessGroupNCCL
        nccl = kind.Options()
        nccl._timeout = timedelta(seconds=timeout_s)
        backend = kind(shared, rank, size, nccl)
    else:
        kind = c10d.ProcessGroupGloo
        gloo = kind._Options()
        gloo._timeout = timedelta(seconds=timeout_s)
        gloo._devices = [kind.create_device(hostname=host)]
        gloo._threads = 2
        backend = kind(shared, rank, size, gloo)
    return RankGroup(backend, rank, size, timeout_s)

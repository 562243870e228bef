"""Ranks that torchrun started, each by the same command.

Here: how they meet. Every process says in torchrun's store who it is; rank 0 then says there where
it listens. A rank takes addresses from the store and its options from its own command line: who
can write to the store cannot tell a rank what to run. Not here: torchrun's variables (``choice``),
what a rank does (``rank``).

On one machine rank 0 listens on Unix sockets; over several ones on TCP with CURVE, whose key is
as secret as torchrun's store.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from datetime import timedelta

import msgspec
from torch._C import _distributed_c10d as c10d

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.parallel.choice import OPTION, Torchrun, num_ranks, torchrun_process
from fxlm.runtime.parallel.group import LOOPBACK
from fxlm.runtime.parallel.messages import RankSpec
from fxlm.runtime.parallel.rank import serve
from fxlm.runtime.parallel.ranks import Handle, Ranks
from fxlm.runtime.parallel.start import Started

# Rank 0 may have a model to download first. If it fails instead, torchrun ends the others.
START_LIMIT = timedelta(hours=2)


class Present(msgspec.Struct, frozen=True):
    """A rank is there."""

    pid: int
    node: int


class Listening(msgspec.Struct, frozen=True):
    """Where rank 0 listens."""

    orders: str
    orders_key: str
    news: str
    news_key: str


class _Neighbour:
    """A rank of this machine that is not our child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)  # a number could be given to another process

    def ended(self) -> str | None:
        """That the process ended; torchrun says how."""
        gone = select.select([self._fd], [], [], 0)[0]
        return f"(pid {self.pid}) ended; torchrun tells how" if gone else None

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


def start_torchrun(options: EngineOptions, size: int, silence_s: float) -> Started:
    """Meet the other ranks; in a rank other than 0, be one until rank 0 leaves.

    Raises:
        InvalidOption: torchrun started another number of processes; or rank 0 had an engine.
        SystemExit: in the other ranks, at their end.
    """
    us = torchrun_process(size)
    if us.rank > 0:
        raise SystemExit(serve_rank(options, us))
    store = open_meeting(us)
    if store.add("engines", 1) > 1:
        reason = "torchrun's other processes serve one engine alone; make one a run"
        raise InvalidOption(OPTION, "external_launcher", reason)
    keys = [f"present/{rank}" for rank in range(1, size)]
    store.wait(keys, START_LIMIT)
    others = [msgspec.json.decode(store.get(key), type=Present) for key in keys]
    host = own_host(us)
    ranks = Ranks(size, silence_s, host if any(o.node != us.node for o in others) else None)
    handles: dict[int, Handle] = {
        rank: _Neighbour(o.pid) for rank, o in enumerate(others, 1) if o.node == us.node
    }
    orders, news = ranks.orders.address, ranks.inbox.address
    where = Listening(orders.endpoint, orders.server_key, news.endpoint, news.server_key)
    store.set("listening", msgspec.json.encode(where).decode())
    ranks.watch(handles)
    return Started(
        ranks=ranks, store=group_store(us), local_ranks=us.local_size, host=host, keep=store
    )


def serve_rank(options: EngineOptions, us: Torchrun | None = None) -> int:
    """Be a rank other than 0; gives the exit code, once rank 0 has left."""
    us = us or torchrun_process(num_ranks(options))
    store = open_meeting(us)
    store.set(f"present/{us.rank}", msgspec.json.encode(Present(os.getpid(), us.node)).decode())
    store.wait(["listening"], START_LIMIT)
    where = msgspec.json.decode(store.get("listening"), type=Listening)
    # Both reach all ranks at once; this one has to wait until rank 0 has finished its requests.
    with contextlib.suppress(ValueError):  # not the main thread: its owner decides
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spec = RankSpec(
        rank=us.rank, options=options.as_json(), store=group_store(us),
        orders=where.orders, orders_key=where.orders_key,
        news=where.news, news_key=where.news_key,
        local_rank=us.local_rank, local_ranks=us.local_size, host=own_host(us),
    )  # fmt: skip
    return serve(spec)


def open_meeting(us: Torchrun) -> c10d.Store:
    """The store where the processes meet; rank 0 serves it if torchrun does not."""
    serves = us.rank == 0 and not us.agent_store
    store = c10d.TCPStore(
        us.host, us.port, None, serves, START_LIMIT, wait_for_workers=False, multi_tenant=True
    )
    return c10d.PrefixStore(f"fxlm/{us.attempt}", store)


def group_store(us: Torchrun) -> str:
    """The address of the same store, for the groups."""
    return f"tcp:{us.host}:{us.port}/fxlm/{us.attempt}"


def own_host(us: Torchrun) -> str:
    """The address on which the other machines reach this one; loopback if there are none."""
    if us.local_size == us.size:
        return LOOPBACK
    family, _, _, _, place = socket.getaddrinfo(us.host, us.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing; picks the interface
        return str(probe.getsockname()[0])

"""Starting the other ranks: processes of this machine.

Here: one function a way (``--distributed-executor-backend``), each giving `Ranks` that are
watched. Not here: what a rank does (``rank``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import msgspec

from fxlm.runtime.options import EngineOptions
from fxlm.runtime.parallel.messages import RankSpec
from fxlm.runtime.parallel.ranks import Handle, Ranks

MODULE = "fxlm.runtime.parallel.rank"


class _Child:
    """A rank in a process of ours; it leaves when its standard input ends."""

    def __init__(self, spec: RankSpec) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(spec) + b"\n")
        self.process.stdin.flush()

    def ended(self) -> str | None:
        """How the process ended."""
        status = self.process.poll()
        if status is None:
            return None
        if status < 0:
            return f"(pid {self.process.pid}) was killed by {signal.Signals(-status).name}"
        return f"(pid {self.process.pid}) ended with status {status}"

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Let go of a process that has ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def start_processes(options: EngineOptions, size: int, silence_s: float) -> tuple[Ranks, str]:
    """Start every rank but 0 on this machine.

    Returns:
        The ranks, and the store where their groups meet.
    """
    directory = tempfile.mkdtemp(prefix="fxlm-ranks-")
    ranks = Ranks(size, silence_s)
    weakref.finalize(ranks, shutil.rmtree, directory, ignore_errors=True)
    store = f"file:{Path(directory) / 'store'}"
    handles: dict[int, Handle] = {}
    for rank in range(1, size):
        spec = RankSpec(
            rank=rank, options=options.as_json(), store=store,
            orders=ranks.orders.address.endpoint, orders_key=ranks.orders.address.server_key,
            news=ranks.inbox.address.endpoint, news_key=ranks.inbox.address.server_key,
            parent_pid=os.getpid(), paths=[p for p in sys.path if p], local_ranks=size,
        )  # fmt: skip
        handles[rank] = _Child(spec)
    ranks.watch(handles)
    return ranks, store

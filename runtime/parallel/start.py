"""Starting the other ranks as processes of this machine.

Here: `start_processes`, and what every way to start ranks gives. Not here: the other ways
(``torchrun``, ``actors``), which one is taken (``choice``), what a rank does (``rank``).
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fxlm.runtime.options import EngineOptions
from fxlm.runtime.parallel.group import LOOPBACK
from fxlm.runtime.parallel.messages import RankSpec
from fxlm.runtime.parallel.ranks import Handle, Ranks

MODULE = "fxlm.runtime.parallel.rank"


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """Ranks that were started and are watched.

    Attributes:
        ranks: every rank but 0.
        store: where their groups meet; see `RankSpec`.
        local_ranks: how many of all, rank 0 among them, share rank 0's machine.
        host: address of rank 0's machine for the others.
        keep: what has to live as long as the groups.
        release: called once the ranks have left.
    """

    ranks: Ranks
    store: str
    local_ranks: int
    host: str = LOOPBACK
    keep: Any = None
    release: Callable[[], object] | None = None

    def close(self) -> None:
        """Let the ranks leave. May be called twice."""
        self.ranks.close()
        if self.release is not None:
            self.release()


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


def start_processes(options: EngineOptions, size: int, silence_s: float) -> Started:
    """Start every rank but 0 on this machine."""
    ranks = Ranks(size, silence_s)
    store = file_store(ranks)
    handles: dict[int, Handle] = {}
    for rank in range(1, size):
        spec = RankSpec(
            rank=rank, options=options.as_json(), store=store,
            orders=ranks.orders.address.endpoint, orders_key=ranks.orders.address.server_key,
            news=ranks.inbox.address.endpoint, news_key=ranks.inbox.address.server_key,
            parent_pid=os.getpid(), paths=import_paths(), local_rank=rank, local_ranks=size,
        )  # fmt: skip
        handles[rank] = _Child(spec)
    ranks.watch(handles)
    return Started(ranks=ranks, store=store, local_ranks=size)


def file_store(ranks: Ranks) -> str:
    """A store for ranks of this machine, gone once ``ranks`` is."""
    directory = tempfile.mkdtemp(prefix="fxlm-ranks-")
    weakref.finalize(ranks, shutil.rmtree, directory, ignore_errors=True)
    return f"file:{Path(directory) / 'store'}"


def import_paths() -> list[str]:
    """Where a rank looks for modules first: where this process does."""
    return [path for path in sys.path if path]

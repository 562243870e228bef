"""The other ranks as rank 0 sees them: told what to do, listened to, watched.

Here: `Ranks`, whose thread notices a rank that ended, said so, or fell silent. Not here: how a
rank is started (``start``), what it does (``rank``).

A rank that is lost is lost for good: the reason is kept, a descriptor becomes readable (an idle
engine polls it), and the ranks that are left are ended, so that nobody waits in a collective for
one that will not come. In the middle of a step the collectives notice first; `explain` then waits
for the reason behind their error.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
import zmq

from fxlm.compiler.errors import EngineDead
from fxlm.runtime.parallel.channel import Inbox, Orders, order_frames
from fxlm.runtime.parallel.messages import (
    Leave,
    Lost,
    News,
    Order,
    Pulse,
    decode_news,
    pack_step,
)

POLL_MS = 100
SETTLE_S = 1.0  # for better reasons to come in behind the first one

Kind = TypeVar("Kind", bound=News)


class Handle(Protocol):
    """A rank that was started."""

    def ended(self) -> str | None:
        """How it ended; None while it runs, or if nobody can know."""
        ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Ranks:
    """Every rank but 0.

    Args:
        size: ranks in all.
        silence_s: a rank that is not heard of for so long between two steps is lost.
        host: address of this machine for ranks on others; None: all are on this one.

    Attributes:
        pids: process of each rank, once it has told.
    """

    def __init__(self, size: int, silence_s: float, host: str | None = None) -> None:
        self.size = size
        self.pids: dict[int, int] = {}
        self.silence_s = silence_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.orders = Orders(self._context, host)
        self.inbox = Inbox(self._context, host)
        self._handles: dict[int, Handle] = {}
        self._heard = dict.fromkeys(range(1, size), time.monotonic())
        self._watches_pulse = False
        self._idle_since = time.monotonic()
        self._busy = False
        self._news: list[News] = []
        self._changed = threading.Condition()
        self._reasons: list[tuple[int, str]] = []  # (how good, text), best first once sorted
        self._closing = threading.Event()
        self._read_fd, self._write_fd = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def watch(self, handles: Mapping[int, Handle]) -> None:
        """Begin to listen to ranks that were started."""
        self._handles = dict(handles)
        self._thread.start()

    # ---- for the engine's thread -------------------------------------------------------------

    def meet(self) -> None:
        """Wait until every rank can be told what to do.

        Raises:
            EngineDead: a rank ended instead.
        """
        missing = self.size - 1
        while missing:
            if self.orders.arrived(POLL_MS):
                missing -= 1
            elif self._reasons:
                raise EngineDead(self.explain("a rank ended"))

    def send(self, order: Order) -> None:
        """Give every rank an order."""
        self._send(order_frames(order))

    def send_step(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let every rank run a step."""
        self._send(pack_step(tensors))

    def _send(self, frames: Sequence[bytes]) -> None:
        for rank in range(1, self.size):
            self.orders.send(rank, frames)

    def collect(self, kind: type[Kind]) -> list[Kind]:
        """Wait until every rank has sent one message of a kind; gives them in order of ranks.

        Raises:
            EngineDead: a rank ended instead; carries its reason.
        """
        with self._changed:
            while True:
                found = {n.rank: n for n in self._news if isinstance(n, kind)}
                if len(found) == self.size - 1:
                    return [found[rank] for rank in range(1, self.size)]
                if self._reasons:
                    break
                self._changed.wait(1.0)
        raise EngineDead(self.explain("a rank ended"))

    def start_pulse(self) -> None:
        """From now on, silence counts."""
        self._heard = dict.fromkeys(self._heard, time.monotonic())
        self._watches_pulse = True

    def set_busy(self, busy: bool) -> None:
        """A step begins or ends. Within one silence means nothing: compiled code may hold the
        interpreter, and the collectives have their own limit."""
        self._idle_since = time.monotonic()
        self._busy = busy

    def explain(self, fallback: str) -> str:
        """Why a rank was lost; waits a moment for the ranks' own words."""
        deadline = time.monotonic() + 2 * SETTLE_S
        with self._changed:
            while not self._reasons and time.monotonic() < deadline:
                self._changed.wait(0.1)
        silent = [r for r, heard in self._heard.items() if time.monotonic() - heard > 2 * SETTLE_S]
        if not self._reasons and silent and self._watches_pulse:
            names = ", ".join(str(rank) for rank in silent)
            return f"rank {names} does not answer: {fallback}"
        return self.trouble() or fallback

    def trouble(self) -> str | None:
        """The best reason known; None while all is well."""
        with self._changed:
            if not self._reasons:
                return None
            began = time.monotonic()
            while time.monotonic() - began < SETTLE_S and min(self._reasons)[0] > 0:
                self._changed.wait(0.1)
            return min(self._reasons)[1]

    def fileno(self) -> int:
        """Readable once there is trouble."""
        return self._read_fd

    def close(self) -> None:
        """Let the ranks leave; those that do not within a moment are ended."""
        if self._closing.is_set():
            return
        self._closing.set()
        self.send(Leave())
        if self._thread.is_alive():
            self._thread.join()
        self.orders.close()
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline and any(
            h.ended() is None for h in self._handles.values()
        ):
            time.sleep(0.02)
        for handle in self._handles.values():
            if handle.ended() is None:
                handle.kill()
            handle.close()
        self.inbox.close()
        self._context.term()
        os.close(self._read_fd)
        os.close(self._write_fd)

    # ---- the watching thread -----------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.is_set():
            for frame in self.inbox.receive(POLL_MS):
                self._note(decode_news(frame))
            for rank, handle in self._handles.items():
                how = handle.ended()
                if how is not None and not self._closing.is_set():
                    self._lost(1, f"rank {rank} {how}")
            self._listen_for_silence()

    def _note(self, news: News) -> None:
        self._heard[news.rank] = time.monotonic()
        if isinstance(news, Lost):
            self._lost(0 if news.first else 3, f"rank {news.rank}: {news.reason}")
        elif not isinstance(news, Pulse):
            with self._changed:
                self._news.append(news)
                self._changed.notify_all()

    def _listen_for_silence(self) -> None:
        if self._busy or not self._watches_pulse:
            return
        for rank, heard in self._heard.items():
            silence = time.monotonic() - max(heard, self._idle_since)
            if silence > self.silence_s:
                self._lost(2, f"rank {rank} has not been heard of for {silence:.0f} s")

    def _lost(self, how_good: int, reason: str) -> None:
        with self._changed:
            if reason in (text for _, text in self._reasons):
                return
            first = not self._reasons
            self._reasons.append((how_good, reason))
            self._changed.notify_all()
        if first:
            os.write(self._write_fd, b"!")
            timer = threading.Timer(SETTLE_S, self._end_all)
            timer.daemon = True
            timer.start()

    def _end_all(self) -> None:
        """Nobody is to wait for ranks that will not come."""
        for handle in self._handles.values():
            if handle.ended() is None:
                handle.kill()

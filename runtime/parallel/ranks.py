"""The other ranks as rank 0 sees them: told what to do, listened to, watched.

Here: `Ranks`, whose thread notices a rank that ended, said so, or fell silent. Not here: how a
rank is started (``start``), what it does (``rank``).

A rank that is lost is lost for good: the reason is kept, a descriptor becomes readable (an idle
engine polls it), and the ranks that are left are ended, so that nobody waits in a collective for
one that will not come. In the middle of a step the collectives notice first; `explain` then waits
for the reason behind their error.

One rank's loss takes others with it: they say that they lost their peers, and end. `Blame` is how
directly each thing that was noticed names the rank that went first.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
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


class Blame(IntEnum):
    """How directly a reason names the rank that went first; the least is told."""

    FAULT = 0  # a rank's own words about itself
    ENDED = 1  # its process ended, without a word
    SILENT = 2  # it does not answer
    PEERS = 3  # its own words: it lost the others
    FOLLOWED = 4  # it ended, having lost the others


@dataclass(frozen=True, slots=True)
class _Reason:
    """What was noticed of a rank; ``blame`` as of that moment."""

    rank: int
    blame: Blame
    text: str


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
        self._reasons: list[_Reason] = []  # in the order in which they were noticed
        self._ending = False  # ranks that end from now on were ended by this one
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
        """Why a rank was lost; waits a moment for the ranks' own words.

        Args:
            fallback: what rank 0 itself noticed; told if nothing better is found.
        """
        began = time.monotonic()
        with self._changed:
            while (waited := time.monotonic() - began) < 3 * SETTLE_S:
                best = self._best()
                if best is not None and best.blame <= Blame.SILENT:
                    return self.trouble() or fallback
                if waited > SETTLE_S and (silent := self._silent()):
                    self._lost(silent[0], Blame.SILENT, f"does not answer: {fallback}")
                    continue
                self._changed.wait(0.1)
        return self.trouble() or fallback

    def _silent(self) -> list[int]:
        """Ranks that have not spoken lately, nor said that they leave."""
        if not self._watches_pulse:
            return []
        left = {reason.rank for reason in self._reasons}
        now = time.monotonic()
        return [r for r, t in self._heard.items() if r not in left and now - t > 2 * SETTLE_S]

    def trouble(self) -> str | None:
        """The best reason after a moment in which a better one may come; None: all is well."""
        if not self._reasons:
            return None
        began = time.monotonic()
        with self._changed:
            while (best := self._best()) is not None and best.blame > Blame.FAULT:
                if self._ending or time.monotonic() - began > SETTLE_S:
                    break
                self._changed.wait(0.1)
            return None if best is None else best.text

    def _best(self) -> _Reason | None:
        """The reason that names the first cause most directly; of several, the earliest."""
        with self._changed:
            followed = {r.rank for r in self._reasons if r.blame is Blame.PEERS}

            def blame(reason: _Reason) -> Blame:
                follows = reason.blame is Blame.ENDED and reason.rank in followed
                return Blame.FOLLOWED if follows else reason.blame

            return min(self._reasons, key=blame, default=None)

    def fileno(self) -> int:
        """Readable once there is trouble."""
        return self._read_fd

    def close(self) -> None:
        """Let the ranks leave; those that do not within a moment are ended.

        Once one is lost, nobody waits for the others.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self.send(Leave())
        if self._thread.is_alive():
            self._thread.join()
        self.orders.close()
        deadline = time.monotonic() + (0.0 if self._reasons else 3.0)
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
                if how is not None and not self._closing.is_set() and not self._ending:
                    self._lost(rank, Blame.ENDED, how)
            self._listen_for_silence()

    def _note(self, news: News) -> None:
        self._heard[news.rank] = time.monotonic()
        if isinstance(news, Lost):
            kind = Blame.FAULT if news.first else Blame.PEERS
            self._lost(news.rank, kind, news.reason)
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
                self._lost(rank, Blame.SILENT, f"has not been heard of for {silence:.0f} s")

    def _lost(self, rank: int, blame: Blame, how: str) -> None:
        colon = ":" if blame in (Blame.FAULT, Blame.PEERS) else ""
        with self._changed:
            if any((r.rank, r.blame) == (rank, blame) for r in self._reasons):
                return
            first = not self._reasons
            self._reasons.append(_Reason(rank, blame, f"rank {rank}{colon} {how}"))
            self._changed.notify_all()
        if first:
            os.write(self._write_fd, b"!")
            timer = threading.Timer(SETTLE_S, self._end_all)
            timer.daemon = True
            timer.start()

    def _end_all(self) -> None:
        """Nobody is to wait for ranks that will not come."""
        self._ending = True
        for handle in self._handles.values():
            if handle.ended() is None:
                handle.kill()

"""Sockets between rank 0 and the others.

Here: orders go out from rank 0, news come in. Not here: what they say (``messages``), who
listens when (``ranks``, ``rank``).

Rank 0 binds a ROUTER for orders, which its engine's thread alone uses, and a PULL for news, which
its watching thread alone uses; a rank connects a DEALER and PUSHes, one for each of its threads,
as a socket is for one thread. On one machine they are Unix sockets in a directory of this user's;
across machines TCP with CURVE.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import zmq

from fxlm.compiler.errors import PeersLost
from fxlm.runtime.parallel.messages import News, Order, RankSpec, encode
from fxlm.runtime.transport import Address, listening, unlimited

HEARTBEAT_MS = 1000


class Orders:
    """Rank 0's end for orders."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str | None) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.router_mandatory = 0  # to a rank that is gone nothing can be told
        self._socket.linger = 500
        unlimited(self._socket)
        self._stack = contextlib.ExitStack()
        self.address: Address = self._stack.enter_context(listening(self._socket, host))

    def arrived(self, timeout_ms: int) -> bool:
        """Take one rank's greeting; before it, what is sent to that rank is dropped."""
        if not self._socket.poll(timeout_ms):
            return False
        self._socket.recv_multipart()
        return True

    def send(self, rank: int, frames: Sequence[bytes]) -> None:
        """Queue an order for one rank."""
        self._socket.send_multipart([_name(rank), *frames], zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close()
        self._stack.close()


class Inbox:
    """Rank 0's end for news."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str | None) -> None:
        self._socket = context.socket(zmq.PULL)
        unlimited(self._socket)
        self._stack = contextlib.ExitStack()
        self.address: Address = self._stack.enter_context(listening(self._socket, host))

    def receive(self, timeout_ms: int) -> list[bytes]:
        """What came in, after waiting at most so long for the first."""
        frames: list[bytes] = []
        if self._socket.poll(timeout_ms):
            with contextlib.suppress(zmq.Again):
                while True:
                    frames.append(self._socket.recv(zmq.NOBLOCK))
        return frames

    def close(self) -> None:
        self._socket.close(0)
        self._stack.close()


class Listener:
    """A rank's end for orders."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], spec: RankSpec) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.identity = _name(spec.rank)
        unlimited(self._socket)
        if spec.orders_key:  # another machine may vanish without a word
            self._socket.heartbeat_ivl = HEARTBEAT_MS
            self._socket.heartbeat_timeout = 10 * HEARTBEAT_MS
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        _connect(self._socket, spec.orders, spec.orders_key)
        self._socket.send(b"")  # a greeting: rank 0 can reach this rank from now on

    def receive(self) -> list[bytes]:
        """The next order; waits for it as long as it takes.

        Raises:
            PeersLost: rank 0 ended without a word.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.poll()
        try:
            return list(self._socket.recv_multipart(zmq.NOBLOCK))  # its last orders come first
        except zmq.Again:
            raise PeersLost("rank 0 is gone") from None

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)


class Teller:
    """A rank's end for news; one for each thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], spec: RankSpec) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.linger = 2000  # for the last words
        unlimited(self._socket)
        _connect(self._socket, spec.news, spec.news_key)

    def tell(self, news: News) -> None:
        """Queue a message."""
        self._socket.send(encode(news))

    def close(self) -> None:
        self._socket.close()


def order_frames(order: Order) -> list[bytes]:
    """An order without tensors."""
    return [encode(order)]


def _connect(socket: zmq.Socket[bytes], endpoint: str, server_key: str) -> None:
    if server_key:
        public, secret = zmq.curve_keypair()
        socket.curve_secretkey = secret
        socket.curve_publickey = public
        socket.curve_serverkey = server_key.encode()
    socket.connect(endpoint)


def _name(rank: int) -> bytes:
    return b"rank %d" % rank

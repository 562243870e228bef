"""The engine process: a loop between one ZeroMQ socket and one engine.

    python -m fxlm.runtime.service        reads a `ServiceSpec` as one line of JSON on stdin

Here: the loop, start, drain and death of the process. Not here: the other end (``client``), the
engine itself (``engine``).

- Nothing to do: the loop blocks in one poll without a time limit. It never spins.
- Standard input is the lifeline: its end means that the parent is gone, and so is this process
  then, even in the middle of a step. On Linux the kernel tells it, too.
- SIGTERM or `Shutdown`: refuse new requests, finish the others within a time limit, leave with 0.
  SIGINT is ignored: the parent gets it as well and decides.
- A message that cannot be read is counted and ignored. What ends the engine is told to every
  request and to the parent, and the exit code is 1.
- Standard output goes to standard error: progress lines of whoever builds the engine.
"""

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import zmq

from fxlm.compiler.errors import EngineDead, FxlmError, InvalidRequest
from fxlm.runtime.lifeline import EXIT_ORPHAN, leave, read_line, watch_lifeline
from fxlm.runtime.messages import (
    Abort,
    Failed,
    FromEngine,
    Ping,
    Pong,
    Ready,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    decode_to_engine,
    encode,
)
from fxlm.runtime.transport import ServiceSpec, connect

if TYPE_CHECKING:  # the factory imports what is heavy
    from fxlm.runtime.engine import Engine

STATS_INTERVAL_S = 0.5
SIGTERM_DRAIN_S = 30.0
LINGER_MS = 3000  # for the last words to leave the socket
MAX_MESSAGES = 1000  # read between two steps
EXIT_FATAL = 1


class Service:
    """The loop.

    Args:
        engine: built, idle.
        socket: connected to the parent.
        wake_fd: readable when a signal came in; -1 for none.
        stops: once it is not empty (a signal handler appends to it) the loop drains.
    """

    def __init__(
        self,
        engine: "Engine",
        socket: "zmq.Socket[bytes]",
        wake_fd: int = -1,
        stops: Sequence[int] = (),
    ) -> None:
        self.engine = engine
        self._socket = socket
        self._stops = stops
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._wake_fd = wake_fd
        if wake_fd >= 0:
            self._poller.register(wake_fd, zmq.POLLIN)
        if engine.alarm is not None:  # a rank may be lost while there is nothing to do
            self._poller.register(engine.alarm.fileno(), zmq.POLLIN)
        self._deadline: float | None = None  # of the drain; monotonic seconds
        self._stats_sent = 0.0
        self._stats_told: tuple[int | str, ...] = ()
        self._num_bad = 0
        self._num_polls = 0

    # --- loop

    def run(self) -> int:
        """Serve until told to leave; gives the exit code."""
        while True:
            busy = self.engine.has_unfinished()
            if not busy:
                self._send_stats()
            self._receive(block=not busy and self._deadline is None)
            trouble = self.engine.trouble()
            if trouble is not None:
                return self._die(trouble)
            if self._drained():
                self._send_stats()
                self._send(Failed(None, "the engine was shut down"))
                return 0
            if self.engine.has_unfinished():
                try:
                    outputs = self.engine.step()
                except EngineDead as error:
                    return self._die(str(error))
                if outputs:
                    self._send(Tokens(outputs))
                if time.monotonic() - self._stats_sent >= STATS_INTERVAL_S:
                    self._send_stats()

    def drain(self, seconds: float) -> None:
        """Refuse new requests; leave when the others are done, or after ``seconds``."""
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def _drained(self) -> bool:
        if self._stops and self._deadline is None:
            self.drain(SIGTERM_DRAIN_S)
        if self._deadline is None:
            return False
        if time.monotonic() >= self._deadline and self.engine.num_unfinished:
            self.engine.abort_all()
            self._send(Tokens(self.engine.step()))
        return not self.engine.has_unfinished()

    def _die(self, reason: str) -> int:
        outputs = self.engine.fail_all(reason)
        if outputs:
            self._send(Tokens(outputs))
        self._send(Failed(None, reason))
        return EXIT_FATAL

    # --- messages

    def _receive(self, block: bool) -> None:
        """Handle every message that is there; with ``block``, wait for one (or a signal)."""
        self._num_polls += 1
        ready = dict(self._poller.poll(None if block else 0))
        if self._wake_fd in ready:
            os.read(self._wake_fd, 4096)
        for _ in range(MAX_MESSAGES if self._socket in ready else 0):
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_to_engine(frame)
            except msgspec.DecodeError as error:
                self._num_bad += 1
                print(f"engine: message ignored: {error}", file=sys.stderr, flush=True)
            else:
                self._handle(message)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort(request_id, index):
                self.engine.abort(request_id, None if index < 0 else index)
            case Ping(nonce):
                self._send(Pong(nonce, self._stats()))
            case Shutdown(deadline_s):
                self.drain(deadline_s)

    def _submit(self, message: Submit) -> None:
        request = message.request
        try:
            if self._deadline is not None:
                raise InvalidRequest("the engine is shutting down")
            self.engine.add_request(request)
        except FxlmError as error:
            param = error.param if isinstance(error, InvalidRequest) else None
            self._send(Failed(request.request_id, str(error), param))

    def _stats(self) -> Stats:
        stats = self.engine.stats()
        stats.num_messages_bad = self._num_bad
        stats.num_polls = self._num_polls
        return stats

    def _send_stats(self) -> None:
        """Tell the numbers if they changed."""
        stats = self._stats()
        ended = sum(stats.finished.values())
        told = (
            *(stats.num_steps, stats.num_running, stats.num_waiting, ended),
            *(stats.num_messages_bad, stats.tier, stats.weights),
        )
        if told != self._stats_told:
            self._stats_told = told
            self._stats_sent = time.monotonic()
            self._send(stats)

    def _send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))


# --- process


def load_factory(name: str) -> "Callable[..., Engine]":
    """The function called ``module:function``."""
    module, _, function = name.partition(":")
    factory: Callable[..., Engine] = getattr(importlib.import_module(module), function)
    return factory


def run_service(spec: ServiceSpec, wake_fd: int = -1, stops: Sequence[int] = ()) -> int:
    """Build the engine, report it, serve; gives the exit code.

    Args:
        spec: what to build and where to connect.
        wake_fd: readable when a signal came in.
        stops: the loop drains once it is not empty (a signal handler appends to it).
    """
    context = zmq.Context()
    socket = connect(context, spec)
    socket.linger = LINGER_MS
    try:
        try:
            engine = load_factory(spec.factory)(**spec.kwargs)
        except Exception as error:
            _report(error)
            socket.send(encode(Failed(None, _describe(error))))
            return EXIT_FATAL
        info = engine.info()
        info.pid = os.getpid()
        socket.send(encode(Ready(info)))
        service = Service(engine, socket, wake_fd, stops)
        try:
            return service.run()
        except Exception as error:  # a fault of ours: tell it before leaving
            _report(error)
            return service._die(_describe(error))
    finally:
        socket.close()
        context.term()


def _describe(error: Exception) -> str:
    """A sentence for the user: his faults in their own words, ours with their class."""
    return str(error) if isinstance(error, FxlmError) else f"{type(error).__name__}: {error}"


def _report(error: Exception) -> None:
    """The traceback of a fault of ours, on standard error; a user's fault needs none."""
    fault = error.__cause__ if isinstance(error, EngineDead) else error
    if fault is not None and not isinstance(fault, FxlmError):
        sys.excepthook(type(fault), fault, fault.__traceback__)
        sys.stderr.flush()


@contextlib.contextmanager
def _signals(stops: list[int]) -> Iterator[int]:
    """Note SIGTERM, ignore SIGINT; yields a descriptor that wakes a poll."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    signal.signal(signal.SIGUSR1, lambda number, _: None)  # wakes the loop: there is news to tell
    try:
        yield read_fd
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read_fd)
        os.close(write_fd)


def main() -> int:
    """Entry of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = read_line()
    if line is None:
        return EXIT_ORPHAN
    spec = msgspec.json.decode(line, type=ServiceSpec)
    os.dup2(2, 1)
    sys.path[:0] = spec.paths
    watch_lifeline(spec.parent_pid)
    stops: list[int] = []
    with _signals(stops) as wake_fd:
        return run_service(spec, wake_fd, stops)


if __name__ == "__main__":
    leave(main())

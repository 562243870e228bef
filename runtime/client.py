"""The parent's end of the engine process, for one asyncio event loop.

Here: starting, watching and stopping the process, and handing its outputs to whoever asked. Not
here: what the process does (``service``), text (``outputs``). Imports no torch.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from fxlm.compiler.errors import EngineDead, InvalidRequest
from fxlm.runtime.messages import (
    Abort,
    EngineInfo,
    Failed,
    FromEngine,
    Output,
    Ping,
    Pong,
    Ready,
    Shutdown,
    Stats,
    Submit,
    Tokens,
    decode_from_engine,
    encode,
)
from fxlm.runtime.request import Request
from fxlm.runtime.transport import Address, ServiceSpec, listening, unlimited

Sink = Callable[[Output | Exception], None]
Show = Callable[[str], None]

SILENCE_S = 120.0  # longest step that is not taken for a hang
PATROL_S = 1.0
LAST_WORDS_S = 0.5  # for messages that are under way when the process ends
STDERR_LINES = 20
KILL_AFTER_S = 5.0


@dataclass(slots=True)
class _Pending:
    """A request in the engine."""

    sink: Sink
    unfinished: int


class EngineClient:
    """One engine process. Every method is called on the event loop that started it.

    Attributes:
        last_heartbeat: ``time.monotonic()`` of the last message from it.
    """

    def __init__(
        self, socket: zmq.asyncio.Socket, process: "_Process", stack: contextlib.ExitStack,
        hang_s: float | None = None,
    ) -> None:  # fmt: skip
        self._info: EngineInfo | None = None
        self.last_heartbeat = time.monotonic()
        self._socket = socket
        self._process = process
        self._stack = stack  # what to undo at the end
        self._loop = asyncio.get_running_loop()
        self._stats = Stats()
        self._pending: dict[str, _Pending] = {}
        self._pongs: dict[int, asyncio.Future[Stats]] = {}
        self._num_pings = 0
        self._busy_since = 0.0
        self._closing = False
        self._dead: str | None = None
        self._last_words: str | None = None
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._reader = self._loop.create_task(self._read())
        self._watcher = self._loop.create_task(self._watch())
        self._patroller = self._loop.create_task(self._patrol(hang_s)) if hang_s else None

    # --- start

    @classmethod
    async def start(
        cls,
        factory: str,
        kwargs: Mapping[str, Any] | None = None,
        *,
        paths: Sequence[str] = (),
        timeout_s: float | None = None,
        show: Show | None = None,
        hang_s: float | None = None,
    ) -> "EngineClient":
        """Start an engine process and wait until it is ready.

        Args:
            factory: ``module:function`` called in the process; gives an `Engine`. Its progress
                is what it writes to standard error.
            kwargs: of the factory: what JSON can say.
            paths: put in front of the process's ``sys.path``.
            timeout_s: None waits as long as the process lives (it may be compiling).
            show: gets what the process writes to standard error; None passes it on.
            hang_s: a process that has work, but neither speaks nor computes for so long, is
                ended (Linux); None: never.

        Raises:
            EngineDead: the process ended, with its last words; or the time was up.
        """
        stack = contextlib.ExitStack()
        try:
            context = zmq.asyncio.Context()
            stack.callback(context.term)
            socket = context.socket(zmq.DEALER)
            unlimited(socket)
            stack.callback(socket.close, 0)
            address = stack.enter_context(listening(socket))
            process = _Process(_spec(factory, kwargs, paths, address), show or _pass_on)
        except BaseException:
            stack.close()
            raise
        client = cls(socket, process, stack, hang_s)
        try:
            client._info = await asyncio.wait_for(asyncio.shield(client._ready), timeout_s)
        except TimeoutError as error:
            await client.close(0.0)
            message = f"the engine was not ready after {timeout_s:g} s"
            raise EngineDead(message) from error
        except BaseException:
            await client.close(0.0)
            raise
        return client

    @property
    def info(self) -> EngineInfo:
        """Sizes of the engine."""
        assert self._info is not None, "not started"
        return self._info

    # --- requests

    @property
    def stats(self) -> Stats:
        """The latest numbers that the engine sent; its totals are 0 before the first."""
        return self._stats

    @property
    def is_alive(self) -> bool:
        """Whether the process is there and has not given up."""
        return self._dead is None

    async def ended(self) -> str:
        """Wait until the process is gone; gives the reason."""
        await asyncio.shield(self._watcher)
        assert self._dead is not None
        return self._dead

    @property
    def num_unfinished(self) -> int:
        """Requests in the engine."""
        return len(self._pending)

    def trouble(self) -> str | None:
        """Why it cannot serve: it is dead, or has work and is silent for too long; else None."""
        if self._dead is not None:
            return self._dead
        if self._pending:
            silence = time.monotonic() - max(self.last_heartbeat, self._busy_since)
            if silence > SILENCE_S:
                return f"the engine has work and has been silent for {silence:.0f} s"
        return None

    def submit(self, request: Request, sink: Sink) -> None:
        """Start a request.

        ``sink`` is called on the event loop with each `Output`; or with one exception, after
        which nothing more comes: `InvalidRequest` if the engine refused it, `EngineDead`.

        Raises:
            EngineDead: the engine is gone.
            InvalidRequest: the id is in use, or a number does not fit its field.
        """
        if self._dead is not None:
            raise EngineDead(self._dead)
        if request.request_id in self._pending:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", "request_id")
        try:
            frame = encode(Submit(request))
        except (OverflowError, TypeError) as error:
            raise InvalidRequest(f"the request cannot be sent: {error}") from error
        if not self._pending:
            self._busy_since = time.monotonic()
        self._pending[request.request_id] = _Pending(sink, max(request.params.n, 1))
        self._send(frame)

    async def stream(self, request: Request) -> AsyncIterator[Output]:
        """Start a request and yield its outputs until all completions are finished.

        Closing the iterator earlier (or cancelling the task) aborts the request.

        Raises:
            InvalidRequest: the engine refused it.
            EngineDead: the engine is gone.
        """
        news: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self.submit(request, news.put_nowait)
        unfinished = request.params.n
        try:
            while unfinished:
                item = await news.get()
                if isinstance(item, Exception):
                    unfinished = 0
                    raise item
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            if unfinished:
                self.abort(request.request_id)

    def abort(self, request_id: str, index: int = -1) -> None:
        """Stop one completion, or all (-1); what is unknown or finished is ignored."""
        if self._dead is None and request_id in self._pending:
            self._send(encode(Abort(request_id, index)))

    async def ping(self, timeout_s: float | None = None) -> Stats:
        """Wait for an answer between two steps; gives the numbers of that moment.

        Raises:
            EngineDead: the engine is gone.
            TimeoutError: no answer in time.
        """
        if self._dead is not None:
            raise EngineDead(self._dead)
        self._num_pings += 1
        nonce = self._num_pings
        future: asyncio.Future[Stats] = self._loop.create_future()
        self._pongs[nonce] = future
        self._send(encode(Ping(nonce)))
        try:
            return await asyncio.wait_for(future, timeout_s)
        finally:
            self._pongs.pop(nonce, None)

    # --- messages

    def _send(self, frame: bytes) -> None:
        sent = asyncio.ensure_future(self._socket.send(frame, zmq.DONTWAIT))
        assert sent.done(), "a send that does not wait was not done"
        error = sent.exception()  # Again: the peer is gone; its exit will be noticed
        if error is not None and not isinstance(error, zmq.Again):
            raise error

    async def _read(self) -> None:
        while True:
            frame = await self._socket.recv()
            self.last_heartbeat = time.monotonic()
            try:
                message = decode_from_engine(frame)
            except msgspec.DecodeError as error:
                print(f"fxlm: message of the engine ignored: {error}", file=sys.stderr)
            else:
                self._handle(message)

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Tokens(outputs):
                for output in outputs:
                    self._deliver(output)
            case Stats():
                self._stats = message
            case Pong(nonce, stats):
                self._stats = stats
                if (future := self._pongs.get(nonce)) is not None and not future.done():
                    future.set_result(stats)
            case Failed(None, reason):
                self._last_words = reason
                if not self._ended.done():
                    self._ended.set_result(None)
            case Failed(request_id, reason, param):
                pending = self._pending.pop(request_id or "", None)
                if pending is not None:
                    self._tell(pending.sink, InvalidRequest(reason, param))
            case Ready(info):
                if not self._ready.done():
                    self._ready.set_result(info)

    def _deliver(self, output: Output) -> None:
        pending = self._pending.get(output.request_id)
        if pending is None:
            return
        if output.finish_reason is not None:
            pending.unfinished -= 1
            if pending.unfinished == 0:
                del self._pending[output.request_id]
        self._tell(pending.sink, output)

    def _tell(self, sink: Sink, news: Output | Exception) -> None:
        """A fault of one receiver must not keep news from the others."""
        try:
            sink(news)
        except Exception as error:
            context = {"message": "a receiver of engine outputs failed", "exception": error}
            self._loop.call_exception_handler(context)

    # --- end

    async def _watch(self) -> None:
        """Wait for the process to end, then for its last words, then tell everyone."""
        code = await self._process.exited(self._loop)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._ended), LAST_WORDS_S)
        self._reader.cancel()
        if self._patroller is not None:
            self._patroller.cancel()
        self._dead = "the engine was shut down" if self._closing else self._describe_end(code)
        if not self._ready.done():
            self._ready.set_exception(EngineDead(self._dead))
            self._ready.exception()  # seen, whoever waits
        pending, self._pending = self._pending, {}
        for item in pending.values():
            self._tell(item.sink, EngineDead(self._dead))
        for future in self._pongs.values():
            if not future.done():
                future.set_exception(EngineDead(self._dead))

    async def _patrol(self, hang_s: float) -> None:
        """End a process that hangs. Turns are counted, not time: this one may be held up, too."""
        before, turns = (0.0, 0), 0
        while turns * PATROL_S < hang_s:
            await asyncio.sleep(PATROL_S)
            signs = self.last_heartbeat, self._process.cpu_ticks()
            turns = turns + 1 if self._pending and signs == before else 0
            before = signs
        idle = f"it has work, and did nothing for {hang_s:g} s"
        self._last_words = f"the engine process hangs: {idle}"
        self._process.kill(signal.SIGKILL)

    def _describe_end(self, code: int) -> str:
        if self._last_words is not None:
            return self._last_words
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " (the system kills a process that takes too much memory that way)"
        tail = self._process.tail()
        return f"the engine process ended with {how}" + (
            f"; its last lines:\n{tail}" if tail else ""
        )

    async def close(self, deadline_s: float = 5.0) -> None:
        """Stop the process: running requests have ``deadline_s`` seconds to finish.

        It is terminated, then killed, if it does not leave. May be called twice.
        """
        self._closing = True
        if not self._watcher.done():
            self._send(encode(Shutdown(deadline_s)))
            for stop, patience in (
                (None, deadline_s + KILL_AFTER_S if self._info is not None else 0.0),
                (signal.SIGTERM, KILL_AFTER_S if self._info is not None else 0.0),
                (signal.SIGKILL, None),
            ):
                if stop is not None:
                    self._process.kill(stop)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(self._watcher), patience)
                    break
        await self._watcher
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._process.close()
        self._stack.close()

    async def __aenter__(self) -> "EngineClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class _Process:
    """The child, its lifeline and its standard error."""

    def __init__(self, spec: ServiceSpec, show: Show) -> None:
        self._show = show
        self._lines: deque[str] = deque([""], maxlen=STDERR_LINES)
        self._popen = subprocess.Popen(
            # -P: what lies in the current directory must not shadow a library
            [sys.executable, "-P", "-m", "fxlm.runtime.service"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent
        )
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: its exit tells why
            self._popen.stdin.write(msgspec.json.encode(spec) + b"\n")
            self._popen.stdin.flush()  # stays open: its end tells the child that we are gone
        self._errors = threading.Thread(target=self._relay, name="engine-stderr", daemon=True)
        self._errors.start()

    def _relay(self) -> None:
        assert self._popen.stderr is not None
        fd = self._popen.stderr.fileno()
        while data := os.read(fd, 65536):
            text = data.decode(errors="replace")
            first, *others = text.split("\n")
            self._lines[-1] = (self._lines[-1] + first)[-1000:]
            self._lines.extend(line[:1000] for line in others)
            self._show(text)

    async def exited(self, loop: asyncio.AbstractEventLoop) -> int:
        """Wait for the end, without polling; gives the exit code (negative: the signal)."""
        future: asyncio.Future[int] = loop.create_future()

        def finish(code: int) -> None:
            if not future.done():
                future.set_result(code)

        def wait() -> None:
            code = self._popen.wait()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(finish, code)

        threading.Thread(target=wait, name="engine-wait", daemon=True).start()
        return await future

    def cpu_ticks(self) -> int:
        """CPU time of the child's main thread, which runs the steps; 0 where nobody can tell."""
        try:
            stat = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/stat").read_text()
        except OSError:
            return 0
        user, system = stat.rpartition(")")[2].split()[11:13]
        return int(user) + int(system)

    def tail(self) -> str:
        """The last lines of standard error."""
        self._errors.join(LAST_WORDS_S)  # a grandchild may hold the pipe open
        return "\n".join(line.rstrip("\r") for line in self._lines if line.strip())

    def kill(self, number: int) -> None:
        """Signal the child; with SIGKILL its own children, too."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._popen.pid, number)
            else:
                self._popen.send_signal(number)

    def close(self) -> None:
        assert self._popen.stdin is not None
        assert self._popen.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        self._errors.join(LAST_WORDS_S)
        if not self._errors.is_alive():
            self._popen.stderr.close()


def _spec(
    factory: str, kwargs: Mapping[str, Any] | None, paths: Sequence[str], address: Address
) -> ServiceSpec:
    return ServiceSpec(
        factory=factory,
        kwargs=dict(kwargs or {}),
        endpoint=address.endpoint,
        parent_pid=os.getpid(),
        paths=list(paths),
        server_key=address.server_key,
    )


def _pass_on(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()

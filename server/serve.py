"""`fxlm serve`: from flags to a listening server, and back to nothing when it is told to stop.

Here: start-up order (artifact, engine, socket), signals, draining, the lines to print. Not here:
compiling (`fxlm.runtime.launch`), the application (`app.py`).
"""

import argparse
import asyncio
import errno
import logging
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from fxlm.compiler.errors import EngineDead, InvalidOption
from fxlm.runtime.machine import process_started
from fxlm.server.app import create_app
from fxlm.server.errors import first_line, unavailable
from fxlm.server.explorer import Explorer
from fxlm.server.options import ServerOptions, server_options
from fxlm.server.state import ServerState

log = logging.getLogger("fxlm.server")
GRACE_S = 5  # for the last bytes, after the time for running requests is up
LOST_GRACE_S = 3  # for the bytes that tell why the engine is gone


# What is told when the server listens: its model, and its URL (None behind a Unix socket).
Announce = Callable[[str, str | None], None]


def serve(args: argparse.Namespace, announce: Announce) -> int:
    """Compile if needed, start the engine, serve until SIGTERM or Ctrl-C.

    Raises:
        EngineDead: the engine did not start, or was lost; a supervisor starts the server anew.
    """
    from fxlm.runtime import launch
    from fxlm.runtime.lifeline import leave
    from fxlm.server.engine import serving

    options = server_options(args)
    configure_logging(options.log_level)
    left = launch.serve_as_rank(args)
    if left is not None:  # a rank has no address
        leave(left)
    with taken(options) as listener:  # before minutes of compiling, not after
        spec = launch.prepare(args)

        async def run() -> str | None:
            async with serving(spec, args) as (engine, served):
                explorer = Explorer(spec.kwargs)
                server = Server(create_app(engine, served, options, explorer), options, announce)
                try:
                    await server.serve(sockets=[listener])
                finally:
                    await explorer.close()
                return server.lost

        lost = asyncio.run(run())
    if lost is not None:
        raise EngineDead(first_line(lost))
    return 0


@contextmanager
def taken(options: ServerOptions) -> Iterator[socket.socket]:
    """The address, ours within the block."""
    with bind(options) as listener:
        try:
            yield listener
        finally:
            if options.uds is not None:
                Path(options.uds).unlink(missing_ok=True)


def configure_logging(level: str) -> None:
    """All logs to stderr, one line each."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel("WARNING" if level == "info" else level.upper())


def bind(options: ServerOptions) -> socket.socket:
    """Take the address, without listening yet: a client is refused until the model is there.

    Raises:
        InvalidOption: it is taken, or not ours.
    """
    try:
        return bind_unix(options.uds) if options.uds else bind_tcp(options.host, options.port)
    except OSError as error:
        where = options.uds or f"{options.host}:{options.port}"
        reason = (error.strerror or str(error)).lower()
        field = "--uds" if options.uds else "--host/--port"
        raise InvalidOption(field, where, f"{reason}; choose another one") from error


def bind_tcp(host: str, port: int) -> socket.socket:
    """A bound TCP socket."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def bind_unix(path: str) -> socket.socket:
    """A bound Unix socket; one that a dead server left behind is replaced."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode) and made.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
    except FileNotFoundError:
        pass
    made.close()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(path)
    except OSError:
        made.close()
        raise
    return made


class Server(uvicorn.Server):
    """uvicorn with a word when it listens, and a drain that ends streams properly.

    After SIGTERM or Ctrl-C no new request is taken; running ones get ``shutdown_timeout_s``
    seconds, then an error event, and the process ends with status 0. When the engine is gone,
    its requests are told why, and the server ends too.

    Attributes:
        lost: why the engine is gone, if it is.
    """

    def __init__(self, app: Starlette, options: ServerOptions, announce: Announce) -> None:
        self.options = options
        self.announce = announce
        self.lost: str | None = None
        found = app.state.fxlm
        assert isinstance(found, ServerState), repr(found)
        self.state = found
        super().__init__(uvicorn_config(app, options))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self.state.metrics.engine.ready_s = time.time() - process_started()
        if self.options.is_public and not self.options.api_keys:
            log.warning("no --api-key: anyone who reaches %s can use the model", self.options.host)
        model = self.state.served.names[0]
        address = self.servers[0].sockets[0].getsockname()
        self.announce(model, None if self.options.uds else base_url(self.options, address[1]))

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes, or the engine is gone."""
        watch = asyncio.get_running_loop().create_task(self.end_with_engine())
        try:
            await super().serve(sockets)
        finally:
            watch.cancel()

    async def end_with_engine(self) -> None:
        """Stop when the engine is gone: it does not come back, and a supervisor can see an end."""
        self.lost = await self.state.bridge.engine.ended()
        self.state.bridge.trouble()  # the log has all of it
        self.config.timeout_graceful_shutdown = LOST_GRACE_S
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new; when the time is up, end what still runs."""
        self.state.draining = True
        loop = asyncio.get_running_loop()
        error = unavailable("The server is shutting down.", "shutting_down", 10)
        timer = loop.call_later(self.options.shutdown_timeout_s, self.state.bridge.end_all, error)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server in order; uvicorn would raise them again and skip our cleanup."""
        try:
            before = {sig: signal.signal(sig, self.on_signal) for sig in SIGNALS}
        except ValueError:  # not the main thread: whoever owns the signals decides
            before = {}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first one drains, a second Ctrl-C leaves at once."""
        if not self.should_exit:
            log.warning("stopping; running requests have %d s", self.options.shutdown_timeout_s)
        self.handle_exit(number, frame)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def uvicorn_config(app: Starlette, options: ServerOptions) -> uvicorn.Config:
    """uvicorn's side of the options. h11 is named because the header limit is its."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        root_path=options.root_path,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=options.limits.header_bytes,
        timeout_graceful_shutdown=options.shutdown_timeout_s + GRACE_S,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs,
        ssl_ciphers=options.ssl_ciphers,
    )


def base_url(options: ServerOptions, port: int) -> str:
    """Where a client of this machine reaches the server."""
    scheme = "https" if options.ssl_certfile else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{options.root_path}"


def banner(model: str, url: str | None, keyed: bool = False) -> str:
    """The URL and a line to paste."""
    if url is None:
        return f"Serving {model}."
    return f"Serving {model} on {url}\n\n{curl_line(model, url, keyed)}\n"


def curl_line(model: str, url: str, keyed: bool = False) -> str:
    """A request that works as it stands; where a key is asked for, once ``KEY`` is replaced."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 2 + 3?"}}]}}'
    headers = "-H 'Content-Type: application/json'"
    if keyed:
        headers += " -H 'Authorization: Bearer KEY'"
    return f"curl {url}/v1/chat/completions {headers} \\\n  -d '{body}'"

"""A real uvicorn on a loopback port, in a thread, over the fake engine."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import httpx2
import openai
import pytest

from fxlm.server.app import create_app
from fxlm.server.limits import Limits
from fxlm.server.options import ServerOptions
from fxlm.server.serve import Server, bind
from tests.server.fake import FakeEngine, served_model

T = TypeVar("T")
WAIT_S = 20.0
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # nothing is encrypted; spares reading roots


class Running:
    """A server in a thread; `call` runs a function on its loop."""

    def __init__(self, options: ServerOptions, **model: Any) -> None:
        self.engine = FakeEngine()
        self.app = create_app(self.engine, served_model(**model), options)
        self.clients: list[openai.OpenAI] = []
        self.ready = threading.Event()
        self.url = ""
        self.server = Server(self.app, options, self.on_ready)
        self.listener: socket.socket = bind(options)
        self.thread = threading.Thread(target=self.run, name="test-server")
        self.thread.start()
        assert self.ready.wait(WAIT_S)
        self.http = httpx2.Client(base_url=self.url, timeout=WAIT_S, verify=PLAIN)

    def on_ready(self, model: str, url: str | None) -> None:
        self.url = url or ""
        self.loop = asyncio.get_running_loop()
        self.ready.set()

    def run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self.listener]))

    def call(self, work: Callable[[], T]) -> T:
        """`work()` on the server's loop."""

        async def go() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(go(), self.loop).result(WAIT_S)

    def wait(self, until: Callable[[], bool]) -> None:
        """Return once `until()` holds, looked at between turns of the server's loop."""

        async def poll() -> None:
            async with asyncio.timeout(WAIT_S):
                while not until():
                    await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(poll(), self.loop).result(WAIT_S)

    def stop(self) -> None:
        for client in (self.http, *self.clients):
            client.close()
        self.server.should_exit = True
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()

    def client(self, **more: Any) -> openai.OpenAI:
        """The official client."""
        given = {"api_key": "none", "max_retries": 0, "timeout": WAIT_S} | more
        http = openai.DefaultHttpxClient(verify=PLAIN)
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", http_client=http, **given))
        return self.clients[-1]


Starter = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start servers with options of their own; all stop when the test ends."""
    running: list[Running] = []

    def starter(model: dict[str, Any] | None = None, **options: Any) -> Running:
        running.append(Running(ServerOptions(**({"port": 0} | options)), **(model or {})))
        return running[-1]

    yield starter
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def shared() -> Iterator[Running]:
    """One server for the tests that leave its knobs alone."""
    server = Running(ServerOptions(port=0, limits=Limits(body_bytes=1 << 20)))
    yield server
    server.stop()


@pytest.fixture
def running(shared: Running) -> Running:
    """The shared server with its fake engine as new."""
    fresh = FakeEngine()
    shared.call(lambda: vars(shared.engine).update(vars(fresh)))
    return shared


@pytest.fixture(scope="session")
def client_once(shared: Running) -> openai.OpenAI:
    """The official client of the shared server."""
    return shared.client()


@pytest.fixture
def client(client_once: openai.OpenAI, running: Running) -> openai.OpenAI:
    """The official client of the shared server, whose knobs are as new."""
    return client_once


def run(work: Coroutine[Any, Any, T]) -> T:
    """A coroutine, to its end."""
    return asyncio.run(work)

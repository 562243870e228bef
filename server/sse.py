"""Server-sent events, and what happens when the client goes away.

Here: `EventStream` (a response that ends its source when the client leaves) and
`until_disconnect` (the same for an answer in one piece). Not here: what the events say.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fxlm.server.errors import ApiError, as_api_error

T = TypeVar("T")
log = logging.getLogger("fxlm.server")
DONE = b"data: [DONE]\n\n"


class ClientLeft(Exception):
    """The client closed its connection; there is nobody left to answer."""


def event(payload: bytes) -> bytes:
    """One event; JSON holds no raw newline, so a line is enough."""
    return b"data: " + payload + b"\n\n"


async def wait_disconnect(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Run `work` to its end, or cancel it and raise `ClientLeft` when the client goes away."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        await finish(task)
        await finish(watch)


async def finish(task: asyncio.Future[Any]) -> None:
    """Cancel `task` and wait for its end, whatever that is."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # seen


class EventStream(Response):
    """A stream of ready-made events; its first one is awaited before the status is sent.

    An error before the first event becomes an ordinary error response, a later one an error
    event that ends the stream. When the client leaves, `source` is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        self.source = source
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(self.stream(scope, receive, send), receive)
        except ClientLeft:
            pass
        finally:
            await self.source.aclose()

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        try:
            chunk = await anext(self.source)
        except Exception as error:
            await error_of(error).response()(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await send_chunk(send, chunk)
        try:
            async for chunk in self.source:
                await send_chunk(send, chunk)
        except Exception as error:
            await send_chunk(send, event(error_of(error).body()))
        with contextlib.suppress(OSError):  # the client left with the last event
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def send_chunk(send: Send, chunk: bytes) -> Awaitable[None]:
    """Send one piece of the body."""
    return send({"type": "http.response.body", "body": chunk, "more_body": True})


def error_of(error: Exception) -> ApiError:
    """The client's view of `error`; a fault of ours goes to the log in full."""
    found = as_api_error(error)
    if found.code == "internal_error":
        log.error("internal error in a stream", exc_info=error)
    return found


def encode_event(payload: msgspec.Struct) -> bytes:
    """A struct as one event."""
    return event(msgspec.json.encode(payload))

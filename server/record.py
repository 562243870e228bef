"""One request's facts for its log line, and the middleware around everything else.

Here: `Record` (filled by the handlers), request ids, the access log, the last catch for faults of
ours, the bound on headers. Content is never logged. Not here: metrics (`metrics.py`).
"""

import logging
import time
import uuid
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fxlm.server.errors import ApiError, as_api_error

log = logging.getLogger("fxlm.access")
log_errors = logging.getLogger("fxlm.server")
QUIET_PATHS = frozenset({"/health", "/metrics"})
MAX_ID_CHARS = 128


@dataclass(kw_only=True, slots=True)
class Record:
    """What is known of one HTTP request; times are seconds of the monotonic clock."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The tail of the log line: tokens, times, finish reasons."""
        words = [f"id={self.request_id}"]
        if self.prompt_tokens is not None:
            words.append(f"prompt={self.prompt_tokens} cached={self.cached_tokens}")
            words.append(f"generated={self.generated_tokens}")
        if self.first_token is not None:
            words.append(f"ttft={self.first_token - self.started:.3f}s")
        words.append(f"total={time.monotonic() - self.started:.3f}s")
        if self.finish_reasons:
            words.append(f"finish={','.join(self.finish_reasons)}")
        return " ".join(words)


def record_of(scope: Scope) -> Record:
    """The record of the request that `scope` belongs to."""
    found = scope["fxlm.record"]
    assert isinstance(found, Record), repr(found)
    return found


def choose_id(scope: Scope) -> str:
    """The client's X-Request-Id where it is short and plain, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = bytes(value).decode("latin-1")
            if 0 < len(text) <= MAX_ID_CHARS and text.isascii() and text.isprintable():
                return str(text).replace(" ", "_")
    return uuid.uuid4().hex


class RecordMiddleware:
    """Gives each request a `Record`, answers its X-Request-Id, writes one line when it ends.

    A fault of ours is caught here: the log gets all of it, the client a 500 without detail, and
    the connection lives on.
    """

    def __init__(self, app: ASGIApp, max_header_bytes: int) -> None:
        self.app = app
        self.max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope["fxlm.record"] = Record(request_id=choose_id(scope))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                mine = (b"x-request-id", record.request_id.encode("ascii"))
                message = {**message, "headers": [*message.get("headers", []), mine]}
            await send(message)

        try:
            await self.answer(scope, receive, send_with_id, record)
        finally:
            write_line(scope, record)

    async def answer(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        """The application's answer, or a 431, or a 500."""
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self.max_header_bytes:
            message = f"The headers have {size} bytes; at most {self.max_header_bytes} go."
            error = ApiError(431, message, code="headers_too_large")
            await error.response()(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            log_errors.error("internal error, id=%s", record.request_id, exc_info=error)
            if record.status:
                raise  # too late for a status: the server closes the connection
            await as_api_error(error).response()(scope, receive, send)


def write_line(scope: Scope, record: Record) -> None:
    """One line; polls of /health and /metrics only at debug level."""
    path = scope["path"]
    level = logging.DEBUG if path in QUIET_PATHS and record.status < 400 else logging.INFO
    shown = path if path.isascii() and path.isprintable() else ascii(path)
    status = record.status or "client-left"
    log.log(level, "%s %s %s %s", scope["method"], shown[:200], status, record.line())

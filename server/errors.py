"""What a client is told when something is wrong: OpenAI's error object and its status.

Here: `ApiError`, the mapping from the errors of the lower floors to it, and the handlers that
Starlette calls. Not here: the checks that raise them.
"""

import logging
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fxlm.compiler.errors import EngineDead, FxlmError, InvalidRequest, OutOfMemory

log = logging.getLogger("fxlm.server")

# OpenAI's `type` by status; whatever is not listed is the client's fault below 500.
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """The inside of OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's error object: ``{"error": {message, type, param, code}}``."""

    error: ErrorDetail


class ApiError(Exception):
    """An error with the status, the object and the headers that a client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error object as JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorBody(error=detail))

    def response(self) -> Response:
        """The error as a whole HTTP response."""
        return Response(
            self.body(), self.status, headers=self.headers, media_type="application/json"
        )


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 about one field of the request (``None``: about the whole of it)."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after_s: int = 1) -> ApiError:
    """A 503 that a client may try again after `retry_after_s` seconds."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after_s)})


def engine_dead(reason: str) -> ApiError:
    """The 503 for an engine that is gone. Only the first line of its last words is told: the rest
    is what the engine printed, and is for the operator."""
    return unavailable(f"The engine is not running: {first_line(reason)}.", "engine_dead", 10)


def first_line(reason: str) -> str:
    """What may be shown of an engine's last words to whoever asks."""
    return reason.partition("\n")[0].removesuffix("its last lines:").rstrip("; .")


def as_api_error(error: Exception) -> ApiError:
    """Map an error of the lower floors to what the client is told; unknown ones are a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        return bad_request(str(error), error.param)
    if isinstance(error, EngineDead):
        return engine_dead(str(error))
    if isinstance(error, OutOfMemory):
        return unavailable(str(error), "out_of_memory", 5)
    if isinstance(error, FxlmError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "Internal error; the server's log says more.", code="internal_error")


async def on_error(_: Request, error: Exception) -> Response:
    """Handler of `ApiError` and `FxlmError`."""
    return as_api_error(error).response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Handler of Starlette's own errors: an unknown route, a wrong method."""
    assert isinstance(error, HTTPException), repr(error)
    text = {
        404: f"There is no route {request.url.path}.",
        405: f"{request.method} is not allowed on {request.url.path}.",
    }.get(error.status_code, error.detail)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, text, code=code, headers=error.headers).response()

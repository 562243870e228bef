"""Bytes of a body to a typed request, or a 400 that names the field.

Here: receiving the body within its bounds, JSON, types, unknown and unsupported fields.
Not here: what the values mean (`params.py`, `chat.py`, `completions.py`).
"""

import asyncio
import json
import math
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from fxlm.compiler.nearest import did_you_mean
from fxlm.server.errors import ApiError, bad_request
from fxlm.server.limits import Limits
from fxlm.server.protocol import (
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    Ignored,
    Message,
    Sampling,
    StreamOptions,
    Unsupported,
)

R = TypeVar("R", bound=Sampling)

DECODERS: dict[type[Sampling], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (ChatRequest, CompletionRequest)
}
UNSERVED = frozenset(Unsupported.__struct_fields__) - frozenset(Ignored.__struct_fields__)
CHAT_UNSERVED: dict[str, tuple[Any, ...]] = {"echo": (False,), "prompt_logprobs": ()}
PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")
UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`", re.DOTALL)
MISSING = re.compile(r"^Object missing required field `(.*)`")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body; 413 when it is too large, 408 when it comes too slowly.

    A declared length over the bound is refused before anything is read.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:19]) > limits.body_bytes:
        raise too_large(int(declared[:19]), limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large(len(body), limits)
    except TimeoutError:
        message = f"The body did not arrive within {limits.body_seconds:g} s."
        raise ApiError(408, message, code="request_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The client left before the body was complete.") from None
    return bytes(body)


def too_large(size: int, limits: Limits) -> ApiError:
    """The 413 for a body of at least `size` bytes."""
    message = f"The body has {size} bytes or more; at most {limits.body_bytes} are accepted."
    return ApiError(413, message, code="request_too_large")


def check_content_type(request: Request) -> None:
    """Only JSON: a web page cannot send that across origins without asking first (CORS)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        message = f"Content-Type is {kind!r}; send 'application/json'."
        raise ApiError(415, message, code="unsupported_media_type")


async def read_request(request: Request, kind: type[R], limits: Limits) -> R:
    """Receive, decode and check the fields of one request."""
    check_content_type(request)
    return decode(await read_body(request, limits), kind, limits)


def decode(body: bytes, kind: type[R], limits: Limits) -> R:
    """Decode `body`, refusing wrong types and unknown or unsupported fields by name."""
    try:
        parsed: R = DECODERS[kind].decode(body)
    except msgspec.ValidationError as error:
        raise explain(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        refuse_constants(body)
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise bad_request("The body is nested too deeply.", code="invalid_json") from None
    check_unsupported(parsed)
    return parsed


def refuse_constants(body: bytes) -> None:
    """Name the field of a NaN or an infinity: Python's encoder writes them, JSON has none.

    Raises:
        ApiError: there is one; a body that is wrong in another way is left alone.
    """
    if b"NaN" not in body and b"Infinity" not in body:
        return
    try:
        left: list[tuple[str, Any]] = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return
    while left:
        where, value = left.pop()
        if isinstance(value, dict):
            left += [(join(where, key[:100]), each) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(f"{where}[{i}]", each) for i, each in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            message = f"{where}={json.dumps(value)} cannot be used: JSON has finite numbers only."
            raise bad_request(message, where or None, "invalid_json")


def explain(text: str, kind: type[Sampling]) -> ApiError:
    """Turn msgspec's message into a 400 that names the field, with a guess for a misspelt one."""
    found = PATH.search(text)
    where = found.group(1) if found else ""
    what = text[: found.start()] if found else text
    if missing := MISSING.match(what):
        param = join(where, missing.group(1))
        return bad_request(f"{param} is required.", param, "missing_required_parameter")
    if unknown := UNKNOWN.match(what):
        name = unknown.group(1)[:100]
        guess = did_you_mean(name, served_fields(where, kind))
        param = join(where, name)
        return bad_request(f"{param} is not a known field.{guess}", param, "unknown_parameter")
    if not where:
        return bad_request(f"The body must be a JSON object. {what}.", code="invalid_json")
    return bad_request(f"{where}: {what}.", where, "invalid_type")


def join(where: str, name: str) -> str:
    """``messages[0]`` and ``role`` to ``messages[0].role``."""
    return f"{where}.{name}" if where else name


def served_fields(where: str, kind: type[Sampling]) -> list[str]:
    """Names worth suggesting for an unknown field at `where`."""
    structs: list[tuple[str, type[msgspec.Struct]]] = [
        (r"stream_options$", StreamOptions),
        (r"messages\[\d+\]$", Message),
        (r"messages\[\d+\]\.content\[\d+\]$", ContentPart),
    ]
    for pattern, struct in structs:
        if re.match(pattern, where):
            return list(struct.__struct_fields__)
    return [name for name in kind.__struct_fields__ if name not in UNSERVED]


def check_unsupported(parsed: Sampling) -> None:
    """Refuse every field that would change the answer and is not served."""
    table: dict[str, tuple[Any, ...]] = {name: NEUTRAL.get(name, ()) for name in UNSERVED}
    if isinstance(parsed, ChatRequest):
        table |= CHAT_UNSERVED
    for name, neutral in table.items():
        value = getattr(parsed, name)
        if value is not None and not any(same(value, item) for item in neutral):
            message = f"{name} is not supported by this server; leave it out."
            raise bad_request(message, name, "unsupported_parameter")


def same(value: Any, neutral: Any) -> bool:
    """Equality that keeps ``True`` apart from ``1`` and lets ``1`` be ``1.0``."""
    if isinstance(value, bool) != isinstance(neutral, bool):
        return False
    return bool(value == neutral)


def check_depth(value: Any, depth: int, param: str) -> None:
    """Refuse a free-form value nested more than `depth` levels."""
    level = [value]
    for _ in range(depth):
        nested = (item for item in level if isinstance(item, dict | list))
        level = [
            child
            for item in nested
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise bad_request(f"{param} is nested more than {depth} levels deep.", param, "too_deep")

"""Who may call: API keys, denied by default on every route.

Here: the key check and the two or three open paths. Not here: TLS (uvicorn), CORS (Starlette).
A new route is guarded without being named anywhere.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from fxlm.server.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/version"})


class AuthMiddleware:
    """Asks for ``Authorization: Bearer KEY`` on every path but the open ones.

    Args:
        keys: accepted keys; empty = nobody is asked.
        open_paths: paths answered without a key.
        root_path: prefix that a proxy strips (uvicorn puts it before every path).
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str] = (),
        open_paths: Iterable[str] = OPEN_PATHS,
        root_path: str = "",
    ) -> None:
        self.app = app
        # Digests have one length, so that comparing tells nothing of a key's.
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.open_paths = frozenset(root_path.rstrip("/") + path for path in open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self.digests:
            await self.app(scope, receive, send)
            return
        assert scope["type"] == "http", scope["type"]  # uvicorn runs with ws="none"
        tenant = self.tenant(scope)
        if tenant is None and scope["path"] not in self.open_paths:
            await refusal(scope).response()(scope, receive, send)
            return
        # With several keys the prefix cache is kept apart by key: who shares a cache can
        # time it. The number of the key serves as salt.
        if tenant is not None and len(self.digests) > 1:
            scope["fxlm.tenant"] = f"key{tenant}"
        await self.app(scope, receive, send)

    def tenant(self, scope: Scope) -> int | None:
        """Index of the key that the request carries, or None; every key is compared."""
        token = bearer(scope)
        if token is None:
            return None
        digest = hashlib.sha256(token).digest()
        found = None
        for index, known in enumerate(self.digests):
            if hmac.compare_digest(digest, known):
                found = index
        return found


def bearer(scope: Scope) -> bytes | None:
    """The token of the Authorization header, if it is there once and a Bearer."""
    values = [bytes(value) for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = values[0].partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" and token.strip() else None


def refusal(scope: Scope) -> ApiError:
    """The 401: says whether a key is missing or wrong, never which ones exist."""
    missing = bearer(scope) is None
    message = (
        "No API key was given: send 'Authorization: Bearer KEY'."
        if missing
        else "The API key is not accepted."
    )
    code = "missing_api_key" if missing else "invalid_api_key"
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})


def tenant_of(scope: Scope) -> str:
    """The salt that keeps one key's prefix cache from another's (empty: one tenant)."""
    return str(scope.get("fxlm.tenant", ""))

"""The application: routes, middleware, error handlers, as data.

Here: `create_app` and the small routes. Not here: the two endpoints that generate (`chat.py`,
`completions.py`), the process around the application (`serve.py`).
"""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import fxlm
from fxlm.compiler.errors import FxlmError
from fxlm.server.auth import OPEN_PATHS, AuthMiddleware
from fxlm.server.bridge import Bridge, Engine
from fxlm.server.chat import chat_completions
from fxlm.server.completions import completions
from fxlm.server.errors import ApiError, first_line, on_error, on_http_error
from fxlm.server.explorer import Explorer, compiler_page
from fxlm.server.metrics import CONTENT_TYPE, Metrics
from fxlm.server.options import ServerOptions
from fxlm.server.record import RecordMiddleware
from fxlm.server.replies import ModelCard, ModelList, to_json
from fxlm.server.served import ServedModel
from fxlm.server.sse import ClientLeft
from fxlm.server.state import ServerState, state_of


def json_response(value: object, status: int = 200) -> Response:
    """A struct as a JSON response."""
    return Response(to_json(value), status, media_type="application/json")


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    return json_response(ModelList(data=cards(state_of(request).served)))


async def show_model(request: Request) -> Response:
    """GET /v1/models/{id}; ids may hold slashes, as hub ids do."""
    served = state_of(request).served
    name = served.check_name(request.path_params["model"])
    return json_response(next(card for card in cards(served) if card.id == name))


def cards(served: ServedModel) -> list[ModelCard]:
    """One card for each name of the model."""
    return [
        ModelCard(
            id=name, created=served.created, root=served.root, max_model_len=served.max_model_len
        )
        for name in served.names
    ]


async def health(request: Request) -> Response:
    """GET /health: 200 while the engine is alive and its heartbeat fresh, else 503 and why."""
    reason = state_of(request).trouble()
    if reason is not None:
        return ApiError(503, f"Not healthy: {first_line(reason)}.", code="unhealthy").response()
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    return Response(state_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def version(_: Request) -> Response:
    """GET /version."""
    return JSONResponse({"version": fxlm.__version__})


def routes() -> list[Route]:
    """Every route. A key is asked for on all of them but those of `auth.OPEN_PATHS`."""
    return [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/version", version),
        Route("/compiler", compiler_page),
    ]


def middleware(options: ServerOptions) -> list[Middleware]:
    """From the outside in: record and log; CORS, if any origin is allowed; keys."""
    open_paths = OPEN_PATHS | ({"/metrics"} if options.metrics_public else set())
    stack = [Middleware(RecordMiddleware, max_header_bytes=options.limits.header_bytes)]
    if options.allowed_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(options.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
                expose_headers=["X-Request-Id"],
            )
        )
    stack.append(
        Middleware(
            AuthMiddleware,
            keys=options.api_keys,
            open_paths=open_paths,
            root_path=options.root_path,
        )
    )
    return stack


async def on_client_left(_: Request, __: Exception) -> Response:
    """Nobody reads this; the status is nginx's, for the log."""
    return Response(status_code=499)


def create_app(
    engine: Engine,
    served: ServedModel,
    options: ServerOptions | None = None,
    explorer: Explorer | None = None,
) -> Starlette:
    """The ASGI application over a started engine.

    Args:
        engine: a started client of the engine.
        served: the model it runs.
        options: keys, limits, origins; nothing of them is read later from elsewhere.
        explorer: makes the page of ``/compiler``; None: there is none.
    """
    options = options or ServerOptions()
    numbers = Metrics(served.names[0], served.max_model_len, lambda: engine.stats)
    app = Starlette(
        routes=routes(),
        middleware=middleware(options),
        exception_handlers={
            ApiError: on_error,
            FxlmError: on_error,
            ClientLeft: on_client_left,
            HTTPException: on_http_error,
        },
    )
    app.router.redirect_slashes = False  # a redirect would name a host that the client chose
    bridge = Bridge(engine, served, numbers, options.max_num_queued_reqs)
    app.state.explorer = explorer
    if explorer is not None:
        explorer.busy = lambda: bridge.num_live > 0
    app.state.fxlm = ServerState(
        served=served,
        bridge=bridge,
        metrics=numbers,
        options=options,
    )
    return app

"""What the handlers of one application share.

Not here: anything of a single request.
"""

from dataclasses import dataclass

from starlette.requests import Request

from fxlm.server.bridge import Bridge
from fxlm.server.errors import engine_dead, unavailable
from fxlm.server.metrics import Metrics
from fxlm.server.options import ServerOptions
from fxlm.server.served import ServedModel


@dataclass(kw_only=True, slots=True)
class ServerState:
    """The model, the way to the engine, the options; `draining` once a shutdown began."""

    served: ServedModel
    bridge: Bridge
    metrics: Metrics
    options: ServerOptions
    draining: bool = False

    def trouble(self) -> str | None:
        """Why nothing can be served now, or None."""
        reason = self.bridge.trouble()
        return "the server is shutting down" if reason is None and self.draining else reason

    def check_ready(self) -> None:
        """503 when nothing can be served now, before any work is done for the request."""
        reason = self.bridge.trouble()
        if reason is not None:
            raise engine_dead(reason)
        if self.draining:
            raise unavailable("The server is shutting down.", "shutting_down", 10)


def state_of(request: Request) -> ServerState:
    """The state of the application that `request` came to."""
    found = request.app.state.fxlm
    assert isinstance(found, ServerState), repr(found)
    return found

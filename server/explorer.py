"""GET /compiler: the page of `fxlm explain` for the model that is served.

It is built when somebody first asks, by a process of low priority, and then kept. Not here: what
is on it (`fxlm.runtime.explain`).
"""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from fxlm.server.errors import ApiError

CHILD = (sys.executable, "-P", "-m", "fxlm.runtime.explain.child")
RELOAD_S = 2
WAITING = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="refresh" content="{RELOAD_S}"><meta name="viewport" content="width=device-width">
<title>fxlm explain</title><style>:root{{color-scheme:light dark}}body{{font:16px system-ui;
display:grid;place-content:center;min-height:90vh;text-align:center}}</style></head>
<body><p>The page is being made, beside the engine and at low priority.<br>It appears here by
itself.</p></body></html>"""


class Explorer:
    """The page of one model, made once.

    Args:
        options: of the engine, as plain values.
        command: what makes the page; reads the job on its standard input.
    """

    def __init__(self, options: Mapping[str, Any], command: tuple[str, ...] = CHILD) -> None:
        self.options = dict(options)
        self.command = command
        self.page: bytes | None = None
        self.failure: str | None = None
        self.building: asyncio.Task[None] | None = None

    def ask(self) -> bytes | None:
        """The page; None while it is being made, which this begins.

        Raises:
            ApiError: it cannot be made; the next call tries again.
        """
        if self.failure is not None:
            reason, self.failure = self.failure, None
            raise ApiError(500, f"The page cannot be made: {reason}.", code="explain_failed")
        if self.page is None and self.building is None:
            self.building = asyncio.create_task(self._build())
        return self.page

    async def close(self) -> None:
        """Stop making it."""
        if self.building is not None:
            self.building.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.building

    async def _build(self) -> None:
        try:
            with tempfile.TemporaryDirectory() as place:
                path = Path(place) / "page.html"
                self.failure = await self._run(path)
                if self.failure is None:
                    self.page = path.read_bytes()
        except OSError as error:
            self.failure = str(error)
        finally:
            self.building = None

    async def _run(self, path: Path) -> str | None:
        """Run the process; the last line of what it says if it fails."""
        job = msgspec.json.encode({"options": self.options, "output": str(path)})
        process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, said = await process.communicate(job + b"\n")
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode == 0:
            return None
        lines = said.decode(errors="replace").strip().splitlines()
        return lines[-1].rstrip(".") if lines else f"exit status {process.returncode}"


async def compiler_page(request: Request) -> Response:
    """GET /compiler: the page, or 202 and a page that loads itself anew."""
    explorer: Explorer | None = request.app.state.explorer
    if explorer is None:
        raise ApiError(404, "This server has no compiler page.", code="not_found")
    page = explorer.ask()
    if page is None:
        return HTMLResponse(WAITING, 202, headers={"Retry-After": str(RELOAD_S)})
    return HTMLResponse(page)

"""GET /compiler: the page of `fxlm explain` for the model that is served.

It is built when somebody first asks, by a process of the lowest priority, and then kept. Even such
a process costs the engine much where threads wait for each other at every layer, so it stands still
while requests run, but for a slice a second that brings it to an end some day. Not here: what is on
the page (`fxlm.runtime.explain`).
"""

import asyncio
import contextlib
import html
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from fxlm.server.errors import ApiError

CHILD = (sys.executable, "-P", "-m", "fxlm.runtime.explain.child")
RELOAD_S = 2
SLICE_S = 0.02  # how often it is asked whether requests run, and how long a slice is
BETWEEN_S = 1.0  # slices, while requests run; and without any until the process goes on
WAITING = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="refresh" content="{reload}"><meta name="viewport" content="width=device-width">
<title>fxlm explain</title><style>:root{{color-scheme:light dark}}body{{font:16px system-ui;
display:grid;place-content:center;min-height:90vh;text-align:center}}</style></head>
<body><p>The page is being made, beside the engine and on cores that serving leaves over.<br>It
appears here by itself.</p><p>{progress}</p></body></html>"""


class Explorer:
    """The page of one model, made once.

    Args:
        options: of the engine, as plain values.
        command: what makes the page; reads the job on its standard input, and says on its standard
            output what it is at.

    Attributes:
        busy: whether requests run.
    """

    def __init__(self, options: Mapping[str, Any], command: tuple[str, ...] = CHILD) -> None:
        self.options = dict(options)
        self.command = command
        self.page: bytes | None = None
        self.failure: str | None = None
        self.building: asyncio.Task[None] | None = None
        self.busy: Callable[[], bool] = lambda: False
        self.said = "starting"
        self.began = 0.0
        self.paused = False

    def waiting(self) -> str:
        """The page meanwhile, with how far it is."""
        seconds = time.monotonic() - self.began
        paused = "; standing still, as requests run" if self.paused else ""
        progress = f"{html.escape(self.said)} ({seconds:.0f} s so far{paused})"
        return WAITING.format(reload=RELOAD_S, progress=progress)

    def ask(self) -> bytes | None:
        """The page; None while it is being made, which this begins.

        Raises:
            ApiError: it cannot be made; the next call tries again.
        """
        if self.failure is not None:
            reason, self.failure = self.failure, None
            raise ApiError(500, f"The page cannot be made: {reason}.", code="explain_failed")
        if self.page is None and self.building is None:
            self.said, self.began = "starting", time.monotonic()
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
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        last_words = asyncio.create_task(process.stderr.read())
        pace = asyncio.create_task(self._pace(process))
        try:
            with contextlib.suppress(ConnectionError):  # it ended: its last words say why
                process.stdin.write(job + b"\n")
                await process.stdin.drain()
            async for line in process.stdout:
                self.said = line.decode(errors="replace").strip()
            said = await last_words
            await process.wait()
        except asyncio.CancelledError:
            last_words.cancel()
            process.kill()
            await process.wait()
            raise
        finally:
            pace.cancel()
            self.paused = False
        if process.returncode == 0:
            return None
        lines = said.decode(errors="replace").strip().splitlines()
        return lines[-1].rstrip(".") if lines else f"exit status {process.returncode}"

    async def _pace(self, process: asyncio.subprocess.Process) -> None:
        """Let the process run while no request does, and a slice at a time while one does."""
        busy_at = slice_at = -math.inf
        while process.returncode is None:
            now = time.monotonic()
            busy_at = now if self.busy() else busy_at
            idle, due = now - busy_at >= BETWEEN_S, now - slice_at >= BETWEEN_S
            if due:
                slice_at = now
            if self.paused == (idle or due):
                self.paused = not self.paused
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGSTOP if self.paused else signal.SIGCONT)
            await asyncio.sleep(SLICE_S)


async def compiler_page(request: Request) -> Response:
    """GET /compiler: the page, or 202 and a page that loads itself anew."""
    explorer: Explorer | None = request.app.state.explorer
    if explorer is None:
        raise ApiError(404, "This server has no compiler page.", code="not_found")
    page = explorer.ask()
    if page is None:
        return HTMLResponse(explorer.waiting(), 202, headers={"Retry-After": str(RELOAD_S)})
    return HTMLResponse(page)

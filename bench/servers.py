"""Start a server by its command, wait for its first token, end it with its children."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx

sys.path.insert(0, str(Path(__file__).resolve().parent / "drivers"))
from protocol import peak_rss_bytes

PATIENCE = 600.0


@dataclass
class Server:
    """A process that answers.

    Attributes:
        listening: seconds from its command until it named its model.
        first_token: seconds until it had answered a request for one token.
    """

    process: subprocess.Popen[bytes]
    url: str
    listening: float = 0.0
    first_token: float = 0.0

    def peak_rss_gb(self) -> float:
        """Of it and its children alive."""
        return peak_rss_bytes(self.process.pid) / 1e9


@contextmanager
def running(command: str, port: int, log: Path) -> Iterator[Server]:
    """The server, ready; ended with the block. The command is split as a shell would; none runs."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            shlex.split(command), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(process, f"http://127.0.0.1:{port}")
    try:
        _await_token(server, started)
        yield server
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await_token(server: Server, started: float) -> None:
    body: dict[str, Any] = {"prompt": [5, 6, 7, 8], "max_tokens": 1, "temperature": 0}
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        while time.perf_counter() - started < PATIENCE:
            if server.process.poll() is not None:
                code = server.process.returncode
                raise SystemExit(f"the server ended with {code}; see its log")
            try:
                if "model" not in body:
                    body["model"] = client.get("/v1/models").json()["data"][0]["id"]
                    server.listening = time.perf_counter() - started
                if client.post("/v1/completions", json=body).status_code == 200:
                    server.first_token = time.perf_counter() - started
                    return
            except (httpx.HTTPError, ValueError, KeyError):
                pass
            time.sleep(0.02)
    raise SystemExit(f"no token after {PATIENCE:.0f} s; see the log")

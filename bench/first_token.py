"""From the command that starts a server to its first token, and the memory it took.

    python bench/first_token.py --port 8100 \
        --server 'fxlm=fxlm serve MODEL --port 8100' --server 'llama.cpp=llama-server -m F ...'

Each command is run ``--blocks`` times, the servers in turn; a warm-up run before them fills page
cache and compile caches, unless ``--cold`` is given. A request for one token is tried every 20 ms
until it is answered. Commands are split as a shell would split them; no shell runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx

from common import print_table, write_results

sys.path.insert(0, str(Path(__file__).resolve().parent / "drivers"))
from protocol import peak_rss_bytes

PATIENCE = 600.0


def main() -> None:
    """Parse the command line, start the servers in turn, print, write."""
    options = _parse()
    servers = dict(text.split("=", 1) for text in options.server)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for block in range(0 if options.cold else -1, options.blocks):
        for name, command in servers.items():
            run = _start(shlex.split(command), options.port, options.logs / f"{name}.log")
            print(f"{name}: {run}", flush=True)
            if block >= 0:
                runs[name].append(run)
    rows = [
        {"server": n, **{k: statistics.median(r[k] for r in made) for k in made[0]}}
        for n, made in runs.items()
    ]
    print_table(rows, title=f"medians of {options.blocks} starts")
    document = {"rows": rows, "runs": runs}
    print(write_results(f"first_token_{options.name}", document, options={"cold": options.cold}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", action="append", required=True, help="NAME=COMMAND")
    parser.add_argument("--port", type=int, default=8100, help="on which every command listens")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="no warm-up run")
    parser.add_argument("--name", default="servers", help="of the result file")
    parser.add_argument("--logs", type=Path, default=Path("build/compare"))
    return parser.parse_args()


def _start(command: list[str], port: int, log: Path) -> dict[str, float]:
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        listening, first = _first_token(process, f"http://127.0.0.1:{port}", started)
        memory = peak_rss_bytes(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"listening_s": listening, "first_token_s": first, "peak_rss_gb": memory / 1e9}


def _first_token(process: subprocess.Popen[Any], url: str, started: float) -> tuple[float, float]:
    listening = 0.0
    body: dict[str, Any] = {"prompt": [5, 6, 7, 8], "max_tokens": 1, "temperature": 0}
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        while time.perf_counter() - started < PATIENCE:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}; see its log")
            try:
                if "model" not in body:
                    body["model"] = client.get("/v1/models").json()["data"][0]["id"]
                    listening = time.perf_counter() - started
                if client.post("/v1/completions", json=body).status_code == 200:
                    return listening, time.perf_counter() - started
            except (httpx.HTTPError, ValueError, KeyError):
                pass
            time.sleep(0.02)
    raise SystemExit(f"no token after {PATIENCE:.0f} s; see the log")


if __name__ == "__main__":
    main()

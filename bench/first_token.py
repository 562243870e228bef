"""From the command that starts a server to its first token, and the memory it took.

    python bench/first_token.py --port 8100 \
        --server 'fxlm=fxlm serve MODEL --port 8100' --server 'llama.cpp=llama-server -m F ...'

Each command is run ``--blocks`` times, the servers in turn; a warm-up run before them fills page
cache and compile caches, unless ``--cold`` is given. A request for one token is tried every 20 ms
until it is answered. Commands are split as a shell would split them; no shell runs.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from common import print_table, write_results
from servers import running


def main() -> None:
    """Parse the command line, start the servers in turn, print, write."""
    options = _parse()
    servers = dict(text.split("=", 1) for text in options.server)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for block in range(0 if options.cold else -1, options.blocks):
        for name, command in servers.items():
            run = _start(command, options.port, options.logs / f"{name}.log")
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


def _start(command: str, port: int, log: Path) -> dict[str, float]:
    with running(command, port, log) as server:
        return {
            "listening_s": server.listening, "first_token_s": server.first_token,
            "peak_rss_gb": server.peak_rss_gb(),
        }  # fmt: skip


if __name__ == "__main__":
    main()

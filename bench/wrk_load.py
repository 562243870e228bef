"""Load from wrk, a client in C that takes next to nothing of the cores it shares with the server.

Debian's package ``wrk``. Not here: what is asked (`online`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SCRIPT = """
local bodies, at = {}, 0
for line in io.lines(%s) do table.insert(bodies, line) end
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
function request()
  at = at %% #bodies + 1
  return wrk.format(nil, nil, nil, bodies[at])
end
function done(summary, latency)
  local e = summary.errors
  print(string.format('{"requests": %%d, "failed": %%d, "seconds": %%f, "p50": %%f, "p99": %%f}',
    summary.requests, e.connect + e.read + e.write + e.timeout + e.status,
    summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
"""


def load(url: str, bodies: list[dict[str, Any]], connections: int, seconds: int) -> dict[str, Any]:
    """Keep `connections` requests under way for so long; the bodies are asked round and round.

    Returns:
        ``requests``, ``failed``, ``seconds``, ``requests_per_s`` of those that did not fail, and
        seconds of a whole request: ``p50``, ``p99``.
    """
    with tempfile.TemporaryDirectory() as name:
        asked, script = Path(name) / "bodies", Path(name) / "load.lua"
        asked.write_text("".join(json.dumps(body) + "\n" for body in bodies))
        script.write_text(SCRIPT % json.dumps(str(asked)))
        command = [
            "wrk", "--threads", "1", "--connections", str(connections), "--duration",
            f"{seconds}s", "--timeout", "60s", "--script", str(script), url,
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"wrk ended with {done.returncode}: {done.stdout}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row["requests_per_s"] = (row["requests"] - row["failed"]) / row["seconds"]
    return row

"""Process start to first token, by phase: cold, from an artifact, and through the server.

    python bench/startup.py [MODEL] [--runs 5] [--skip-cold]

Each run is a process of its own. ``cold`` starts from empty caches (ours, Inductor's and the
precompiled headers'); the others find the artifact. Seconds are wall time; medians of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from common import print_table, write_results

# Run in the child: prints the seconds of each phase as JSON.
CHILD = """
import json, sys, time
model, cache, begun = sys.argv[1], sys.argv[2], float(sys.argv[3])
phases = {}
def mark(name, since):
    now = time.time(); phases[name] = now - since; return now
t = mark("interpreter", begun)
import torch
t = mark("import torch", t)
from fxlm.runtime.options import EngineOptions
from fxlm.runtime import worker
from fxlm.runtime.request import Request
from fxlm.runtime.sampling_params import SamplingParams
t = mark("import fxlm", t)
stages = {}
options = EngineOptions(model=model, cache_dir=cache, max_model_len=1024, max_num_seqs=8)
engine, plan, made = worker.build_engine(options, stages.__setitem__)
now = time.time()
for name, seconds in stages.items():
    phases[name] = seconds
phases["open artifact, plan, rest"] = now - t - sum(stages.values())
t = now
params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
engine.add_request(Request(request_id="0", prompt_token_ids=[5, 6, 7, 8], params=params))
while engine.has_unfinished():
    engine.step()
mark("first token", t)
phases["total"] = time.time() - begun
print(json.dumps({"cached": made.cached, "phases": phases}))
"""


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--skip-cold", action="store_true")
    parser.add_argument("--name", default="startup", help="of the result file")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fxlm-startup-"))
    try:
        results = measure(options.model, work, options.runs, options.skip_cold)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for name, phases in results.items():
        rows: list[dict[str, object]] = [{"phase": p, "seconds": s} for p, s in phases.items()]
        print_table(rows, title=f"{options.model}: {name}")
    chosen = {"model": Path(options.model).name, "runs": options.runs}
    print(write_results(options.name, results, options=chosen, output=options.output))


def measure(model: str, work: Path, runs: int, skip_cold: bool) -> dict[str, dict[str, float]]:
    """Seconds by phase for each way of starting."""
    cache = work / "cache"
    results = {}
    if not skip_cold:
        results["cold, one process"] = _child(model, cache, _empty_caches(work))
    else:
        _child(model, cache, dict(os.environ))
    warm = [_child(model, cache, dict(os.environ)) for _ in range(runs)]
    results["artifact, one process"] = _median(warm)
    results["artifact, server"] = _median([_server(model, cache) for _ in range(runs)])
    return results


def _empty_caches(work: Path) -> dict[str, str]:
    """An environment in which nothing is compiled yet, apart from fxlm's own C++ ops."""
    empty = work / "empty"
    empty.mkdir()
    # Inductor keeps its precompiled headers under the temporary directory.
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(empty / "inductor"), "TMPDIR": str(empty)}


def _child(model: str, cache: Path, environment: Mapping[str, str]) -> dict[str, float]:
    begun = time.time()
    run = subprocess.run(
        [sys.executable, "-c", CHILD, model, str(cache), str(begun)],
        capture_output=True, text=True, check=True, env=dict(environment),
    )  # fmt: skip
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])["phases"]
    return found


def _server(model: str, cache: Path) -> dict[str, float]:
    begun = time.time()
    command = [
        sys.executable, "-m", "fxlm", "serve", model, "--port", "0", "--cache-dir", str(cache),
        "--max-model-len", "1024", "--max-num-seqs", "8",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            found = re.search(r"on (http://\S+)", line)
            if found:
                url = found[1]
                break
        ready = time.time()
        assert url, f"the server ended with status {process.wait()}"
        body = json.dumps({"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 1})
        request = urllib.request.Request(
            f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            reply.read()
        done = time.time()
        process.terminate()
        process.wait(timeout=60)
    return {"ready": ready - begun, "first token": done - ready, "total": done - begun}


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}


if __name__ == "__main__":
    main()

"""Process start to first token, by phase: compiled from nothing, from an artifact, by tiers.

    python bench/startup.py [MODEL] [--second MODEL] [--runs 5] [--cases compile artifact ...]

Each run is a process of its own; seconds are wall time, medians of the runs. The cases:

    setup     what `make install` compiles once a machine: the ops, and the headers and code that
              all compiled models share
    compile   from empty caches (ours and Inductor's), after `setup`, to a compiled artifact; then
              that of the second model, if one is named, with what the first left in the caches
    artifact  to the first token, in one process; weights are prepared and in the page cache
    server    to the first token over HTTP
    depth     from empty caches, after `setup`: 2 layers, 16 of the same shape
    tiered    through the server from empty caches: to the first token, and to the compiled step
    memory    peak resident memory of the artifact case, when weights are prepared (off: in memory,
              first: into their file) and when they are mapped, in MB, against the bound
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
options = EngineOptions(model=model, cache_dir=cache, max_model_len=1024, max_num_seqs=8,
                        prepared_weights=sys.argv[4])
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
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
weights = plan.weights_bytes / 2**20
memory = {"peak": peak, "weights": weights, "bound": 1.1 * weights + 700}
print(json.dumps({"phases": phases, "memory": memory}))
"""

# As above, but up to the artifact alone.
COMPILE = """
import json, sys, time
model, cache, begun = sys.argv[1], sys.argv[2], float(sys.argv[3])
phases = {"interpreter": time.time() - begun}
t = time.time()
import torch
phases["import torch"] = time.time() - t
t = time.time()
from fxlm.runtime.compile import compile_for
from fxlm.runtime.options import EngineOptions
phases["import fxlm"] = time.time() - t
made = compile_for(EngineOptions(model=model, cache_dir=cache), report=phases.__setitem__)
total = time.time() - begun
phases["rest"] = total - sum(phases.values())
assert not made.cached
print(json.dumps({"phases": {**phases, "total": total}}))
"""


CASES = ("setup", "compile", "depth", "artifact", "server", "tiered", "memory")
Phases = dict[str, float]


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--second", help="a model to compile after the first")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--cache-dir", type=Path, help="with the artifact; made anew by default")
    parser.add_argument("--name", default="startup", help="of the result file")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fxlm-startup-"))
    try:
        runs = measure(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    results = {name: _median(found) for name, found in runs.items()}
    for name, phases in results.items():
        rows: list[dict[str, object]] = [{"phase": p, "value": s} for p, s in phases.items()]
        print_table(rows, title=f"{Path(options.model).name}: {name}")
    second = Path(options.second).name if options.second else None
    chosen = {"model": Path(options.model).name, "second": second, "runs": options.runs}
    document = {**results, "single runs": runs}
    print(write_results(options.name, document, options=chosen, output=options.output))


def measure(options: argparse.Namespace, work: Path) -> dict[str, list[Phases]]:
    """Seconds by phase of each run, for each way of starting."""
    results: dict[str, list[Phases]] = {}
    if "setup" in options.cases:
        results["setup"] = [_setup(work / f"setup{run}") for run in range(options.runs)]
    if "compile" in options.cases:
        runs = [compile_twice(options, work / f"empty{run}") for run in range(options.runs)]
        for case in runs[0]:
            results[case] = [run[case] for run in runs]
    if "depth" in options.cases:
        results["depth"] = [
            _depth(options.model, work / f"depth{run}") for run in range(options.runs)
        ]
    cache = options.cache_dir or work / "cache"
    model, runs_of = options.model, range(options.runs)
    if set(options.cases) & {"artifact", "server", "memory"}:
        _child(CHILD, model, cache, dict(os.environ), "auto")
    if "artifact" in options.cases:
        results["artifact, one process"] = [
            _child(CHILD, model, cache, dict(os.environ), "auto")["phases"] for _ in runs_of
        ]
    if "server" in options.cases:
        results["artifact, server"] = [_server(model, cache) for _ in runs_of]
    if "tiered" in options.cases:
        results["tiered, server"] = [_tiered(model, work / "tiered")]
    if "memory" in options.cases:
        results |= {name: [found] for name, found in _memory(model, cache).items()}
    return results


def compile_twice(options: argparse.Namespace, empty: Path) -> dict[str, Phases]:
    """Compile the first model from empty caches, then the second."""
    environment, cache = _empty_caches(empty), empty / "cache"
    found = {"compile from nothing": _child(COMPILE, options.model, cache, environment)["phases"]}
    if options.second:
        second = _child(COMPILE, options.second, cache, environment)["phases"]
        found["compile a second model"] = second
    shutil.rmtree(empty)
    return found


def _depth(model: str, empty: Path) -> Phases:
    """Seconds to compile the first 2 and 16 layers of a model, and how much more the latter take.

    Every region is compiled in both; the headers and the runtime that regions share are there.
    """
    from fxlm.models.checkpoint import open_checkpoint
    from fxlm.models.shorten import shorten

    environment, cache = _empty_caches(empty), empty / "cache"
    totals: Phases = {}
    for layers in (16, 2, 16):  # the first leaves what regions share
        short = empty / f"layers{len(list(empty.iterdir()))}"
        short.mkdir()
        shorten(open_checkpoint(Path(model)), layers, short)
        totals[f"{layers} layers"] = _child(COMPILE, str(short), cache, environment)["phases"][
            "total"
        ]
        _forget_packages(cache)
    shutil.rmtree(empty)
    return {**totals, "ratio": totals["16 layers"] / totals["2 layers"]}


def _forget_packages(cache: Path) -> None:
    for made in [*(cache / "regions").glob("*.pt2"), *(cache / "regions").glob("*.sha256")]:
        made.unlink()
    shutil.rmtree(cache / "artifacts", ignore_errors=True)


def _memory(model: str, cache: Path) -> dict[str, Phases]:
    """Peaks: prepared in memory, prepared into the file, mapped from it."""
    found = {}
    for name, choice in (("in memory", "off"), ("mapped", "auto"), ("into the file", "auto")):
        if name == "into the file":
            shutil.rmtree(cache / "weights", ignore_errors=True)
        run = _child(CHILD, model, cache, dict(os.environ), choice)
        found[f"memory, {name}"] = run["memory"]
    return found


def _setup(empty: Path) -> Phases:
    """Seconds of what a machine compiles once."""
    environment = {**_empty_caches(empty), "XDG_CACHE_HOME": str(empty / "xdg")}
    found = {}
    for name, module in (("ops", "fxlm.compiler.ops.build"), ("headers", "fxlm.compiler.lower")):
        begun = time.time()
        command = [sys.executable, "-m", module]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        found[name] = time.time() - begun
    shutil.rmtree(empty)
    return found


def _empty_caches(empty: Path) -> dict[str, str]:
    """An environment in which nothing is compiled yet, apart from what `setup` makes."""
    empty.mkdir()
    # Inductor keeps its own precompiled headers under the temporary directory.
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(empty / "inductor"), "TMPDIR": str(empty)}


def _child(
    code: str, model: str, cache: Path, environment: Mapping[str, str], *extra: str
) -> dict[str, Phases]:
    begun = time.time()
    run = subprocess.run(
        [sys.executable, "-c", code, model, str(cache), str(begun), *extra],
        capture_output=True, text=True, check=True, env=dict(environment),
    )  # fmt: skip
    found: dict[str, Phases] = json.loads(run.stdout.splitlines()[-1])
    return found


def _command(model: str, cache: Path) -> list[str]:
    return [
        sys.executable, "-m", "fxlm", "serve", model, "--port", "0", "--cache-dir", str(cache),
        "--max-model-len", "1024", "--max-num-seqs", "8",
    ]  # fmt: skip


def _server(model: str, cache: Path) -> Phases:
    """Seconds to being ready, and of the first token."""
    with _serving(_command(model, cache), dict(os.environ)) as (url, begun):
        ready = time.time()
        _first_token(url, model)
        done = time.time()
    return {"ready": ready - begun, "first token": done - ready, "total": done - begun}


def _tiered(model: str, empty: Path) -> Phases:
    """Seconds until the graph serves, and until the compiled step does."""
    with _serving(_command(model, empty / "cache"), _empty_caches(empty)) as (url, begun):
        ready = time.time()
        _first_token(url, model)
        first = time.time()
        while 'tier="compiled"} 1.0' not in _get(f"{url}/metrics"):
            time.sleep(0.05)
        compiled = time.time()
    return {"ready": ready - begun, "first token": first - begun, "compiled": compiled - begun}


@contextmanager
def _serving(command: list[str], environment: dict[str, str]) -> Iterator[tuple[str, float]]:
    """A server: its URL, and when its process was started."""
    begun = time.time()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        lines = (re.search(r"on (http://\S+)", line) for line in process.stdout)
        url = next((found[1] for found in lines if found), "")
        assert url, f"the server ended with status {process.wait()}"
        yield url, begun
        process.terminate()
        process.wait(timeout=60)


def _first_token(url: str, model: str) -> None:
    body = json.dumps({"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 1})
    request = urllib.request.Request(
        f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as reply:
        text: str = reply.read().decode()
    return text


def _median(runs: list[Phases]) -> Phases:
    return {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}


if __name__ == "__main__":
    main()

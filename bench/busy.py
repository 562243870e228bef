"""Decode steps while other programs want the cores, by how long threads spin for one another.

    python bench/busy.py [MODEL ...] [--busy 0 3] [--batch 1 32] [--spin fxlm 100 300000]

By itself, fxlm has threads spin long on cores of their own and briefly on shared ones; a number is
``GOMP_SPINCOUNT``, 100 being about 5 us, and 300,000 OpenMP's own choice. Each round starts a
process with each, in turn; programs that compute without end run beside it, ``--busy`` of them.
Milliseconds of a step: the median and the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common import print_table, write_results
from engines import begin_decoding

SPINS = ("fxlm", "100", "300000")


def main() -> None:
    """Run the children in turn, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["bundled"])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--spin", nargs="+", default=SPINS, help="turns, or fxlm")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=6.0, help="at most, of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="busy", help="of the result file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_steps(options.child, options)))
        return
    found: dict[tuple[str, int, int, str], list[float]] = {}
    for _ in range(options.rounds):
        for model in options.models:
            for spin in options.spin:
                command = [sys.executable, *sys.argv, "--child", model]
                chosen = {} if spin == "fxlm" else {"GOMP_SPINCOUNT": spin}
                made = subprocess.run(
                    command, env={**os.environ, **chosen}, stdout=subprocess.PIPE, check=True
                )
                for busy, batch, seconds in json.loads(made.stdout.splitlines()[-1]):
                    found.setdefault((model, busy, batch, spin), []).extend(seconds)
    rows = [
        {"model": os.path.basename(m), "busy": busy, "batch": batch, "spin": spin,
         "median_ms": statistics.median(s) * 1e3, "mean_ms": statistics.fmean(s) * 1e3}
        for (m, busy, batch, spin), s in sorted(found.items())
    ]  # fmt: skip
    print_table(rows, title="A decode step beside busy programs")
    chosen = {k: v for k, v in vars(options).items() if k not in ("child", "models", "name")}
    print(write_results(options.name, {"rows": rows}, options=chosen))


def _steps(model: str, options: argparse.Namespace) -> list[tuple[int, int, list[float]]]:
    """By programs beside and batch: seconds of each step."""
    from fxlm.runtime.options import EngineOptions
    from fxlm.runtime.worker import build_engine

    engine, _, _ = build_engine(
        EngineOptions(model=model, max_num_seqs=max(options.batch), max_model_len=512, seed=0)
    )
    found = []
    for busy in options.busy:
        for batch in options.batch:
            begin_decoding(engine, batch, 32, options.steps)
            seconds: list[float] = []
            with _busy(busy):
                until = time.perf_counter() + options.seconds
                while engine.has_unfinished() and time.perf_counter() < until:
                    started = time.perf_counter()
                    engine.step()
                    seconds.append(time.perf_counter() - started)
            while engine.has_unfinished():
                engine.step()
            found.append((busy, batch, seconds))
    return found


@contextmanager
def _busy(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    main()

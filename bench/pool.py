"""Decode steps with tensors from fxlm's pool and from torch's own allocator, in turn.

    python bench/pool.py [MODEL ...] [--batch 1 4 32] [--rounds 5]

Each round starts a process with each. Milliseconds of a step: the median of each, and the median
over the rounds of their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from common import print_table, write_results
from engines import begin_decoding

KINDS = ("torch", "pool")


def main() -> None:
    """Run the children in turn, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["bundled", "bundled-draft"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, kind = options.child
        print(json.dumps(_child(model, kind, options)))
        return
    rows = []
    for model in options.models:
        found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind in KINDS:
                command = [sys.executable, *sys.argv, "--child", model, kind]
                made = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                found[kind].append(json.loads(made.stdout.splitlines()[-1]))
        for place, batch in enumerate(options.batch):
            torchs, pools = ([round_[place] for round_ in found[kind]] for kind in KINDS)
            rows.append({
                "model": Path(model).name, "batch": batch,
                "torch_ms": statistics.median(torchs), "pool_ms": statistics.median(pools),
                "ratio": statistics.median(t / p for t, p in zip(torchs, pools, strict=True)),
            })  # fmt: skip
    print_table(rows, title="A decode step by where its tensors come from")
    chosen = {k: v for k, v in vars(options).items() if k not in ("child", "models")}
    print(write_results("pool", {"rows": rows}, options=chosen))


def _child(model: str, kind: str, options: argparse.Namespace) -> list[float]:
    """Milliseconds of a step of each batch."""
    from fxlm.compiler import ops
    from fxlm.compiler.ops import build
    from fxlm.runtime.options import EngineOptions
    from fxlm.runtime.worker import build_engine

    if kind == "torch":
        with mock.patch.object(build, "_pool_tensors"):
            ops.load()
    engine, _, _ = build_engine(
        EngineOptions(model=model, max_num_seqs=max(options.batch), max_model_len=512, seed=0)
    )
    found = []
    for batch in options.batch:
        begin_decoding(engine, batch, 32, options.steps)
        seconds: list[float] = []
        while engine.has_unfinished():
            started = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started)
        found.append(statistics.median(seconds) * 1e3)
    return found


if __name__ == "__main__":
    main()

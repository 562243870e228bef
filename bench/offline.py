"""Prefill and decode speed of one model in process, against the machine's measured limits.

    python bench/offline.py [MODEL] [--batch 1 8 32] [--prompt 512] [--tokens 32]

Prefill: tokens/s of one prompt, and the share of the measured matmul rate. Decode: tokens/s of
a batch of sequences, the bytes one step must read (weights once, the cache of each sequence)
and their share of the measured read bandwidth. Medians over the steps; probes before and
after, so that a bad spell of the machine shows. ``--threads 1 --clock cpu`` counts CPU time, for
machines that others load.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch

from common import Clock, matmul_rate_tflops, print_table, read_bandwidth_gbs, write_results
from engines import begin_decoding, finish, submit
from fxlm.compiler.artifact import TensorSpec, dtype_of
from fxlm.runtime.engine import Engine
from fxlm.runtime.options import EngineOptions
from fxlm.runtime.worker import build_engine

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Parse the command line, measure, print, write."""
    options = _parse()
    clock = CLOCKS[options.clock]
    engine, plan, compilation = build_engine(_engine_options(options))
    weights = compilation.artifact.weights()
    vocabulary = int(compilation.artifact.manifest["model"]["vocab_size"])
    matmul = sum(_multiplied(s, vocabulary) for s in weights.values())
    read_bytes = plan.weights_bytes - _looked_up(list(weights.values()), vocabulary)
    before = read_bandwidth_gbs(clock=clock)
    rate = matmul_rate_tflops(
        getattr(torch, compilation.artifact.manifest["model"]["dtype"]), clock=clock
    )
    rows = [_prefill(engine, options.prompt, options.repeats, 2 * matmul, rate, clock)]
    for batch in options.batch:
        row = _decode(engine, batch, options.prompt_decode, options.tokens, clock)
        context = options.prompt_decode + options.tokens // 2
        moved = read_bytes + batch * context * plan.kv_bytes_per_token
        row["read_gb"] = moved / 1e9
        row["share_of_bandwidth"] = moved / 1e9 / row["step_s"] / before
        rows.append(row)
    after = read_bandwidth_gbs(clock=clock)
    print_table([r for r in rows if r["what"] == "prefill"], title=f"{options.model}: prefill")
    print_table([r for r in rows if r["what"] == "decode"], title=f"{options.model}: decode")
    print(
        f"\nread bandwidth {before:.1f} GB/s before, {after:.1f} after; matmul {rate:.2f} TFLOP/s"
    )
    results = {
        "rows": rows, "read_bandwidth_gbs": [before, after], "matmul_tflops": rate,
        "weights_bytes": plan.weights_bytes, "kv_bytes_per_token": plan.kv_bytes_per_token,
    }  # fmt: skip
    chosen = {k: str(v) for k, v in vars(options).items() if k != "output"}
    chosen["model"] = Path(options.model).name
    path = write_results(options.name, results, options=chosen, output=options.output)
    print(path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", help="round the weights while loading: int8, int4, ...")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--prompt-decode", type=int, default=256, help="tokens before decoding")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded per sequence")
    parser.add_argument("--repeats", type=int, default=5, help="prefills")
    parser.add_argument("--threads", type=int, help="of the engine (all cores)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--disable-pass", action="append", default=[], help="leave out a pass")
    parser.add_argument("--name", default="offline", help="of the result file")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _engine_options(options: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        model=options.model, dtype=options.dtype, device=options.device,
        quantization=options.quantization,
        enforce_eager=options.enforce_eager, threads=options.threads,
        disable_passes=tuple(options.disable_pass),
        enable_prefix_caching=False, max_num_seqs=max(options.batch), seed=0,
        max_num_batched_tokens=max(512, max(options.batch)),
        max_model_len=max(options.prompt, options.prompt_decode + options.tokens) + 16,
    )  # fmt: skip


def _outputs(weight: TensorSpec) -> int:
    packed = len(weight.shape) == 4  # [panels, steps, 64 outputs, inputs of a step]
    return weight.shape[0] * 64 if packed else weight.shape[0]


def _multiplied(weight: TensorSpec, vocabulary: int) -> int:
    """Products a token that a weight takes part in; the head and the embedding serve few rows."""
    if len(weight.shape) not in (2, 4) or _outputs(weight) >= vocabulary:
        return 0
    return math.prod(weight.shape) * (2 if weight.dtype == "uint8" else 1)  # two codes a byte


def _looked_up(weights: list[TensorSpec], vocabulary: int) -> int:
    """Bytes of an embedding beside a head of its own: a step reads a few rows of it."""
    large = [w for w in weights if len(w.shape) in (2, 4) and _outputs(w) >= vocabulary]
    plain = [w for w in large if len(w.shape) == 2]
    if len(large) < 2 or len(plain) == len(large):
        return 0
    return sum(math.prod(w.shape) * dtype_of(w.dtype).itemsize for w in plain)


def _prefill(
    engine: Engine, length: int, repeats: int, flops: int, rate: float, now: Clock
) -> dict[str, object]:
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        submit(engine, 1, length, 1)
        started = now()
        finish(engine)
        seconds.append(now() - started)
    median = statistics.median(seconds[1:])
    return {
        "what": "prefill", "batch": 1, "tokens": length, "tokens_per_s": length / median,
        "step_s": median, "share_of_matmul": flops * length / median / 1e12 / rate,
    }  # fmt: skip


def _decode(engine: Engine, batch: int, prompt: int, tokens: int, now: Clock) -> dict[str, object]:
    begin_decoding(engine, batch, prompt, tokens + 1)
    seconds = []
    while engine.has_unfinished():
        started = now()
        count = sum(len(o.token_ids) for o in engine.step())
        if count == batch:
            seconds.append(now() - started)
    median = statistics.median(seconds)
    return {
        "what": "decode", "batch": batch, "context": prompt, "tokens_per_s": batch / median,
        "step_s": median, "steps": len(seconds),
    }  # fmt: skip


if __name__ == "__main__":
    main()

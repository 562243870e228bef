"""The CPU ops by themselves: attention, linear layers, the sampler. ``python bench/ops.py``

Decode reads the whole cache of a sequence once and is stated in GB/s beside the measured read
bandwidth. Blocks are handed out at random, the worst case of a pool that has run for long: a random
4 KiB page is slower to reach than the next one, so that the bound is well below the bandwidth of a
stream. Prefill is stated in GFLOP/s of what the causal mask leaves.

Linear layers have the shapes of Llama-3.2-1B. ``aten.linear`` and the packed op take turns, call by
call, over enough copies of the weight that none is found in a cache. ``--clock cpu`` with
``--threads 1`` counts the process's own CPU time: on a machine that others load, a ratio by the
clock on the wall says little.

Writes ``bench/results/ops.json``. Whole models are measured in ``offline.py``.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from common import (
    best_seconds,
    matmul_rate_tflops,
    print_table,
    read_bandwidth_gbs,
    write_results,
)
from fxlm.compiler import ops

BLOCK = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# sequences, context, queries, heads, kv heads, head dim
DECODE = (
    (1, 8192, 1, 32, 8, 128),
    (4, 8192, 1, 32, 8, 128),
    (1, 32768, 1, 8, 1, 128),
    (16, 2048, 1, 14, 2, 64),
)
PREFILL = ((1, 0, 1024, 32, 8, 128), (1, 8192, 256, 32, 8, 128))
# outputs, inputs: qkv, o, gate and up, down, head
LINEARS = ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048))
LINEAR_ROWS = (1, 2, 5, 8, 16, 32, 512)
# experts, outputs, inputs, experts a token: gate and up of OLMoE-1B-7B
EXPERTS = (64, 2048, 2048, 8)
EXPERT_TOKENS = (1, 8, 64)
COLD_BYTES = 256 << 20  # of weights that are read in turn
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# name -> temperature, top_p, top_k, num_logprobs
SAMPLERS = {
    "greedy": (0.0, 1.0, 0, -1),
    "temperature 1": (1.0, 1.0, 0, -1),
    "top_p 0.9": (1.0, 0.9, 0, -1),
    "top_k 50": (1.0, 1.0, 50, -1),
    "greedy, 5 logprobs": (0.0, 1.0, 0, 5),
}


def attention(case: tuple[int, ...], dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """Time of one call, the bytes of the cache it reads and the operations it does."""
    sequences, context, queries, heads, kv_heads, width = case
    length = context + queries
    columns = -(-length // BLOCK)
    blocks = sequences * columns + 1
    k_cache = torch.randn(blocks, kv_heads, BLOCK, width).to(dtype)
    v_cache = torch.randn(blocks, kv_heads, BLOCK, width).to(dtype)
    table = (torch.randperm(blocks - 1) + 1).view(sequences, columns)
    tokens = sequences * queries
    q = torch.randn(1, heads, tokens, width).to(dtype)
    new = torch.randn(1, kv_heads, tokens, width).to(dtype)
    places = torch.arange(context, length)
    slots = (table[:, places // BLOCK] * BLOCK + places % BLOCK).flatten()
    starts = torch.arange(sequences + 1, dtype=torch.int32) * queries
    lengths = torch.full((sequences,), length, dtype=torch.int32)
    cache = (k_cache, v_cache, slots, starts, lengths, table.int())
    rules = (width**-0.5, 0, 0, 0.0, None, None)
    op = torch.ops.fxlm.paged_attention
    seconds = best_seconds(lambda: op(q, new, new, *cache, *rules), repeats=repeats)
    read_bytes = 2 * sequences * length * kv_heads * width * dtype.itemsize
    seen = sum(context + i + 1 for i in range(queries))
    return {
        **dict(zip(("sequences", "context", "queries", "heads"), case, strict=False)),
        "kv_heads": kv_heads,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "us": seconds * 1e6,
        "gb_s": read_bytes / seconds / 1e9,
        "gflop_s": 4 * sequences * heads * width * seen / seconds / 1e9,
    }


def linear(
    shape: tuple[int, int], dtype: torch.dtype, clock: str, repeats: int
) -> list[dict[str, object]]:
    """Times of ``aten.linear`` and of the packed op, for each number of rows."""
    outputs, inputs = shape
    copies = max(1, COLD_BYTES // (outputs * inputs * dtype.itemsize))
    plain = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
    packed = [torch.ops.fxlm.pack_weight(weight) for weight in plain]
    results, op = [], torch.ops.fxlm.packed_linear
    for rows in LINEAR_ROWS:
        x = torch.randn(rows, inputs).to(dtype)
        count = copies if rows < 100 else 1
        pairs = [
            (partial(torch.nn.functional.linear, x, weight), partial(op, x, panels, None, outputs))
            for weight, panels in zip(plain[:count], packed[:count], strict=True)
        ]
        sizes = {"outputs": outputs, "inputs": inputs, "rows": rows}
        times = _in_turns(pairs, clock, repeats)
        results.append(_linear_row(sizes, outputs * inputs, rows, dtype, times))
    return results


def experts(tokens: int, dtype: torch.dtype, clock: str, repeats: int) -> dict[str, object]:
    """Times of ``grouped_linear`` in plain PyTorch and of the packed op; experts at random."""
    count, outputs, inputs, chosen = EXPERTS
    weight = torch.randn(1, outputs, inputs).to(dtype).expand(count, -1, -1).contiguous()
    packed = torch.ops.fxlm.pack_weight(weight)
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randperm(count, generator=generator)[:chosen] for _ in range(tokens)])
    ends = torch.bincount(ids, minlength=count).cumsum(0).int()
    x = torch.randn(tokens * chosen, inputs).to(dtype)
    pair = (
        lambda: torch.ops.fxlm.grouped_linear(x, weight, ends),
        lambda: torch.ops.fxlm.packed_grouped_linear(x, packed, ends, outputs),
    )
    used = int(ids.unique().numel())
    sizes = {"experts": used, "outputs": outputs, "inputs": inputs, "rows": tokens * chosen}
    times = _in_turns([pair], clock, repeats)
    row = _linear_row(sizes, outputs * inputs * used, tokens * chosen / used, dtype, times)
    return row


Pair = tuple[Callable[[], object], Callable[[], object]]


def _in_turns(pairs: Sequence[Pair], clock: str, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each call of the first and of the second of every pair."""
    now = CLOCKS[clock]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for pair in pairs:
            for kept, call in zip(seconds, pair, strict=True):
                started = now()
                call()
                kept.append(now() - started)
    return seconds


def _linear_row(
    sizes: dict[str, int],
    weights: int,
    rows: float,
    dtype: torch.dtype,
    times: tuple[list[float], list[float]],
) -> dict[str, object]:
    """Best times and rates; ``rows`` is what each weight meets."""
    aten, packed = min(times[0]), min(times[1])
    return {
        **sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "aten_us": aten * 1e6,
        "us": packed * 1e6,
        "median_us": statistics.median(times[1]) * 1e6,
        "gb_s": weights * dtype.itemsize / packed / 1e9,
        "tflop_s": 2 * rows * weights / packed / 1e12,
        "speedup": aten / packed,
    }


def sampler(name: str, vocabulary: int, repeats: int) -> dict[str, object]:
    """Time of one row. Logits fall off as ranks of words do: p ~ rank ** -1.5."""
    temperature, top_p, top_k, logprobs = SAMPLERS[name]
    ranks = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0)) + 1.0
    args = (
        (-1.5 * ranks.log())[None].to(torch.bfloat16),
        torch.tensor([[temperature, top_p, 0.0, 1.0, 0.0, 0.0]]),
        torch.tensor([[top_k, 1, 1, logprobs, -1]]),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1),
        20,
    )
    seconds = best_seconds(lambda: torch.ops.fxlm.sample(*args), repeats=repeats * 5)
    return {"sampler": name, "vocabulary": vocabulary, "us": seconds * 1e6}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (all cores)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=20, help="the best of them counts")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="of linear layers and probes"
    )
    parser.add_argument("--name", default="ops", help="of the result file")
    parser.add_argument(
        "--only", choices=("attention", "linear", "experts", "sampler"), help="one of them"
    )
    parser.add_argument("--output", type=Path, default=None, help="instead of bench/results/")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    ops.load()
    dtypes = [DTYPES[name] for name in options.dtypes]
    tables: dict[str, list[dict[str, object]]] = {}
    if options.only in (None, "attention"):
        tables["Paged attention"] = [
            attention(case, dtype, options.repeats) for case in DECODE + PREFILL for dtype in dtypes
        ]
    if options.only in (None, "linear"):
        tables["Linear layers, packed against aten.linear"] = [
            row
            for dtype in dtypes
            for shape in LINEARS
            for row in linear(shape, dtype, options.clock, max(1, options.repeats // 4))
        ]
    if options.only in (None, "experts"):
        tables["Experts, packed against plain PyTorch"] = [
            experts(tokens, dtype, options.clock, max(3, options.repeats // 2))
            for dtype in dtypes
            for tokens in EXPERT_TOKENS
        ]
    if options.only in (None, "sampler"):
        tables["Sampler, one row"] = [
            sampler(name, size, options.repeats)
            for size in (32000, 128256, 262144)
            for name in SAMPLERS
        ]
    clock = CLOCKS[options.clock]
    settings = {
        "threads": torch.get_num_threads(),
        "kernels": ops.cpu_implementation(),
        "clock": options.clock,
        "read_bandwidth_gb_s": read_bandwidth_gbs(clock=clock),
        **{
            f"matmul_{name}_tflop_s": matmul_rate_tflops(DTYPES[name], clock=clock)
            for name in options.dtypes
        },
    }
    print_table([{"setting": key, "value": value} for key, value in settings.items()])
    for title, table in tables.items():
        print_table(table, title=title)
    rows = [row for table in tables.values() for row in table]
    path = write_results(options.name, rows, options=settings, output=options.output)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()

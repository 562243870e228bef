"""The CPU ops by themselves: attention in decode and prefill, the sampler. ``python bench/ops.py``

Decode reads the whole cache of a sequence once and is stated in GB/s beside the measured read
bandwidth. Blocks are handed out at random, the worst case of a pool that has run for long: a random
4 KiB page is slower to reach than the next one, so that the bound is well below the bandwidth of a
stream. Prefill is stated in GFLOP/s of what the causal mask leaves.

Writes ``bench/results/ops.json``. Whole models are measured in ``offline.py``.
"""

import argparse
from pathlib import Path

import torch

from common import best_seconds, print_table, read_bandwidth_gbs, write_results
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
    parser.add_argument("--output", type=Path, default=None, help="instead of bench/results/")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    ops.load()
    dtypes = [DTYPES[name] for name in options.dtypes]
    attended = [
        attention(case, dtype, options.repeats) for case in DECODE + PREFILL for dtype in dtypes
    ]
    sampled = [
        sampler(name, size, options.repeats)
        for size in (32000, 128256, 262144)
        for name in SAMPLERS
    ]
    settings = {
        "threads": torch.get_num_threads(),
        "kernels": ops.cpu_implementation(),
        "read_bandwidth_gb_s": read_bandwidth_gbs(),
    }
    print_table([{"setting": key, "value": value} for key, value in settings.items()])
    print_table(attended, title="Paged attention")
    print_table(sampled, title="Sampler, one row")
    path = write_results("ops", [*attended, *sampled], options=settings, output=options.output)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()

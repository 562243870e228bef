"""Paged attention by itself, over every type of the KV cache. ``python bench/attention.py``

Decode reads the cache of each sequence once and is stated in GB/s and as a share of the read
bandwidth, which is measured before and after each turn (the median turn counts, as neighbours take
bandwidth); enough layers take turns that nothing is found in a cache of the CPU.
Prefill is stated in TFLOP/s of what the causal mask leaves, beside the rate of a matrix product.
Rows have the head shapes of Llama-3.2-1B (32 heads over 8 of 64) and Qwen3-0.6B (16 over 8 of 128).
Blocks are handed out at random, as by a pool that has run for long.

``--pages`` adds the same decode over small and over huge pages, ``--blocks`` over sizes of a block.

Writes ``bench/results/attention.json``. The sampler and linear layers are measured in ``ops.py``.
"""

import argparse
import time
from pathlib import Path

import torch

from common import Clock, matmul_rate_tflops, print_table, write_results
from fxlm.compiler import ops
from fxlm.compiler.ops import kv_cache

DTYPE = torch.bfloat16
KINDS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
# name -> heads, KV heads, head size
SHAPES = {"llama-1b": (32, 8, 64), "qwen3-0.6b": (16, 8, 128)}
COLD_BYTES = 256 << 20  # of caches that are read in turn
PROBE_BYTES = 512 << 20  # of the array that states the bandwidth
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Case = tuple[str, str, int]  # shape, kind, block size


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype, huge: bool) -> torch.Tensor:
    """[blocks, heads, block size, D] of zeros, on pages of 2 MiB if `huge`."""
    *front, dim = shape
    size = (*front, dim + kv_cache.scale_columns(dtype))
    return kv_cache.allocate(size, dtype, torch.device("cpu"), huge_pages=huge)


class Layers:
    """Sequences of one length, cached in as many layers as it takes to be cold."""

    def __init__(self, case: Case, batch: int, context: int, queries: int, huge: bool) -> None:
        name, kind, block = case
        self.heads, self.kv_heads, self.dim = SHAPES[name]
        self.batch, self.context, self.queries = batch, context, queries
        length = context + queries
        columns = -(-length // block)
        blocks = batch * columns + 1
        shape = (blocks, self.kv_heads, block, self.dim)
        self.row_bytes = self.dim * KINDS[kind].itemsize + kv_cache.scale_columns(KINDS[kind])
        self.read_bytes = 2 * batch * length * self.kv_heads * self.row_bytes
        count = max(1, COLD_BYTES // self.read_bytes) if queries == 1 else 1
        self.table = (torch.randperm(blocks - 1) + 1).view(batch, columns).int()
        self.caches = [
            tuple(empty_cache(shape, KINDS[kind], huge) for _ in "kv") for _ in range(count)
        ]
        for caches in self.caches:
            self._fill(caches, block)
        tokens = batch * queries
        self.q = torch.randn(1, self.heads, tokens, self.dim).to(DTYPE)
        self.new = torch.randn(1, self.kv_heads, tokens, self.dim).to(DTYPE)
        places = torch.arange(context, length)
        self.slots = (self.table[:, places // block].long() * block + places % block).flatten()
        self.starts = torch.arange(batch + 1, dtype=torch.int32) * queries
        self.lengths = torch.full((batch,), length, dtype=torch.int32)

    def _fill(self, caches: tuple[torch.Tensor, ...], block: int) -> None:
        if self.context == 0:
            return
        values = torch.randn(self.kv_heads, block, self.dim)
        one = tuple(cache[1:2].clone() for cache in caches)
        for cache, part, keys in zip(caches, one, (True, False), strict=True):
            kv_cache.write(part, values.to(DTYPE), torch.arange(block), keys=keys, scale=None)
            cache.view(torch.uint8)[:] = part.view(torch.uint8)

    def run(self, layer: int) -> torch.Tensor:
        """One call of the op."""
        step = (self.slots, self.starts, self.lengths, self.table)
        rules = (self.dim**-0.5, 0, 0, 0.0, None, None)
        result: torch.Tensor = torch.ops.fxlm.paged_attention(
            self.q, self.new, self.new, *self.caches[layer], *step, *rules
        )
        return result

    def seconds(self, clock: Clock) -> float:
        """The mean time of a call over one turn of all layers."""
        start = clock()
        for layer in range(len(self.caches)):
            self.run(layer)
        return (clock() - start) / len(self.caches)


def decode(
    case: Case, batch: int, context: int, repeats: int, clock: Clock, *, huge: bool = True
) -> dict[str, object]:
    """One token for each of `batch` sequences; the bandwidth is measured between the turns."""
    layers = Layers(case, batch, context, 1, huge)
    layers.run(0)
    array = torch.ones(PROBE_BYTES // 8, dtype=torch.int64)
    bandwidths = [_read_gbs(array, clock)]
    turns = []
    for _ in range(repeats):
        seconds = layers.seconds(clock)
        bandwidths.append(_read_gbs(array, clock))
        rate = layers.read_bytes / seconds / 1e9
        turns.append((rate / (sum(bandwidths[-2:]) / 2), rate, seconds))
    share, rate, seconds = sorted(turns)[len(turns) // 2]
    return {
        **_described(case, batch, context, 1, huge),
        "us": seconds * 1e6,
        "gb_s": rate,
        "best_gb_s": max(turn[1] for turn in turns),
        "bandwidth_gb_s": rate / share,
        "share": share,
    }


def _read_gbs(array: torch.Tensor, clock: Clock) -> float:
    start = clock()
    torch.sum(array)
    return array.nbytes / (clock() - start) / 1e9


def prefill(
    case: Case, context: int, queries: int, repeats: int, clock: Clock
) -> dict[str, object]:
    """`queries` tokens behind `context` that are cached; the product's rate is taken between."""
    layers = Layers(case, 1, context, queries, True)
    layers.run(0)
    seen = sum(context + i + 1 for i in range(queries))
    operations = 4 * layers.heads * layers.dim * seen
    turns = []
    for _ in range(repeats):
        peak = matmul_rate_tflops(DTYPE, repeats=2, clock=clock)
        seconds = layers.seconds(clock)
        rate = operations / seconds / 1e12
        turns.append((rate / peak, rate, seconds))
    share, rate, seconds = sorted(turns)[len(turns) // 2]
    return {
        **_described(case, 1, context, queries, True),
        "us": seconds * 1e6,
        "tflop_s": rate,
        "matmul_tflop_s": rate / share,
        "share": share,
    }


def _described(case: Case, batch: int, context: int, queries: int, huge: bool) -> dict[str, object]:
    return {
        "shape": case[0],
        "cache": case[1],
        "block": case[2],
        "huge_pages": huge,
        "batch": batch,
        "context": context,
        "queries": queries,
    }


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """All rows that were asked for."""
    clock, turns = CLOCKS[options.clock], options.repeats
    cases = [(s, k, options.block_size) for s in options.shapes for k in options.caches]
    rows = []
    if options.only != "prefill":
        for batch in (4, 1):
            rows += [decode(case, batch, 8192, turns, clock) for case in cases]
        if options.pages:
            rows += [decode(case, 4, 8192, turns, clock, huge=False) for case in cases]
        if options.blocks:
            other = [(s, k, b) for s, k, _ in cases for b in (32, 64, 128)]
            rows += [decode(case, 4, 8192, turns, clock) for case in other]
    if options.only != "decode":
        for context, queries in ((0, 512), (0, 4096), (7680, 512)):
            rows += [prefill(case, context, queries, max(3, turns // 2), clock) for case in cases]
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (all cores)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--caches", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7, help="the median of them counts")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: with --threads 1, as in ops.py"
    )
    parser.add_argument("--only", choices=("decode", "prefill"), help="one of them")
    parser.add_argument("--pages", action="store_true", help="decode over small pages too")
    parser.add_argument("--blocks", action="store_true", help="decode over larger blocks too")
    parser.add_argument("--name", default="attention", help="of the result file")
    parser.add_argument("--output", type=Path, default=None, help="instead of bench/results/")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    ops.load()
    rows = measure(options)
    for title, key in (("Decode", "gb_s"), ("Prefill", "tflop_s")):
        print_table([row for row in rows if key in row], title=title)
    settings = {
        "threads": torch.get_num_threads(),
        "kernels": ops.cpu_implementation(),
        "clock": options.clock,
    }
    path = write_results(options.name, rows, options=settings, output=options.output)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()

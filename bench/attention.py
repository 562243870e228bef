"""Paged attention by itself, over every type of the KV cache. ``python bench/attention.py``

Decode reads the cache of each sequence once and is stated in GB/s beside the read bandwidth that is
measured before and after; enough layers take turns that nothing is found in a cache of the CPU.
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

from common import matmul_rate_tflops, print_table, read_bandwidth_gbs, write_results
from fxlm.compiler import ops
from fxlm.compiler.ops import kv_cache

DTYPE = torch.bfloat16
KINDS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
# name -> heads, KV heads, head size
SHAPES = {"llama-1b": (32, 8, 64), "qwen3-0.6b": (16, 8, 128)}
COLD_BYTES = 256 << 20  # of caches that are read in turn
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
        count = max(1, COLD_BYTES // self.read_bytes) if context else 1
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

    def seconds(self, repeats: int) -> float:
        """The median over turns of the mean time of a call."""
        times = []
        self.run(0)
        for _ in range(repeats):
            start = time.perf_counter()
            for layer in range(len(self.caches)):
                self.run(layer)
            times.append((time.perf_counter() - start) / len(self.caches))
        return sorted(times)[len(times) // 2]


def decode(case: Case, batch: int, context: int, repeats: int, huge: bool) -> dict[str, object]:
    """One token for each of `batch` sequences; the bandwidth is measured before and after."""
    layers = Layers(case, batch, context, 1, huge)
    before = read_bandwidth_gbs(repeats=3)
    seconds = layers.seconds(repeats)
    after = read_bandwidth_gbs(repeats=3)
    rate, bandwidth = layers.read_bytes / seconds / 1e9, max(before, after)
    return {
        **_described(case, batch, context, 1, huge),
        "us": seconds * 1e6,
        "gb_s": rate,
        "bandwidth_gb_s": bandwidth,
        "share": rate / bandwidth,
    }


def prefill(case: Case, context: int, queries: int, repeats: int) -> dict[str, object]:
    """`queries` tokens behind `context` that are cached; the product's rate is taken around it."""
    layers = Layers(case, 1, context, queries, True)
    before = matmul_rate_tflops(DTYPE, repeats=2)
    seconds = layers.seconds(repeats)
    peak = max(before, matmul_rate_tflops(DTYPE, repeats=2))
    seen = sum(context + i + 1 for i in range(queries))
    rate = 4 * layers.heads * layers.dim * seen / seconds / 1e12
    return {
        **_described(case, 1, context, queries, True),
        "us": seconds * 1e6,
        "tflop_s": rate,
        "matmul_tflop_s": peak,
        "share": rate / peak,
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
    cases = [(s, k, options.block_size) for s in options.shapes for k in options.caches]
    rows = []
    for batch, context in ((4, 8192), (1, 8192)):
        rows += [decode(case, batch, context, options.repeats, True) for case in cases]
    if options.pages:
        rows += [decode(case, 4, 8192, options.repeats, False) for case in cases]
    if options.blocks:
        other = [(s, k, b) for s, k, _ in cases for b in (32, 64, 128)]
        rows += [decode(case, 4, 8192, options.repeats, True) for case in other]
    for context, queries in ((0, 512), (0, 4096), (7680, 512)):
        rows += [prefill(case, context, queries, max(2, options.repeats // 3)) for case in cases]
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (all cores)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--caches", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7, help="the median of them counts")
    parser.add_argument("--pages", action="store_true", help="decode over small pages too")
    parser.add_argument("--blocks", action="store_true", help="decode over larger blocks too")
    parser.add_argument("--output", type=Path, default=None, help="instead of bench/results/")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    ops.load()
    rows = measure(options)
    for title, key in (("Decode", "gb_s"), ("Prefill", "tflop_s")):
        print_table([row for row in rows if key in row], title=title)
    settings = {"threads": torch.get_num_threads(), "kernels": ops.cpu_implementation()}
    path = write_results("attention", rows, options=settings, output=options.output)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()

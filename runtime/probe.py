"""What this machine can do at most: read bandwidth of memory, rate of matrix products.

`fxlm explain` and the benches hold their figures against these. Not here: what fxlm does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fxlm.runtime import machine

Clock = Callable[[], float]


def best_seconds(
    function: Callable[[], object],
    *,
    repeats: int = 7,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
) -> float:
    """Shortest time of one call, in seconds: what the machine can do when undisturbed.

    With ``time.process_time`` as the clock and one thread, what other processes take of the cores
    is left out.
    """
    for _ in range(warmup):
        function()
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        function()
        best = min(best, clock() - start)
    return best


def read_bandwidth_gbs(
    *, size_bytes: int | None = None, repeats: int = 7, clock: Clock = time.perf_counter
) -> float:
    """Measured read bandwidth of main memory with all of torch's threads, in 10^9 bytes/s.

    Sums an int64 array: one addition for eight bytes leaves the memory as the only bound. (A C++
    loop under OpenMP gives the same figure; torch's int32 sum, which widens, a thirtieth of it.)

    Args:
        size_bytes: the array; must exceed the last-level cache many times. By default 1 GiB, or an
            eighth of the available memory where that is less.
    """
    if size_bytes is None:
        size_bytes = min(1 << 30, machine.memory_available_bytes() // 8)
    array = torch.ones(size_bytes // 8, dtype=torch.int64)
    seconds = best_seconds(lambda: torch.sum(array), repeats=repeats, clock=clock)
    return array.nbytes / seconds / 1e9


def matmul_rate_tflops(
    dtype: torch.dtype,
    *,
    size: int = 2048,
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> float:
    """Measured rate of a square matrix product in ``dtype``, in 10^12 operations/s.

    Counts 2 * size**3 operations a product; both factors are drawn once and stay in memory.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    seconds = best_seconds(lambda: left @ right, repeats=repeats, clock=clock)
    return 2 * size**3 / seconds / 1e12

"""The rate of this CPU's products with operands at hand, the peak of any kernel.

``python bench/probe.py`` prints the figures; `bench/compare.py` holds prefill against them. A
matrix product of torch is a rate that someone reached, which is another thing: it is in the probe
too. The loops are in ``peak.cpp``, compiled anew for the machine at hand. Operands are random: with
zeros in them, tiles are a quarter faster on Emerald Rapids, as they take less power. Tiles are
loaded out of the first-level cache, which costs nothing but where neighbours slow loads down.
"""

import ctypes
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

# Tiles of zeros are there to show the difference.
UNITS = (
    "tiles_bf16",
    "tiles_bf16_zeros",
    "tiles_int8",
    "vectors_bf16",
    "vectors_int8",
    "vectors_float32",
)
ROUNDS = 1 << 14
SECONDS = 0.2


@cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "peak.so"
        command = ["g++", "-O2", "-march=native", "-shared", "-fPIC", str(source), "-o", str(made)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(made))
    for unit in UNITS:
        function = getattr(library, unit)
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64]
    return library


def peak_tops(unit: str, *, threads: int | None = None, repeats: int = 5) -> float:
    """10^12 operations/s of one of `UNITS` on all of torch's threads; 0.0 where the CPU lacks it.

    A multiplication and the addition behind it are two operations. The best of ``repeats``.
    """
    function = getattr(_library(), unit)
    if function(1) == 0:
        return 0.0
    count = threads or torch.get_num_threads()

    def work(until: float) -> float:
        done = 0.0
        while time.perf_counter() < until:
            done += function(ROUNDS)
        return done

    best = 0.0
    with ThreadPoolExecutor(count) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            done = sum(pool.map(work, [began + SECONDS / repeats] * count))
            best = max(best, done / (time.perf_counter() - began) / 1e12)
    return best


def best_unit(kind: str) -> tuple[str, float]:
    """The unit for ``bf16`` or ``int8`` products that is fastest here, and its rate."""
    rates = [(name, peak_tops(name)) for name in (f"tiles_{kind}", f"vectors_{kind}")]
    return max(rates, key=lambda one: one[1])

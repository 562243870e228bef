"""Linear layers over quantized weights beside ours in bfloat16. ``python bench/quantized_ops.py``

The shapes are those of Llama-3.2-1B, the codes random: only their number matters. The quantized op
and ``packed_linear`` take turns, call by call, over enough copies of each weight that none is found
in a cache. Few rows are read against the memory's bandwidth, at the bytes of codes, scales and
offsets; many rows against ``packed_linear``, which ``ops.py`` compares with ``aten.linear``.

Writes ``bench/results/quantized_ops.json``. Whole models are measured in ``offline.py``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import Clock, matmul_rate_tflops, print_table, read_bandwidth_gbs, write_results
from fxlm.compiler import ops

# outputs, inputs: qkv, o, gate and up, down, head
SHAPES = ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048))
COLD_BYTES = 192 << 20  # of weights that are read in turn
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """What a code is, how many inputs share a scale (0: all), how x is rounded."""

    kind: str = "int"
    bits: int = 8
    group: int = 0
    offset: bool = False
    activation: str = "none"


SCHEMES = {
    "int8": Scheme(activation="int8"),
    "int8wo": Scheme(),
    "int8wo g32": Scheme(group=32),
    "int4 g32": Scheme(bits=4, group=32, offset=True),
    "int4 g128": Scheme(bits=4, group=128, offset=True),
    "int4 g32 symmetric": Scheme(bits=4, group=32),
    "int4 g32 int8": Scheme(bits=4, group=32, offset=True, activation="int8"),
    "int4 g128 int8": Scheme(bits=4, group=128, offset=True, activation="int8"),
    "nf4 g64": Scheme(kind="nf4", bits=4, group=64),
    "fp8": Scheme(kind="fp8"),
    "fp8 blocks": Scheme(kind="fp8", group=128),
}
Packed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def packed_of(scheme: Scheme, outputs: int, inputs: int) -> Packed:
    """Codes, scales, offsets, table."""
    low, high = (-8, 8) if scheme.bits == 4 else (-128, 127)
    low, high = (0, 16) if scheme.kind == "nf4" else (low, high)
    codes = torch.randint(low, high, (outputs, inputs), dtype=torch.int8)
    if scheme.kind == "fp8":
        codes = codes.float().to(torch.float8_e4m3fn)
    scale = torch.rand(outputs, inputs // (scheme.group or inputs)) * 0.01
    table = torch.ops.fxlm.code_book(codes, "nf4") if scheme.kind == "nf4" else None
    scales = torch.ops.fxlm.pack_scale(scale, outputs, 1)
    words = torch.ops.fxlm.pack_codes(codes, scheme.bits, table is not None)
    return words, scales, scales.clone() if scheme.offset else None, table


def size_of(packed: Packed) -> int:
    """Bytes that one call must read."""
    return sum(part.nbytes for part in packed[:3] if part is not None)


def measure(
    name: str, shape: tuple[int, int], rows: list[int], repeats: int, now: Clock
) -> list[dict[str, object]]:
    """Best times of both ops, for each number of rows."""
    scheme, (outputs, inputs) = SCHEMES[name], shape
    copies = max(1, COLD_BYTES // (outputs * inputs))
    weights = [packed_of(scheme, *shape) for _ in range(copies)]
    dense = torch.randn(outputs, inputs).to(torch.bfloat16)
    plain = [torch.ops.fxlm.pack_weight(dense) for _ in range(max(1, copies // 2))]
    found: list[dict[str, object]] = []
    for count in rows:
        x = torch.randn(count, inputs).to(torch.bfloat16)
        best = [float("inf")] * 2
        for turn in range(repeats * (copies if count < 100 else 1)):
            panels, weight = plain[turn % len(plain)], weights[turn % copies]
            times = [now()]
            torch.ops.fxlm.packed_linear(x, panels, None, outputs)
            times.append(now())
            torch.ops.fxlm.quantized_linear(
                x, *weight, None, outputs, scheme.bits, scheme.group, scheme.activation
            )
            times.append(now())
            best = [min(best[i], times[i + 1] - times[i]) for i in range(2)]
        found.append(
            {
                "scheme": name, "outputs": outputs, "inputs": inputs, "rows": count,
                "bfloat16_us": best[0] * 1e6, "us": best[1] * 1e6,
                "gb_s": size_of(weights[0]) / best[1] / 1e9,
                "tflop_s": 2 * count * outputs * inputs / best[1] / 1e12,
                "speedup": best[0] / best[1],
            }
        )  # fmt: skip
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (all cores)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 512])
    parser.add_argument("--shapes", nargs="+", type=int, default=[1, 2, 3], help="indices")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="quantized_ops", help="of the result file")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    ops.load()
    clock = CLOCKS[options.clock]
    limits = {
        "read_gb_s": read_bandwidth_gbs(clock=clock),
        "matmul_tflop_s": matmul_rate_tflops(torch.bfloat16, clock=clock),
    }
    rows: list[dict[str, object]] = []
    for name in options.schemes:
        for index in options.shapes:
            found = measure(name, SHAPES[index], options.rows, options.repeats, clock)
            for row in found:
                row["share_of_bandwidth"] = float(str(row["gb_s"])) / limits["read_gb_s"]
            rows += found
    print_table(rows, title="Quantized linear layers, best of several")
    print(f"\nread {limits['read_gb_s']:.1f} GB/s, matmul {limits['matmul_tflop_s']:.2f} TFLOP/s")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    results = {"rows": rows, **limits}
    print(write_results(options.name, results, options=settings, output=options.output))


if __name__ == "__main__":
    main()

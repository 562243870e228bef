"""What this machine can do at most: read bandwidth, matrix products. ``python bench/probe.py``

The other benches are read against these figures: decoding is bound by the bandwidth, prefill by the
products. Writes ``bench/results/probe.json``. fxlm itself is not measured here.
"""

import argparse
from pathlib import Path

import torch

from common import machine, matmul_rate_tflops, print_table, read_bandwidth_gbs, write_results
from peak import UNITS, peak_tops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (all cores)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=None, help="instead of bench/results/")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    here = machine()
    print_table(
        [{"machine": key, "value": here[key]} for key in ("cpu", "flags", "cores", "threads")],
    )
    rows: list[dict[str, object]] = [
        {"probe": "memory read", "rate": read_bandwidth_gbs(), "unit": "GB/s"}
    ]
    for name in options.dtypes:
        rate = matmul_rate_tflops(DTYPES[name])
        rows.append({"probe": f"matmul {name}", "rate": rate, "unit": "TFLOP/s"})
    rows += [
        {"probe": f"peak of {unit.replace('_', ' ')}", "rate": peak_tops(unit) or "none",
         "unit": "Top/s"}
        for unit in UNITS
    ]  # fmt: skip
    print_table(rows, title="Measured, best of several")
    settings = {"threads": torch.get_num_threads(), "dtypes": options.dtypes}
    print(f"\nwritten: {write_results('probe', rows, options=settings, output=options.output)}")


if __name__ == "__main__":
    main()

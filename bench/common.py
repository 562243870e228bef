"""What every bench shares: machine description, probes, timing, a table, a JSON file.

Run a bench as a script (``python bench/offline.py``); its folder is then on the path and
``from common import ...`` finds this file. Nothing here belongs to the installed package; the
probes of the machine do (`fxlm.runtime.probe`).

A result is written to ``bench/results/<name>.json`` as ``{bench, machine, options, results}``, so
that no number is seen without the machine and the versions it was measured with.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fxlm.runtime.probe import Clock as Clock
from fxlm.runtime.probe import best_seconds as best_seconds
from fxlm.runtime.probe import matmul_rate_tflops as matmul_rate_tflops
from fxlm.runtime.probe import read_bandwidth_gbs as read_bandwidth_gbs

RESULTS = Path(__file__).resolve().parent / "results"
SOURCES = (":(top)", ":(top,exclude)bench/results")  # what is measured, not what was found

# What decides which kernels run: vector width, low-precision products, matrix tiles.
FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
PACKAGES = ("fxlm", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")

Row = Mapping[str, object]


# --- the machine ---------------------------------------------------------------------------------


def _field(path: str, key: str) -> str:
    """First value of ``key: value`` lines under /proc, or the empty string."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() == key:
            return value.strip()
    return ""


def _memory_bytes(key: str) -> int:
    """``MemTotal`` or ``MemAvailable`` in bytes; 0 where /proc does not tell."""
    value = _field("/proc/meminfo", key.lower())
    return int(value.split()[0]) * 1024 if value else 0


def _cgroup_limit_bytes() -> int | None:
    """The memory limit of this process's cgroup, ``None`` when there is none."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _git(*arguments: str) -> str:
    """Output of a git command in the checkout; empty where there is none."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _versions() -> dict[str, str]:
    """Python and the packages that decide a speed, as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # names the build; a wheel's metadata may not
    return found


def _gpus() -> list[dict[str, object]]:
    """Name, memory in bytes and compute capability of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    all_properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}
        for p in all_properties
    ]


def machine() -> dict[str, object]:
    """Where and with what a result was measured. Holds no host name and no path."""
    flags = set((_field("/proc/cpuinfo", "flags") or _field("/proc/cpuinfo", "features")).split())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "architecture": platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _memory_bytes("MemTotal"),
        "cgroup_limit_bytes": _cgroup_limit_bytes(),
        "gpus": _gpus(),
        "system": platform.system(),
        "versions": _versions(),
    }


# --- reporting -----------------------------------------------------------------------------------


def _cell(value: object) -> str:
    """A number with three or four significant digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "-" if value is None else str(value)
    if value and abs(value) < 0.01:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}"


def print_table(rows: Sequence[Row], *, title: str = "") -> None:
    """Print rows that share their keys as a table: numbers to the right, the rest to the left."""
    if title:
        print(f"\n{title}")
    if not rows:
        print("(nothing measured)")
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(isinstance(r.get(c), int | float | None) for r in rows)}
    lines = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for number, line in enumerate(lines):
        cells = zip(columns, line, widths, strict=True)
        print("  ".join(t.rjust(w) if c in numeric else t.ljust(w) for c, t, w in cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    sys.stdout.flush()


def write_results(
    bench: str,
    results: object,
    *,
    options: Mapping[str, Any] | None = None,
    output: Path | None = None,
) -> Path:
    """Write ``bench/results/<bench>.json`` (or ``output``) whole or not at all; return its path.

    Args:
        bench: name of the bench, e.g. ``offline``.
        results: anything JSON can hold, usually the rows given to `print_table`.
        options: the arguments the bench ran with.
    """
    path = output or RESULTS / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "bench": bench,
        "machine": machine(),
        "options": dict(options or {}),
        "results": results,
    }
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path

"""Charts of the report as SVG: errors by pass, times with and without, the roofline.

Colours come from the page's style sheet by class. Not here: what is charted (`report`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fxlm.runtime.explain.fixtures import MODES

Entry = Mapping[str, Any]
FLOOR = 1e-8  # nats; smaller errors are drawn here
UNREST = 1.5  # the same step this many times as long: others used the machine


Row = tuple[str, dict[str, float], float | None]


def error_chart(passes: Sequence[Entry]) -> str:
    """Largest error of each stage against the oracle, and against the stage before; log scale."""
    shown = [p for p in passes if p.get("errors")]
    rows: list[Row] = []
    for entry in shown:
        oracle = {m: e["absolute"] for m, e in entry["errors"].items()}
        steps = [e["absolute"] for e in entry.get("errors_before", {}).values()]
        rows.append((entry["name"], oracle, max(steps, default=None)))
    if not rows:
        return ""
    values = [v for _, o, b in rows for v in (*o.values(), *([] if b is None else [b]))]
    low, high = _decades(values)
    left, right, top, step = 200.0, 560.0, 14.0, 30.0
    bottom = top + step * len(rows)

    def x(value: float) -> float:
        clamped = min(max(value, 10.0**low), 10.0**high)
        return left + (math.log10(clamped) - low) / (high - low) * (right - left)

    parts = [
        f'<line class="grid" x1="{x(10.0**d):.0f}" y1="{top - 6:.0f}" x2="{x(10.0**d):.0f}" '
        f'y2="{bottom:.0f}"/><text class="tick" x="{x(10.0**d):.0f}" y="{bottom + 16:.0f}">'
        f"{_power(d, low)}</text>"
        for d in range(low, high + 1)
    ]
    for index, (name, oracle, before) in enumerate(rows):
        y = top + step * (index + 0.5)
        parts.append(
            f'<text class="name" x="{left - 12:.0f}" y="{y + 4:.0f}">{escape(name)}</text>'
        )
        if before is not None:
            parts.append(
                f'<line class="before" x1="{left:.0f}" y1="{y:.0f}" x2="{x(before):.0f}" '
                f'y2="{y:.0f}"><title>{escape(name)}: {before:.3g} nats from the stage before'
                "</title></line>"
            )
        parts += [
            f'<circle class="m{MODES.index(mode)}" cx="{x(value):.1f}" '
            f'cy="{y + 3 * (MODES.index(mode) - 1.5):.1f}" r="4.5">'
            f"<title>{escape(name)}, {mode}: {value:.3g} nats from the oracle</title></circle>"
            for mode, value in oracle.items()
        ]
    return _svg(584, bottom + 24, "Largest error of each stage", parts)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    finite = [max(v, FLOOR) for v in values if math.isfinite(v)] or [1.0]
    low = math.floor(math.log10(min(finite)))
    high = math.ceil(math.log10(max(finite)))
    return low, max(high, low + 2)


def _power(decade: int, low: int) -> str:
    if decade == low and 10.0**decade <= FLOOR:
        return "0"
    return f"{10.0**decade:g}" if -3 <= decade <= 3 else f"1e{decade}"


def time_chart(passes: Sequence[Entry], shape: str) -> str:
    """Milliseconds of a step of one shape with and without each pass that can be left out."""
    rows = []
    for entry in passes:
        for row in entry.get("without", {}).get("times", []):
            if row["shape"] == shape:
                rows.append((entry["name"], row["with_ms"], row["without_ms"]))
    if not rows:
        return ""
    most = max(max(w, o) for _, w, o in rows)
    left, right, top, step = 200.0, 394.0, 8.0, 46.0
    scale = (right - left) / most
    parts = []
    for index, (name, with_ms, without_ms) in enumerate(rows):
        y = top + step * index
        change = without_ms / with_ms
        slower = f"{without_ms:.3g} ms, {change:.2f} × as long"
        parts += [
            f'<text class="name" x="{left - 12:.0f}" y="{y + 22:.0f}">{escape(name)}</text>',
            _bar("with", left, y + 4, with_ms * scale, f"{with_ms:.3g} ms"),
            _bar("without", left, y + 20, without_ms * scale, slower),
        ]
    return _svg(584, top + step * len(rows), f"Times of {shape}", parts)


def _bar(kind: str, x: float, y: float, width: float, text: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{max(width, 2):.1f}" height="14" '
        f'rx="3"/><text class="value" x="{x + max(width, 2) + 6:.0f}" y="{y + 11:.0f}">'
        f"{escape(text)}</text>"
    )


def roofline(passes: Sequence[Entry], machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a shape: what the last stage needs, and the least time of this machine for it."""
    if "read_gbs" not in machine:
        return []
    rows = []
    for found in passes[-1]["costs"]:
        moved = found["weight_bytes"] + found["cache_bytes"]
        compute = found["operations"] / machine["matmul_tflops"] / 1e9
        memory = moved / machine["read_gbs"] / 1e6
        rows.append({
            "shape": found["shape"], "gflop": found["operations"] / 1e9, "mb": moved / 1e6,
            "intensity": found["operations"] / max(moved, 1), "compute_ms": compute,
            "memory_ms": memory, "bound": "memory" if memory > compute else "compute",
            "least_ms": max(memory, compute), "measured_ms": _measured(passes, found["shape"]),
        })  # fmt: skip
    return rows


def _measured(passes: Sequence[Entry], shape: str) -> float | None:
    """Median of the step with all passes, over the comparisons in which it was timed."""
    found = sorted(
        row["with_ms"]
        for entry in passes
        for row in entry.get("without", {}).get("times", [])
        if row["shape"] == shape
    )
    return found[len(found) // 2] if found else None


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def unrest(passes: Sequence[Entry]) -> str:
    """What to say if times of one and the same step, the whole one, lie far apart; else empty."""
    times: dict[str, list[float]] = {}
    for entry in passes:
        for row in entry.get("without", {}).get("times", []):
            times.setdefault(row["shape"], []).append(row["with_ms"])
    worst = max(times.values(), key=lambda found: max(found) / min(found), default=[1.0])
    if max(worst) < UNREST * min(worst):
        return ""
    return (f"The machine was busy: the same step took {min(worst):.3g} to {max(worst):.3g} ms. "
            "Trust ratios of one row alone, or run it again.")  # fmt: skip

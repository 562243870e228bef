"""The report as lines of text, for a terminal. Not here: printing (`commands`), HTML (`page`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fxlm.compiler.cost import UNCACHED
from fxlm.runtime.explain.charts import roofline, unrest

Entry = Mapping[str, Any]
HEADS = (("rewrites", 9), ("calls", 15), ("float32", 11), ("before", 11), ("top-1", 8),
         ("without", 10))  # fmt: skip
RECOMPUTED = (
    "before paged_attention there is no cache: each step runs the whole context anew, so these "
    "figures are not to be held against those of later stages"
)


def lines(report: Mapping[str, Any], wanted: Sequence[str] = ()) -> Iterator[str]:
    """A line a pass and a line a shape; or everything about the passes that are wanted."""
    if wanted:
        for entry in report["passes"]:
            if entry["name"] in wanted:
                yield from one_pass(entry)
        return
    heads = "".join(f"{name:>{width}}" for name, width in HEADS)
    yield f"{'pass':<24}{heads}"
    for entry in report["passes"]:
        yield _line(entry)
    for row in roofline(report["passes"], report["machine"]):
        measured = f", measured {row['measured_ms']:.3g} ms" if row["measured_ms"] else ""
        yield (
            f"{row['shape']:<24}{row['gflop']:>9.3g} GFLOP {row['mb']:>9.3g} MB  at least "
            f"{row['least_ms']:.3g} ms ({row['bound']}){measured}, {report['times']}"
        )
    if unrest(report["passes"]):
        yield unrest(report["passes"])
    model = report["model"]
    if model["layers_shown"] != model["num_layers"]:
        yield f"(the first {model['layers_shown']} of {model['num_layers']} layers)"


def _line(entry: Entry) -> str:
    calls = f"{entry.get('nodes_before', '')} -> {entry['nodes_after']}"
    found = entry.get("errors", {}).values()
    errors = f"{max(e['absolute'] for e in found):11.2e}" if found else " " * 11
    before = entry.get("errors_before", {}).values()
    errors += f"{max(e['absolute'] for e in before):11.2e}" if before else " " * 11
    errors += f"{min(e['agreement'] for e in found):8.1%}" if found else " " * 8
    ratio = f"{_without(entry.get('without', {})):>10}"
    return f"{entry['name']:<24}{entry.get('rewrites', ''):>9}{calls:>15}{errors}{ratio}".rstrip()


def _without(found: Entry) -> str:
    """How many times as long a step without the pass takes, or why there is none."""
    if times := found.get("times"):
        return f"{times[0]['without_ms'] / times[0]['with_ms']:.2f} x"
    return ("always on" if found["required"] else "the same") if found else ""


def one_pass(entry: Entry) -> Iterator[str]:
    """What a pass did, in full: its words, its diff, its errors, its costs, its source."""
    yield f"{entry['name']}: {entry['rewrites']} rewrites in {1e3 * entry['seconds']:.1f} ms, "
    yield f"calls {entry['nodes_before']} -> {entry['nodes_after']}"
    yield entry["summary"]
    yield from (f"note: {note}" for note in entry["notes"])
    for mode, found in entry.get("errors", {}).items():
        step = entry["errors_before"][mode]
        yield (f"{mode:<16} {found['absolute']:.2e} nats from float32 ({found['relative']:.2e} "
               f"relative, top-1 {found['agreement']:.1%}), {step['absolute']:.2e} from the stage "
               "before")  # fmt: skip
    for row in entry.get("without", {}).get("times", []):
        yield f"{row['shape']:<24} {row['with_ms']:.3g} ms, without it {row['without_ms']:.3g} ms"
    if "reason" in entry.get("without", {}):
        yield f"not timed without it: {entry['without']['reason']}"
    for cost in entry["costs"]:
        yield (f"{cost['shape']:<24} {cost['tokens']} tokens run, "
               f"{cost['operations'] / 1e9:.3g} GFLOP, "
               f"{cost['weight_bytes'] / 1e6:.3g} MB of weights, "
               f"{cost['cache_bytes'] / 1e6:.3g} MB of cache")  # fmt: skip
    if entry["stage"] in UNCACHED:
        yield RECOMPUTED
    layer = entry["layer"]
    if layer["diff"]:
        yield (
            f"-- layer {layer['number']} --"
            if layer["number"] >= 0
            else "-- outside of the layers --"
        )
        yield from layer["diff"]
    yield "-- source --"
    yield entry["source"]

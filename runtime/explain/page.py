"""The report as one HTML page: self-contained, nothing fetched, light and dark.

Template, style and script are files of ``assets/``; pictures are SVG, made here. Not here: what
is in the report (`report`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

from fxlm.compiler.cost import UNCACHED
from fxlm.runtime.explain.charts import error_chart, roofline, time_chart, unrest
from fxlm.runtime.explain.drawing import draw
from fxlm.runtime.explain.text import RECOMPUTED

BESIDE = (
    "Measured beside a running server: time of the processor, of one thread. Compare the two bars "
    "of a row, not these times with those of the server."
)
KINDS = {"+": "added", "-": "removed", "@": "place"}


def render(report: Mapping[str, Any]) -> str:
    """The page of a report that `fxlm.runtime.explain.report.explain` made."""
    assets = resources.files(__package__) / "assets"
    text = {name: (assets / name).read_text(encoding="utf-8")
            for name in ("page.html.jinja", "page.css", "page.js")}  # fmt: skip
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"count": _count, "size": _size, "ms": _ms, "lead": _lead}
    passes = report["passes"]
    return environment.from_string(text["page.html.jinja"]).render(
        report=report,
        css=text["page.css"],
        js=text["page.js"],
        passes=[_shown(entry) for entry in passes],
        errors=error_chart(passes),
        times=[(s["name"], time_chart(passes, s["name"])) for s in report["shapes"]],
        unrest=unrest(passes),
        roofline=roofline(passes, report["machine"]),
        beside=BESIDE,
        uncached=UNCACHED,
        recomputed=RECOMPUTED,
        largest=max(entry["nodes_after"] for entry in passes),
    )


def _shown(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry with its picture and its worst errors."""
    layer = entry["layer"]
    picture = ""
    if layer is not None and layer["num_changed"]:
        title = f"{entry['name']}, {_layer_name(layer['number'])}"
        picture = draw(layer["views"], layer["marks"], title)
    return {
        **entry,
        "picture": picture,
        "where": "" if layer is None else _layer_name(layer["number"]),
        "diff": [(KINDS.get(line[:1], ""), line) for line in (layer or {"diff": []})["diff"]],
        "worst": _worst(entry.get("errors")),
        "worst_before": _worst(entry.get("errors_before")),
    }  # fmt: skip


def _worst(errors: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Largest errors and smallest agreement of all modes."""
    if not errors:
        return None
    found = errors.values()
    return {
        "absolute": max(e["absolute"] for e in found),
        "relative": max(e["relative"] for e in found),
        "agreement": min(e["agreement"] for e in found),
    }


def _layer_name(number: int) -> str:
    return f"layer {number}" if number >= 0 else "outside of the layers"


def _lead(summary: str) -> str:
    """First paragraph of a docstring as one line."""
    return re.sub(r"\s+", " ", summary.split("\n\n")[0]).strip()


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _size(value: float) -> str:
    return f"{_count(value)}B"


def _ms(value: float) -> str:
    return f"{value:.3g} ms"

"""Draw the comparison: ``python bench/plot.py bench/results/compare_*.json -o docs/compare.svg``.

A panel a row: a bar an engine, its height the tokens/s as a multiple of fxlm's, the whiskers the
slowest and fastest good block. What is drawn is in the JSON and nowhere else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"fxlm": "#1f6feb", "vllm": "#d29922", "llama.cpp": "#8b949e", "hf": "#a371f7"}


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in options.results]
    width = max(len(_names(d)) for d in documents)
    figure, grid = plt.subplots(
        len(documents), width, figsize=(2.1 * width, 2.9 * len(documents)), squeeze=False
    )
    for line, document in zip(grid, documents, strict=True):
        names = _names(document)
        for axes, name in zip(line, names, strict=False):
            rows = [r for r in document["results"]["rows"] if r["row"] == name]
            _panel(axes, name, [r for r in rows if r.get("tokens_per_s")])
        line[0].set_ylabel(f"{document['results']['model']}\nspeed, fxlm = 1")
        for axes in line[len(names) :]:
            axes.axis("off")
    figure.tight_layout()
    figure.savefig(options.output, metadata={"Date": None})


def _names(document: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["row"] for row in document["results"]["rows"]))


def _panel(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    axes.set_title(title, fontsize=9)
    own = next((r["seconds"] for r in rows if r["engine"] == "fxlm"), None)
    if own is None:
        axes.axis("off")
        return
    for place, row in enumerate(rows):
        speed = own / row["seconds"]
        low, high = (own / s for s in reversed(row["range"]))
        color = COLORS.get(row["engine"], "#6e7681")
        error = [[max(0.0, speed - low)], [max(0.0, high - speed)]]
        axes.bar(place, speed, color=color, yerr=error, ecolor="#57606a", width=0.75)
        label = f"{row['tokens_per_s']:.3g}"
        axes.annotate(label, (place, speed), ha="center", va="bottom", fontsize=7)
    names = [row["engine"] for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7, rotation=30)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(1.0, color="#57606a", linewidth=0.6, linestyle=":")


if __name__ == "__main__":
    main()

"""One layer before and after a pass as one SVG: what went, what came, what stays.

Layout by fast-sugiyama (layers and crossings, as ``dot`` does it) when the page is made; weights
and other inputs stand in the box of the call that takes them. Not here: the page (`page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import fast_sugiyama

DX, DY = 134.0, 62.0  # between centres
WIDTH, LINE, PAD = 126.0, 13.0, 8.0
DRAWN = ("call", "weight code", "outer")
View = Mapping[str, Any]
Point = tuple[float, float]


def draw(views: Sequence[View], marks: Mapping[str, str], title: str) -> str:
    """The SVG of one picture.

    Args:
        views: values, each as `fxlm.compiler.views.View` has it.
        marks: by name: same, added, removed, changed.
        title: read to those who cannot see it.
    """
    nodes = {v["name"]: v for v in views if v["kind"] in DRAWN}
    folded = {v["name"]: v for v in views if v["kind"] not in DRAWN}
    edges = [(i, v["name"]) for v in nodes.values() for i in v["inputs"] if i in nodes]
    if not edges:
        return ""
    points, paths = _layout(list(nodes), edges)
    lines = {name: _lines(view, folded) for name, view in nodes.items()}
    marks = {n: _mark(v, marks, folded) for n, v in nodes.items()}
    drawn = [_edge(paths[e], _edge_mark(marks[e[0]], marks[e[1]])) for e in edges]
    drawn += [_box(nodes[n], at, lines[n], marks[n]) for n, at in points.items()]
    right = max(x for x, _ in points.values()) + WIDTH / 2 + 6
    bottom = max(y for _, y in points.values()) + 34
    return (
        f'<svg class="layer" viewBox="0 0 {right:.0f} {bottom:.0f}" '
        f'style="--natural:{right:.0f}px" '
        f'role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    )


def _layout(
    names: list[str], edges: list[tuple[str, str]]
) -> tuple[dict[str, Point], dict[tuple[str, str], list[Point]]]:
    """Centres of the boxes, and the points that each edge passes."""
    used = [n for n in names if any(n in edge for edge in edges)]
    number = {
        name: i for i, name in enumerate(used)
    }  # ints: strings would be hashed anew each time
    given = [(number[a], number[b]) for a, b in edges]
    place: dict[int, Point] = {}
    segments: list[tuple[int, int]] = []
    left = 0.0
    for positions, width, _, part in fast_sugiyama.from_edges(
        given, vertex_spacing=1, dummy_vertices=True, dummy_size=0.35,
        crossing_minimization="median", transpose=True,
    ):  # fmt: skip
        low = min(x for _, (x, _) in positions)
        high = max(y for _, (_, y) in positions)
        for node, (x, y) in positions:
            place[int(node)] = ((x - low + left) * DX + WIDTH / 2 + 6, (high - y) * DY + 26)
        segments += [(int(a), int(b)) for a, b in part or []]
        left += width + 1
    order = {i: name for name, i in number.items()}
    points = {order[i]: at for i, at in place.items() if i in order}
    return points, _routes(edges, number, segments, place)


def _routes(
    edges: list[tuple[str, str]],
    number: Mapping[str, int],
    segments: list[tuple[int, int]],
    place: Mapping[int, Point],
) -> dict[tuple[str, str], list[Point]]:
    """Follow the dummy vertices of each edge, of which every one has a single way on."""
    count = len(number)
    onward: dict[int, list[int]] = {}
    for a, b in segments:
        onward.setdefault(a, []).append(b)
    ends: dict[tuple[int, int], list[Point]] = {}
    for start in range(count):
        for first in onward.get(start, []):
            way, node = [place[start], place[first]], first
            while node >= count:
                node = onward[node][0]
                way.append(place[node])
            ends[start, node] = way
    return {
        (a, b): ends.get((number[a], number[b]), [place[number[a]], place[number[b]]])
        for a, b in edges
    }  # fmt: skip


def _edge(way: Sequence[Point], mark: str) -> str:
    (x, y), *rest = way
    path = [f"M{x:.0f},{y + 15:.0f}"]
    y += 15
    for index, (nx, ny) in enumerate(rest):
        stop = ny - 15 if index == len(rest) - 1 else ny
        half = (y + stop) / 2
        path.append(f"C{x:.0f},{half:.0f} {nx:.0f},{half:.0f} {nx:.0f},{stop:.0f}")
        x, y = nx, stop
    return f'<path class="edge {mark}" d="{"".join(path)}"/>'


def _lines(view: View, folded: Mapping[str, View]) -> list[str]:
    """Label, type, and what is folded into the box."""
    weights = [folded[i] for i in view["inputs"] if i in folded]
    named = [v["label"] for v in weights if v["kind"] in ("weight", "constant")]
    others = [v["label"] for v in weights if v["kind"] in ("cache", "step")]
    extra = named if len(named) == 1 else [f"{len(named)} weights"] if named else []
    if others:
        extra.append(others[0] if len(others) == 1 else f"+ {len(others)} inputs")
    return [view["label"], view["type"], ", ".join(extra)]


def _mark(view: View, marks: Mapping[str, str], folded: Mapping[str, View]) -> str:
    own = marks[view["name"]]
    touched = any(marks[i] != "same" for i in view["inputs"] if i in folded)
    return "changed" if own == "same" and touched else own


def _edge_mark(a: str, b: str) -> str:
    return next((m for m in ("removed", "added") if m in (a, b)), "same")


def _box(view: View, at: Point, lines: list[str], mark: str) -> str:
    x, y = at
    rows = [line for line in lines if line]
    height = 2 * PAD + LINE * len(rows) - 4
    top = y - height / 2
    kind = view["kind"].replace(" ", "-")
    texts = [
        f'<text x="{x:.0f}" y="{top + PAD + 8 + LINE * i:.0f}" class="t{i}">'
        f"{escape(_cut(row))}</text>"
        for i, row in enumerate(rows)
    ]
    tip = escape("\n".join(filter(None, [view["text"], view["type"], view["module"], mark])))
    return (
        f'<g class="box {mark} {kind}" data-name="{escape(view["name"])}"><title>{tip}</title>'
        f'<rect x="{x - WIDTH / 2:.0f}" y="{top:.0f}" width="{WIDTH:.0f}" height="{height:.0f}" '
        f'rx="7"/>{"".join(texts)}</g>'
    )


def _cut(text: str, length: int = 20) -> str:
    return text if len(text) <= length else "…" + text[-length + 1 :]

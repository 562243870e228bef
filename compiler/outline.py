"""Outline: identical layers become one region, called once a layer.

The step graph is cut at the layers of the module list that holds the attention: what comes
before (embedding, rotary tables), each layer, what comes after (norm, head, sampling). Regions
that are the same up to names are kept once. Compile time then does not grow with depth;
a shallow model, where one region compiles sooner than three, is left whole.
Regions exchange tensors only; a size that one needs is read off one of its own inputs.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxlm.compiler.program import module_path

_SYMBOL = re.compile(r"\bs\d+\b")
# What compiling one more region costs, in nodes of a graph: each has a wrapper of its own, which
# takes the C++ compiler about 4 s where a node takes 0.03 s.
REGION_COST = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A graph that is compiled once.

    Attributes:
        name: ``prologue``, ``layer``, ``layer_1``, ``epilogue``… or ``step`` if uncut.
        graph: placeholders ``in0…``, one output tuple.
        digest: SHA-256 over the canonical text, the same for the same computation.
    """

    name: str
    graph: fx.Graph
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of a region: values of the step by name, in the region's order."""

    region: str
    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """Distinct regions, the calls in order, and the names of the step's results."""

    regions: list[Region]
    calls: list[Call]
    results: list[str]


def outline(step: fx.Graph, cut: bool | None = None) -> Outline:
    """Cut a step graph into regions; equal ones are merged by digest.

    Args:
        step: the step graph.
        cut: whether to cut at layers; ``None`` leaves it whole where that compiles sooner.
    """
    ranks = layer_ranks(step)
    plan = _outline(step, ranks)
    if cut is None:
        cut = _cost(plan) < REGION_COST + len(ranks)
    return plan if cut else _outline(step, dict.fromkeys(ranks, 0))


def cuts_deeper(plan: Outline, more: int) -> bool:
    """Whether `outline` would cut the model of ``plan`` if it had ``more`` layers of the last kind.

    Args:
        plan: of the first layers, cut.
        more: layers that the whole model has beyond those.
    """
    sizes = {region.name: len(region.graph.nodes) for region in plan.regions}
    nodes = sum(sizes[call.region] for call in plan.calls)
    layer = sizes[plan.calls[-2].region] if len(plan.calls) > 2 else 0
    return _cost(plan) < REGION_COST + nodes + more * layer


def _cost(plan: Outline) -> int:
    """Time to compile, counted in nodes."""
    return sum(REGION_COST + len(region.graph.nodes) for region in plan.regions)


def _outline(step: fx.Graph, ranks: dict[fx.Node, int]) -> Outline:
    """Regions and calls for a given rank of each node."""
    last = max(ranks.values(), default=0)
    regions: dict[str, Region] = {}
    calls: list[Call] = []
    for rank in range(last + 1):
        nodes = [n for n in step.nodes if ranks.get(n) == rank]
        if not nodes:
            continue
        graph, inputs, outputs = _extract(nodes)
        if not outputs:
            continue
        digest = hashlib.sha256(canonical_text(graph).encode()).hexdigest()
        if digest not in regions:
            name = _name(rank, last, [r.name for r in regions.values()])
            regions[digest] = Region(name=name, graph=graph, digest=digest)
        calls.append(Call(region=regions[digest].name, inputs=inputs, outputs=outputs))
    returned: Any = next(iter(reversed(step.nodes))).args[0]
    results = [n.name for n in returned]
    return Outline(regions=list(regions.values()), calls=calls, results=results)


def canonical_text(graph: fx.Graph) -> str:
    """The graph as text that does not depend on names: inputs' types, ops, arguments.

    Symbols of sizes are numbered as they come; two captures number them as they please.
    """
    number = {n: f"%{i}" for i, n in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Text(number[n]))
        value = node.meta.get("val")
        typed = _type(value) if node.op == "placeholder" else ""
        lines.append(f"{number[node]} {node.op} {node.target if not typed else ''} {typed} "
                     f"{args} {kwargs}")  # fmt: skip
    seen: dict[str, str] = {}
    return _SYMBOL.sub(lambda m: seen.setdefault(m[0], f"s{len(seen)}"), "\n".join(lines))


class _Text(str):
    def __repr__(self) -> str:
        return str(self)


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device.type} {list(value.shape)} {list(value.stride())}"
    return f"{type(value).__name__} {value}"


def _name(rank: int, last: int, taken: list[str]) -> str:
    if last == 0:
        return "step"
    if rank == 0:
        return "prologue"
    if rank == last:
        return "epilogue"
    number = sum(name.startswith("layer") for name in taken)
    return f"layer_{number}" if number else "layer"


# ---- which node belongs where ----------------------------------------------------------------


def layer_ranks(step: fx.Graph) -> dict[fx.Node, int]:
    """0 before the layers, i + 1 in layer i, and one more after the last."""
    prefix = _layer_list(step)
    layers = layer_numbers(step)
    if not prefix or max(layers.values()) < 1:
        return dict.fromkeys(layers, 0)
    last = max(layers.values()) + 1
    ranks: dict[fx.Node, int] = {}
    for node, layer in layers.items():
        behind = max((ranks.get(i, 0) for i in node.all_input_nodes), default=0)
        if layer >= 0:
            ranks[node] = max(layer + 1, behind)
        else:  # between layers: with the layer before it; behind the last layer: after
            ranks[node] = behind + 1 if behind == last else behind
    # A node of a layer that needs nothing of the layers before it could run earlier, but
    # belongs to its layer: equal layers stay equal.
    return ranks


def layer_numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """The layer that each call belongs to by its module path; -1 outside of the layers."""
    prefix = _layer_list(graph)
    return {n: _layer(n, prefix) for n in graph.nodes if n.op == "call_function"}


def _layer_list(step: fx.Graph) -> str:
    """Path of the module list whose members hold the attention calls, or nothing."""
    ops = (torch.ops.fxlm.paged_attention.default, torch.ops.fxlm.attention.default)
    found: Counter[str] = Counter()
    for node in step.nodes:
        if node.target in ops:
            match = re.match(r"(.*?)\.\d+(\.|$)", module_path(node))
            if match:
                found[match.group(1)] += 1
    return found.most_common(1)[0][0] if found else ""


def _layer(node: fx.Node, prefix: str) -> int:
    if isinstance(node.meta.get("val"), (torch.SymInt, int)):
        return -1
    match = re.match(re.escape(prefix) + r"\.(\d+)(\.|$)", module_path(node))
    return int(match.group(1)) if match and prefix else -1


# ---- cutting one region out ------------------------------------------------------------------


def _extract(nodes: list[fx.Node]) -> tuple[fx.Graph, list[str], list[str]]:
    """Copy ``nodes`` into a graph of their own.

    Returns:
        The graph, the names of the outer values that it takes, and of those it gives.
    """
    inside = {n for n in nodes if isinstance(n.meta["val"], torch.Tensor) or _is_tuple(n)}
    builder = _Builder(inside)
    for node in nodes:
        if node in inside:
            builder.copy(node)
    given = [n for n in nodes if n in inside and _leaves(n, inside)]
    builder.graph.output(tuple(builder.copies[n] for n in given))
    _place_inputs_first(builder.graph)
    return builder.graph, [n.name for n in builder.taken], [n.name for n in given]


def _leaves(node: fx.Node, inside: set[fx.Node]) -> bool:
    if _is_tuple(node):
        return False
    return any(u not in inside and not _is_size(u) for u in node.users)


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], (tuple, list))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int, float, bool, torch.SymFloat,
                                             torch.SymBool))  # fmt: skip


class _Builder:
    """Copies nodes into a new graph; outer tensors become inputs, sizes are read anew."""

    def __init__(self, inside: set[fx.Node]) -> None:
        self.graph = fx.Graph()
        self.inside = inside
        self.copies: dict[fx.Node, fx.Node] = {}
        self.taken: list[fx.Node] = []

    def copy(self, node: fx.Node) -> None:
        self.copies[node] = self.graph.node_copy(node, self.resolve)

    def resolve(self, node: fx.Node) -> fx.Node:
        if node in self.copies:
            return self.copies[node]
        if _is_size(node):
            self.copies[node] = self._size(node)
        else:
            assert node not in self.inside, f"{node} is used before it is made"
            self._take(node)
        return self.copies[node]

    def _take(self, node: fx.Node) -> None:
        copy = self.graph.placeholder(f"in{len(self.taken)}")
        copy.meta = dict(node.meta)
        if any(node.meta["val"] is other.meta["val"] for other in self.taken):
            copy.meta["val"] = _apart(node.meta["val"])
        self.copies[node] = copy
        self.taken.append(node)

    def _size(self, node: fx.Node) -> fx.Node:
        """A size: read off an input of this region where one has it, else computed anew."""
        value = node.meta["val"]
        for outer in self.taken:
            for dim, extent in enumerate(outer.meta["val"].shape):
                if _same_size(extent, value):
                    source = (self.copies[outer], dim)
                    size = self.graph.call_function(torch.ops.aten.sym_size.int, source)
                    size.meta["val"] = value
                    return size
        return self.graph.node_copy(node, self.resolve)


def _apart(value: Any) -> torch.Tensor:
    """A fake tensor of the same type: inputs that are one tensor would be compiled as one."""
    with value.fake_mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )


def _same_size(left: object, right: object) -> bool:
    both = isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt)
    return both and bool(left.node.expr == right.node.expr)  # type: ignore[attr-defined]


def _place_inputs_first(graph: fx.Graph) -> None:
    """Placeholders were made where they were first used; move them to the front, in order."""
    for node in reversed([n for n in graph.nodes if n.op == "placeholder"]):
        first = next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)

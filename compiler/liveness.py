"""Liveness: how much memory a graph needs at its peak, from its metadata alone.

Counts the storages alive after each node, views not twice, inputs not at all. The graph is
taken as it stands: compiled code fuses, so this is an upper bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlm.compiler.values import is_view

if TYPE_CHECKING:
    from fxlm.compiler.outline import Outline
    from fxlm.compiler.program import Program

PROBE = 1024
Memory = tuple[int, int]  # number of the node that made it, and its storage


def activation_costs(program: Program, plan: Outline) -> dict[str, int]:
    """Bytes per token and per logits row of a step's activations, largest region counted.

    Args:
        program: final, with metadata up to date.
        plan: its step, outlined.
    """
    tokens, rows = (program.symbol(n).node.expr for n in ("T", "R"))
    per_token = _peak(plan, {tokens: PROBE, rows: 1})
    per_row = _peak(plan, {tokens: 1, rows: PROBE})
    return {"per_token": -(-per_token // PROBE), "per_row": -(-per_row // PROBE)}


def _peak(plan: Outline, sizes: dict[Any, int]) -> int:
    peaks = {region.name: peak_bytes(region.graph, sizes) for region in plan.regions}
    return max(peaks.values()) + _handed_on_bytes(plan, sizes)


def _handed_on_bytes(plan: Outline, sizes: dict[Any, int]) -> int:
    """Bytes of what the prologue gives to all layers, which lives as long as the step."""
    first = plan.regions[0].graph
    outputs: Any = next(iter(reversed(first.nodes))).args[0]
    return sum(_storages(node, sizes).popitem()[1] for node in outputs)


def peak_bytes(graph: fx.Graph, sizes: dict[Any, int]) -> int:
    """Most bytes alive at once.

    Args:
        graph: nodes with fake values; placeholders are not counted.
        sizes: values of the symbols that occur; others count as their hints.
    """
    nodes = list(graph.nodes)
    held = _memory(nodes, sizes)
    given: set[Memory] = set()
    last_use: dict[Memory, int] = {}
    for index, node in enumerate(nodes):
        if node.op == "placeholder":
            given |= set(held[node])
        for used in (node, *node.all_input_nodes):
            for memory in held[used]:
                last_use[memory] = index
    alive: dict[Memory, int] = {}
    most = 0
    for index, node in enumerate(nodes):
        if node.op == "call_function":
            for memory, size in held[node].items():
                if memory not in given:
                    alive[memory] = size
        most = max(most, sum(alive.values()))
        alive = {s: size for s, size in alive.items() if last_use[s] > index}
    return most


def _memory(nodes: list[fx.Node], sizes: dict[Any, int]) -> dict[fx.Node, dict[Memory, int]]:
    """The memory that each node's value lies in, and its bytes.

    Nodes of equal layers may have one value, so a storage is told apart by the node that made it.
    """
    held: dict[fx.Node, dict[Memory, int]] = {}
    for index, node in enumerate(nodes):
        inputs = node.all_input_nodes if node.op == "call_function" and is_view(node) else []
        shared = {memory[1]: memory for i in inputs for memory in held[i]}
        held[node] = {
            shared.get(storage, (index, storage)): size
            for storage, size in _storages(node, sizes).items()
        }
    return held


def _storages(node: fx.Node, sizes: dict[Any, int]) -> dict[int, int]:
    """Storages of a node's value: identity and bytes."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    found = {}
    for tensor in parts:
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            found[storage._cdata] = _number(storage.nbytes(), sizes)
    return found


def _number(count: Any, sizes: dict[Any, int]) -> int:
    if isinstance(count, int):
        return count
    known = count.node.expr.subs(sizes)
    return int(known) if known.is_number else int(count.node.hint)

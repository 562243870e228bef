"""Hoist: cut a program into a load graph (weights alone) and a step graph (all the rest).

Whatever depends on weights and constants alone runs once, while loading: renames, casts,
concatenations, packing, dequantization. The step graph sees its results as inputs. Nobody
writes a loader. Not here: running the load graph (`load`), compiling the step (`lower`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from fxlm.compiler.program import Input, Program

# Views that repeat memory: hoisting one would hold its result, or lie about its strides.
_KEEP_IN_STEP = (torch.ops.aten.expand.default,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Both halves of a program.

    Attributes:
        load: graph from checkpoint tensors and constants to prepared weights; nodes stand in
            the order in which they should run, so that little is alive at a time.
        load_inputs: meaning of the load graph's placeholders, by name.
        prepared: names of the load graph's outputs, in order.
        step: graph from prepared weights, caches and step inputs to the program's outputs.
        step_inputs: meaning of the step graph's placeholders; a prepared weight has role
            ``weight`` and its name of ``prepared`` as source.
    """

    load: fx.Graph
    load_inputs: dict[str, Input]
    prepared: list[str]
    step: fx.Graph
    step_inputs: dict[str, Input]


def hoist(program: Program) -> Cut:
    """Cut ``program``; it is left as it was (its metadata is computed anew first)."""
    program.propagate()
    early = _early(program)
    border = [n for n in program.graph.nodes if n in early and any(u not in early for u in n.users)]
    step, step_inputs = _step_graph(program, early, border)
    load, load_inputs = _load_graph(program, border)
    return Cut(
        load=load,
        load_inputs=load_inputs,
        prepared=[n.name for n in border],
        step=step,
        step_inputs=step_inputs,
    )


def _early(program: Program) -> set[fx.Node]:
    """Nodes that can run while loading."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            early = program.inputs[node.name].role in ("weight", "constant")
        else:
            early = _hoistable(node) and all(i in known for i in node.all_input_nodes)
        if early:
            known.add(node)
    return known


def _hoistable(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True  # of an op with several results; whether that one runs early decides
    if not isinstance(target, torch._ops.OpOverload) or target in _KEEP_IN_STEP:
        return False
    value = node.meta["val"]
    results = value if isinstance(value, (tuple, list)) else [value]
    random = torch.Tag.nondeterministic_seeded in target.tags
    return (
        all(isinstance(result, torch.Tensor) for result in results)
        and not random
        and not target._schema.is_mutable
    )


def _step_graph(
    program: Program, early: set[fx.Node], border: list[fx.Node]
) -> tuple[fx.Graph, dict[str, Input]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: dict[str, Input] = {}
    for node in program.placeholders("step") + program.placeholders("cache"):
        copies[node] = _placeholder(graph, node)
        inputs[node.name] = program.inputs[node.name]
    for node in border:
        copies[node] = _placeholder(graph, node)
        inputs[node.name] = Input(role="weight", source=node.name)
    for node in program.graph.nodes:
        if node.op != "placeholder" and node not in early:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph, inputs


def _load_graph(program: Program, border: list[fx.Node]) -> tuple[fx.Graph, dict[str, Input]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: dict[str, Input] = {}
    # What is large comes first: its source is held as well while there is room for that.
    for last in sorted(border, key=lambda n: n.meta["val"].nbytes, reverse=True):
        for node in _post_order(last, copies):
            if node.op == "placeholder":
                copies[node] = _placeholder(graph, node)
                inputs[node.name] = program.inputs[node.name]
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in border))
    return graph, inputs


def _post_order(root: fx.Node, done: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """``root`` and what it needs that is not done yet, inputs first (no recursion)."""
    result: list[fx.Node] = []
    placed: set[fx.Node] = set()
    todo: list[tuple[fx.Node, bool]] = [(root, False)]
    while todo:
        node, ready = todo.pop()
        if node in done or node in placed:
            continue
        if ready:
            placed.add(node)
            result.append(node)
        else:
            todo.append((node, True))
            todo.extend((i, False) for i in reversed(node.all_input_nodes))
    return result


def _placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    copy = graph.placeholder(node.name)
    copy.meta = dict(node.meta)
    assert copy.name == node.name, (copy.name, node.name)
    return copy

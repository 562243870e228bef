"""liveness: peaks that can be worked out by hand."""

from __future__ import annotations

import torch
from torch import fx

from fxlm.compiler.liveness import peak_bytes
from fxlm.compiler.program import new_fake_mode

aten = torch.ops.aten


def build(*ops: object) -> fx.Graph:
    graph = fx.Graph()
    mode = new_fake_mode()
    with mode:
        node = graph.placeholder("x")
        node.meta["val"] = torch.empty(100)
        for op in ops:
            node, value = graph.call_function(op, (node,)), op(node.meta["val"])
            node.meta["val"] = value
        graph.output((node,))
    return graph


def test_a_chain_holds_input_and_output_of_one_op() -> None:
    assert peak_bytes(build(aten.neg.default, aten.abs.default, aten.neg.default), {}) == 800


def test_views_cost_nothing() -> None:
    assert peak_bytes(build(aten.neg.default, aten.detach.default, aten.detach.default), {}) == 400


def test_inputs_are_not_counted() -> None:
    assert peak_bytes(build(aten.detach.default), {}) == 0


def test_two_nodes_of_one_value_are_two() -> None:
    graph = build(aten.neg.default, aten.abs.default)
    first, second = [n for n in graph.nodes if n.op == "call_function"]
    second.meta["val"] = first.meta["val"]  # as in copies of equal layers
    assert peak_bytes(graph, {}) == 800

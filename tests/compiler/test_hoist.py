"""hoist: what depends on weights alone leaves the step graph."""

from __future__ import annotations

import operator

import torch

from fxlm.compiler import pipeline
from fxlm.compiler.hoist import hoist
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_qkv import fuse_qkv
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.paged_attention import paged_attention
from fxlm.passes.sample import sample
from tests.programs import captured

COLUMN = [cleanup, fuse_qkv, paged_attention, last_tokens, sample]


def test_concatenated_weights_are_made_while_loading() -> None:
    cut = hoist(pipeline.run(captured(), COLUMN))
    loads = [n for n in cut.load.nodes if n.target is torch.ops.aten.cat.default]
    weights = {n for n in cut.step.nodes if n.op == "placeholder"}
    assert len(loads) == 2
    merged = [n for n in cut.step.nodes if n.target is torch.ops.aten.linear.default]
    assert all(n.args[1] in weights for n in merged)


def test_the_step_takes_prepared_weights_under_their_names() -> None:
    cut = hoist(pipeline.run(captured(), COLUMN))
    sources = [s.source for s in cut.step_inputs.values() if s.role == "weight"]
    assert sources == cut.prepared


def test_inputs_of_a_later_node_are_read_after_an_earlier_one() -> None:
    cut = hoist(pipeline.run(captured(), COLUMN))
    nodes = list(cut.load.nodes)
    first, second = (n for n in nodes if n.target is torch.ops.aten.cat.default)
    assert all(nodes.index(first) < nodes.index(i) for i in second.all_input_nodes)


def test_expanded_weights_stay_views_in_the_step() -> None:
    program = pipeline.run(captured(), [cleanup])
    weight = program.linears()[0].args[1]
    first = program.linears()[0]
    with program.graph.inserting_before(first):
        wide = program.call(torch.ops.aten.expand.default, weight, [3, -1, -1], like=first)
        one = program.call(torch.ops.aten.select.int, wide, 0, 1, like=first)
    first.args = (first.args[0], one)
    pipeline.run(program, [paged_attention, last_tokens, sample])
    cut = hoist(program)
    assert any(n.target is torch.ops.aten.expand.default for n in cut.step.nodes)


def test_ops_with_several_results_run_while_loading() -> None:
    program = pipeline.run(captured(), [cleanup])
    linear = program.linears()[0]
    with program.graph.inserting_before(linear):
        parts = program.call(torch.ops.aten.split.Tensor, linear.args[1], 32, like=linear)
        first = program.call(operator.getitem, parts, 0, like=linear)
        second = program.call(operator.getitem, parts, 1, like=linear)
        again = program.call(torch.ops.aten.cat.default, [first, second], 0, like=linear)
    linear.args = (linear.args[0], again)
    pipeline.run(program, [paged_attention, last_tokens, sample])
    cut = hoist(program)
    early = {n.target for n in cut.load.nodes}
    assert {torch.ops.aten.split.Tensor, operator.getitem} <= early
    assert torch.ops.aten.split.Tensor not in {n.target for n in cut.step.nodes}

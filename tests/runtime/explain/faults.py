"""Seeded faults, as passes: what `bisect` must find."""

from __future__ import annotations

import torch

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program

aten = torch.ops.aten


@graph_pass(after="cleanup")
def wrong_scale(program: Program) -> int:
    """A wrong pass: the second layer's MLP counts a tenth less."""
    return scale(program, 0.9)


@graph_pass(after="cleanup")
def five_percent(program: Program) -> int:
    """A wrong pass that half precision hides: that MLP counts 5 % less."""
    return scale(program, 0.95)


def scale(program: Program, factor: float) -> int:
    """Multiply what the second layer's MLP adds."""
    (node,) = program.linears(r"layers\.1\.mlp\.down_proj$")
    with program.graph.inserting_before(node.next):
        less = program.call(aten.mul.Scalar, node, factor, like=node)
    node.replace_all_uses_with(less, delete_user_cb=lambda user: user is not less)
    return 1


@graph_pass(after="fuse_gate_up")
def wrong_op(program: Program) -> int:
    """A wrong op: the first layer's gate goes through gelu instead of silu."""
    node = program.find(aten.silu.default)[0]
    with program.graph.inserting_before(node):
        new = program.call(aten.gelu.default, node.args[0], like=node)
    program.replace(node, new)
    return 1


@graph_pass(before="fuse_qkv")
def wrong_slice(program: Program) -> int:
    """A wrong weight slice: the second layer's k is bound from the wrong rows."""
    (node,) = program.linears(r"layers\.1\.self_attn\.k_proj$")
    weight = node.args[1]
    with program.graph.inserting_before(node):
        parts = [
            program.call(aten.slice.Tensor, weight, 0, begin, end, like=node)
            for begin, end in ((1, 2**63 - 1), (0, 1))
        ]
        turned = program.call(aten.cat.default, parts, 0, like=node)
    node.args = (node.args[0], turned, *node.args[2:])
    return 1


@graph_pass(after="fuse_gate_up")
def not_a_number(program: Program) -> int:
    """No number: the first layer's gate is the logarithm of a negative one."""
    node = program.find(aten.silu.default)[0]
    with program.graph.inserting_before(node):
        square = program.call(aten.square.default, node.args[0], like=node)
        below = program.call(
            aten.sub.Scalar, program.call(aten.neg.default, square, like=node), 1.0, like=node
        )
        new = program.call(aten.log.default, below, like=node)
    program.replace(node, new)
    return 1

"""One matmul for the gate and the up projection of a gated MLP.

before:  g = linear(x, wg); u = linear(x, wu); y = act(g) * u
after:   z = linear(x, cat([wg, wu])); y = act(z[..., :n]) * z[..., n:]

Any activation; found by the product whose two factors come from linears over one input.
Weights that serve in several places (layers run in a loop) are left alone, and so are those that
are quantized in different ways.
"""

from __future__ import annotations

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.passes.merge_linears import merge_linears
from fxlm.passes.quantized_weights import differing

aten = torch.ops.aten
LINEAR = aten.linear.default
ACTIVATIONS = (
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default,
    aten.tanh.default,
)  # fmt: skip


def _gated(program: Program) -> int:
    return len(_groups(program))


@graph_pass(expects=_gated)
def fuse_gate_up(program: Program) -> int:
    """Merge the two projections of each gated MLP; returns how many."""
    return sum(merge_linears(program, group) for group in _groups(program))


def _groups(program: Program) -> list[list[fx.Node]]:
    groups = []
    for product in program.find(aten.mul.Tensor):
        factors = [n for n in product.args if isinstance(n, fx.Node)]
        if len(factors) != 2:
            continue
        gates = [f for f in factors if f.target in ACTIVATIONS]
        ups = [f for f in factors if f.target is LINEAR]
        if len(gates) != 1 or len(ups) != 1:
            continue
        gate, up = gates[0].args[0], ups[0]
        if not isinstance(gate, fx.Node) or gate.target is not LINEAR:
            continue
        if gate.args[0] is not up.args[0] or differing([gate.args[1], up.args[1]]):
            continue
        if _serves_once(gate) and _serves_once(up):
            groups.append(sorted([gate, up]))
    return groups


def _serves_once(linear: fx.Node) -> bool:
    """Whether the weight has no other use; merged, it would be held twice."""
    weight = linear.args[1]
    return isinstance(weight, fx.Node) and len(weight.users) == 1

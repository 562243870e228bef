"""One matmul for q, k and v.

before:  q = linear(x, wq); k = linear(x, wk); v = linear(x, wv); ... attention(q', k', v')
after:   y = linear(x, cat([wq, wk, wv])); q, k, v = slices of y; ... attention(q', k', v')

Found from the attention op backwards: whatever stands between (norms, rotary, views) stays.
Fires once for all attentions whose q, k and v come from the same linears over one input, and
not for models that store them merged.
"""

from __future__ import annotations

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program, ancestors
from fxlm.passes.merge_linears import merge_linears
from fxlm.passes.quantized_weights import differing

LINEAR = torch.ops.aten.linear.default


def _mergeable(program: Program) -> int:
    return len(_groups(program))


@graph_pass(expects=_mergeable)
def fuse_qkv(program: Program) -> int:
    """Merge the projections of each attention; returns how many were merged."""
    return sum(merge_linears(program, group) for group in _groups(program))


def _groups(program: Program) -> list[list[fx.Node]]:
    """Groups to merge, each once: several attentions may read one projection.

    Left alone are weights that serve in several places (layers run in a loop): merged, each
    would be held twice. And weights that are quantized in different ways.
    """
    found = {tuple(group): group for group in map(_group, program.attentions()) if group}
    groups = [g for g in found.values() if all(len(_weight(n).users) == 1 for n in g)]
    return [g for g in groups if not differing([_weight(n) for n in g])]


def _group(attention: fx.Node) -> list[fx.Node]:
    """The linears that q, k and v come from if they share one input, in graph order."""
    sources = [n for n in attention.args[:3] if isinstance(n, fx.Node)]
    nearest = [_nearest_linears(source) for source in sources]
    if len(nearest) < 3 or any(len(linears) != 1 for linears in nearest):
        return []
    linears = {linear for part in nearest for linear in part}
    if len(linears) < 2 or len({linear.args[0] for linear in linears}) > 1:
        return []
    return sorted(linears)


def _nearest_linears(source: fx.Node) -> list[fx.Node]:
    """Linears reached from ``source`` without passing another one."""
    return [n for n in ancestors([source], stop=LINEAR) if n.target is LINEAR]


def _weight(linear: fx.Node) -> fx.Node:
    weight = linear.args[1]
    assert isinstance(weight, fx.Node), linear.format_node()
    return weight

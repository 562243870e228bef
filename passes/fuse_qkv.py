"""One matmul for q, k and v.

before:  q = linear(x, wq); k = linear(x, wk); v = linear(x, wv); ... attention(q', k', v')
after:   y = linear(x, cat([wq, wk, wv])); q, k, v = slices of y; ... attention(q', k', v')

Found from the attention op backwards: whatever stands between (norms, rotary, views) stays.
Fires once for every attention whose q, k and v come from linears over one input, and not for
models that store them merged.
"""

from __future__ import annotations

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program, ancestors
from fxlm.passes.merge_linears import merge_linears

LINEAR = torch.ops.aten.linear.default


def _separate(program: Program) -> int:
    return sum(len(_group(node)) > 1 for node in program.attentions())


@graph_pass(expects=_separate)
def fuse_qkv(program: Program) -> int:
    """Merge the projections of each attention; returns how many attentions."""
    return sum(
        merge_linears(program, group)
        for group in map(_group, program.attentions())
        if len(group) > 1
    )


def _group(attention: fx.Node) -> list[fx.Node]:
    """The nearest linears behind q, k and v that share the input of k's, in graph order."""
    sources = [n for n in attention.args[:3] if isinstance(n, fx.Node)]
    if len(sources) < 3:
        return []
    found = [_nearest_linears(source) for source in sources]
    if any(len(linears) != 1 for linears in found):
        return []
    linears = list(dict.fromkeys(linear for part in found for linear in part))
    shared = linears[-1].args[0]
    group = [n for n in linears if n.args[0] is shared]
    return sorted(group)


def _nearest_linears(source: fx.Node) -> list[fx.Node]:
    """Linears reached from ``source`` without passing another one."""
    return [n for n in ancestors([source], stop=LINEAR) if n.target is LINEAR]

"""Halve what each MLP adds to the residual stream."""

import torch

from fxlm import graph_pass
from fxlm.compiler.rewrite import wrap_linears


def half(program, y):
    return program.call(torch.ops.aten.mul.Scalar, y, 0.5, like=y)


@graph_pass(after="fuse_gate_up", expects=lambda program: program.facts.num_layers)
def halve_mlp(program):
    """before: y = down_proj(h)   after: y = down_proj(h) * 0.5"""
    return wrap_linears(program, r"mlp\.down_proj$", half)

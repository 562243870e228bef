"""A user pass: halve what each MLP adds to the residual stream."""

import torch

from fxlm import graph_pass


def mlp_outputs(program):
    return program.linears(r"mlp\.down_proj$")


@graph_pass(after="fuse_gate_up", expects=lambda program: len(mlp_outputs(program)))
def halve_mlp(program):
    """before: y = down_proj(h)   after: y = down_proj(h) * 0.5"""
    nodes = mlp_outputs(program)
    for node in nodes:
        with program.graph.inserting_before(node.next):
            half = program.call(torch.ops.aten.mul.Scalar, node, 0.5, like=node)
        node.replace_all_uses_with(half, delete_user_cb=lambda user, half=half: user is not half)
    return len(nodes)

"""A pass that comes with an installed package: logits twice as large."""

import torch

from fxlm import graph_pass
from fxlm.compiler.program import Program
from fxlm.compiler.rewrite import wrap_linears


@graph_pass(expects=1)
def louder(program: Program) -> int:
    """before: y = lm_head(h)   after: y = lm_head(h) * 2"""

    def twice(program, value):
        return program.call(torch.ops.aten.mul.Scalar, value, 2.0, like=value)

    return wrap_linears(program, r"^lm_head$", twice)

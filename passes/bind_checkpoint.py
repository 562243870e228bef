"""Bind the model's parameters to the tensors of a checkpoint.

before:  p_model_embed_tokens_weight: bf16 [V, H]            (a parameter)
after:   w_model_embed_tokens_weight: fp16 [V, H]            (a tensor of the file)
         to = aten.to.dtype(w_model_embed_tokens_weight, bf16)

Renames, stacked experts, transposes and casts become graph code on the weight side, so they
run once, while loading. Not here: the rules themselves, which `models` knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxlm.compiler.errors import PassError
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.compiler.weights import Convert, graft_weights

RawTensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@graph_pass(stage="bound")
def bind_checkpoint(program: Program, *, convert: Convert, raw: RawTensors) -> int:
    """Replace every parameter input by code over raw tensors.

    Args:
        convert: from raw tensors to parameters and persistent buffers, by qualified name.
        raw: dtype and shape of each raw tensor.

    Returns:
        Number of inputs bound.
    """
    parameters = program.placeholders("weight") + program.placeholders("constant")
    values = graft_weights(program, convert, raw)
    bound = 0
    for node in parameters:
        spec = program.inputs[node.name]
        value = values.get(spec.source)
        if value is None:
            if spec.role == "weight":
                raise PassError(f"no tensor of the checkpoint gives {spec.source}")
            continue
        node.replace_all_uses_with(_cast(program, value, node))
        bound += 1
    return bound


def _cast(program: Program, value: fx.Node, parameter: fx.Node) -> fx.Node:
    have: Any = value.meta["val"]
    want: Any = parameter.meta["val"]
    if tuple(have.shape) != tuple(want.shape):
        source = program.inputs[parameter.name].source
        raise PassError(f"{source} is {list(want.shape)}, the checkpoint has {list(have.shape)}")
    if have.dtype == want.dtype:
        return value
    anchor = value if value.op == "call_function" else program.placeholders()[-1]
    with program.graph.inserting_after(anchor):
        return program.call(torch.ops.aten.to.dtype, value, want.dtype, like=parameter)

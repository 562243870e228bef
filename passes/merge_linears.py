"""Merge linears that share their input; the common part of `fuse_qkv` and `fuse_gate_up`.

before:  a = linear(x, wa); b = linear(x, wb)
after:   w = cat([wa, wb]); y = linear(x, w); a = slice(y, 0, na); b = slice(y, na, na + nb)

Quantized weights of one kind are merged in quantized form: dequantize(cat([a, b]), ...).

The concatenation is graph code on the weight side, so `hoist` moves it to load time. A linear
is left alone if its weight depends on tokens or serves elsewhere too (the parts would then be
held twice). A linear without bias among others with one gets zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxlm.compiler.program import Program
from fxlm.compiler.values import is_effect
from fxlm.passes.quantized_weights import concatenate, differing

aten = torch.ops.aten


def merge_linears(program: Program, group: list[fx.Node]) -> bool:
    """Merge one group, in place.

    Args:
        group: ``aten.linear`` calls in graph order.

    Returns:
        Whether it was merged; if not, the reason is noted as a miss.
    """
    reason = _obstacle(program, group)
    if reason:
        program.miss(group[-1], reason)
        return False
    first = group[0]
    weights = [n.args[1] for n in group]
    with program.graph.inserting_before(first):
        weight = concatenate(program, weights, first)
        bias = _merged_bias(program, group)
        merged = program.call(aten.linear.default, first.args[0], weight, *bias, like=first)
        begin = 0
        for node in group:
            end = begin + int(node.meta["val"].shape[-1])
            part = program.call(aten.slice.Tensor, merged, -1, begin, end, like=node)
            node.replace_all_uses_with(part)
            begin = end
    for node in group:
        program.graph.erase_node(node)
    return True


def _merged_bias(program: Program, group: list[fx.Node]) -> list[fx.Node]:
    """The biases as one, in a list; an empty list if none of the group has one."""
    given = [n.args[2] if len(n.args) > 2 else None for n in group]
    known = next((b for b in given if b is not None), None)
    if known is None:
        return []
    first = group[0]
    parts = [
        program.call(aten.new_zeros.default, known, [int(n.meta["val"].shape[-1])], like=first)
        if bias is None
        else bias
        for n, bias in zip(group, given, strict=True)
    ]
    return [program.call(aten.cat.default, parts, 0, like=first)]


def _obstacle(program: Program, group: list[fx.Node]) -> str:
    """Why the group cannot be merged; empty if it can."""
    if any(n.args[0] is not group[0].args[0] for n in group):
        return "the linears have different inputs"
    for node in group:
        weight: Any = node.args[1]
        if not _is_weight_only(program, weight):
            return "a weight depends on tokens"
        if len(weight.users) != 1:
            return "a weight is used elsewhere too"
    if len({n.args[1].meta["val"].dtype for n in group}) > 1:  # type: ignore[union-attr]
        return "the weights have different types"
    return differing([node.args[1] for node in group])


def _is_weight_only(program: Program, node: fx.Node) -> bool:
    """Whether one node depends on weights and constants alone; looks at what it needs."""
    seen, ahead = {node}, [node]
    while ahead:
        found = ahead.pop()
        if found.op == "placeholder":
            if program.inputs[found.name].role not in ("weight", "constant"):
                return False
        elif found.op != "call_function" or not found.all_input_nodes or is_effect(found):
            return False
        new = [i for i in found.all_input_nodes if i not in seen]
        seen.update(new)
        ahead += new
    return True

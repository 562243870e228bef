"""Linear layers that read quantized weights as they are.

before:  y = linear(x, fxlm.dequantize(codes, scale, offset, table, bits, [rows, group], ...), b)
after:   p = fxlm.pack_codes(codes, bits); s, o = fxlm.pack_scale(scale), fxlm.pack_scale(offset)
         y = fxlm.quantized_linear(x, p, s, o, table, b, n, bits, group, activation)

Packing depends on weights alone, so `hoist` moves it to load time. An embedding over the same
weight reads rows of the one packed copy (`fxlm::quantized_rows`). What cannot be fused stays
dequantized while loading, which is right, but as large as a dense weight: experts (three
dimensions), groups that the kernels do not take, weights that serve other ops too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.passes.quantized_weights import Quantized, quantized

aten = torch.ops.aten
ops = torch.ops.fxlm
LINEAR = aten.linear.default
EMBEDDING = aten.embedding.default
PLACES: dict[Any, int] = {LINEAR: 1, EMBEDDING: 0}  # of the weight among an op's arguments
GROUP_STEP = 16  # the kernels take groups that are multiples of it


def _fusable(program: Program) -> int:
    return sum(not _obstacle(node) for node in program.find(ops.dequantize.default))


@graph_pass(after=("quantize", "fuse_qkv", "fuse_gate_up", "sample"), expects=_fusable, last=True)
def fuse_quantized_linear(program: Program) -> int:
    """Fuse each quantized weight into the linears over it; returns how many weights."""
    fused = 0
    for node in program.find(ops.dequantize.default):
        reason = _obstacle(node)
        if reason:
            program.miss(node, f"stays dequantized: {reason}")
            continue
        weight = quantized(node)
        assert weight is not None, node.format_node()
        packed = _pack(program, node, weight)
        for user in list(node.users):
            _replace(program, user, weight, packed)
        fused += 1
    return fused


def _obstacle(node: fx.Node) -> str:
    """Why a quantized weight cannot be fused; empty if it can."""
    weight = quantized(node)
    assert weight is not None, node.format_node()
    if len(weight.shape) != 2:
        return f"it has {len(weight.shape)} dimensions"
    group = _group(weight)
    if group % GROUP_STEP:
        return f"groups of {group} inputs are no multiple of {GROUP_STEP}"
    if not any(user.target is LINEAR for user in node.users):
        return "no linear layer uses it"
    for user in node.users:
        place = PLACES.get(user.target)
        uses = sum(a is node for a in (*user.args, *user.kwargs.values()))
        if place is None or user.args[place] is not node or uses != 1:
            return f"it serves {user.target} too"
    return ""


def _group(weight: Quantized) -> int:
    """Inputs that share a scale; 0: all."""
    columns = weight.block[1]
    return 0 if columns >= weight.shape[1] else columns


def _pack(program: Program, node: fx.Node, weight: Quantized) -> list[fx.Node | None]:
    """Packed codes, scale and offset, right behind the weight: an embedding may come early."""
    outputs, rows = weight.shape[0], weight.block[0]
    with program.graph.inserting_before(node.next):
        given = (weight.codes, weight.bits, weight.table is not None)
        codes = program.call(ops.pack_codes.default, *given, like=node)
        scales = [
            None if s is None else program.call(ops.pack_scale.default, s, outputs, rows, like=node)
            for s in (weight.scale, weight.offset)
        ]
    return [codes, *scales, weight.table]


def _replace(
    program: Program, user: fx.Node, weight: Quantized, packed: list[fx.Node | None]
) -> None:
    shared: tuple[Any, ...] = (weight.bits, _group(weight))
    with program.graph.inserting_before(user):
        if user.target is LINEAR:
            x, _, *rest = user.args
            bias = rest[0] if rest else user.kwargs.get("bias")
            args = (x, *packed, bias, weight.shape[0], *shared, weight.activation)
            new = program.call(ops.quantized_linear.default, *args, like=user)
        else:
            args = (*packed, user.args[1], weight.shape[1], *shared, weight.dtype)
            new = program.call(ops.quantized_rows.default, *args, like=user)
    program.replace(user, new)

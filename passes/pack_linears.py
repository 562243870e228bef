"""Linear layers over weights that lie in panels, so that a step reads them as one stream.

before:  y = linear(x, w, b)                                   w [N, K]
after:   p = fxlm.pack_weight(w); y = fxlm.packed_linear(x, p, b, N)

The packing depends on weights alone, so `hoist` moves it to load time. A tied embedding reads its
rows out of the same copy:

before:  e = embedding(w, ids)
after:   e = fxlm.packed_rows(p, ids, K)

The layout is that of `fxlm.compiler.ops.linear`. A linear is left alone if its weight depends on
tokens, has another type than x, or serves other ops too (it would then be held twice).

In the column only where it pays (`fxlm.runtime.compile.packing`): on a CPU with our kernels, in
bfloat16 or float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program

aten = torch.ops.aten
ops = torch.ops.fxlm

LINEAR = aten.linear.default
EMBEDDING = aten.embedding.default
DTYPES = (torch.bfloat16, torch.float32)


def _packable(program: Program) -> int:
    fixed = program.weight_only()
    return sum(not _obstacle(node, fixed) for node in program.find(LINEAR))


@graph_pass(
    after=("fuse_qkv", "fuse_gate_up", "sample", "fuse_quantized_linear"),
    expects=_packable,
    last=True,
)
def pack_linears(program: Program) -> int:
    """Replace each linear over a weight; returns how many."""
    fixed = program.weight_only()
    nodes = program.find(LINEAR)
    reasons = {node: _obstacle(node, fixed) for node in nodes}
    packed: dict[fx.Node, fx.Node] = {}
    for node, reason in reasons.items():
        if reason:
            program.miss(node, reason)
            continue
        weight: Any = node.args[1]
        if weight not in packed:
            packed[weight] = _pack(program, weight, node)
        _replace_linear(program, node, packed[weight])
    for weight, panels in packed.items():
        for user in [u for u in weight.users if u.target is EMBEDDING]:
            _replace_embedding(program, user, panels)
    return sum(not reason for reason in reasons.values())


def _obstacle(node: fx.Node, fixed: set[fx.Node]) -> str:
    """Why a linear cannot be packed; empty if it can."""
    x: Any = node.args[0]
    weight: Any = node.args[1]
    if weight not in fixed:
        return "the weight depends on tokens"
    value = weight.meta["val"]
    if value.dim() != 2 or value.dtype not in DTYPES or value.dtype != x.meta["val"].dtype:
        return f"the weight is {value.dtype} with {value.dim()} dimensions"
    for user in weight.users:
        if user.target not in (LINEAR, EMBEDDING) or _uses(user, weight) != 1:
            return f"the weight serves {user.target} too"
        if user.target is EMBEDDING and user.args[0] is not weight:
            return "the weight serves as indices"
        if user.target is LINEAR and user.args[1] is not weight:
            return "the weight serves as an input too"
        if user.target is LINEAR and user.args[0].meta["val"].dtype != value.dtype:
            return "the weight serves inputs of several types"
    return ""


def _uses(user: fx.Node, weight: fx.Node) -> int:
    return sum(argument is weight for argument in (*user.args, *user.kwargs.values()))


def _pack(program: Program, weight: fx.Node, like: fx.Node) -> fx.Node:
    """The packing, right behind what makes the weight: an embedding may come early."""
    last = program.placeholders()[-1]
    with program.graph.inserting_before(last.next if weight.op == "placeholder" else weight.next):
        return program.call(ops.pack_weight.default, weight, like=like)


def _replace_linear(program: Program, node: fx.Node, panels: fx.Node) -> None:
    x, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    outputs = int(weight.meta["val"].shape[0])  # type: ignore[union-attr]
    with program.graph.inserting_before(node):
        new = program.call(ops.packed_linear.default, x, panels, bias, outputs, like=node)
    program.replace(node, new)


def _replace_embedding(program: Program, node: fx.Node, panels: fx.Node) -> None:
    weight, ids = node.args[:2]
    inputs = int(weight.meta["val"].shape[1])  # type: ignore[union-attr]
    with program.graph.inserting_before(node):
        new = program.call(ops.packed_rows.default, panels, ids, inputs, like=node)
    program.replace(node, new)

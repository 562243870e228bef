"""Linear layers over weights that lie in panels, so that a step reads them as one stream.

before:  y = linear(x, w, b)                                   w [N, K]
after:   p = fxlm.pack_weight(w); y = fxlm.packed_linear(x, p, b, N)

before:  y = addmm(b, x, w)                                    w [K, N]: the Conv1D of GPT-2
after:   p = fxlm.pack_weight(t(w)); y = fxlm.packed_linear(x, p, b, N)

before:  y = fxlm.grouped_linear(x, w, offsets)                w [E, N, K]: experts
after:   p = fxlm.pack_weight(w); y = fxlm.packed_grouped_linear(x, p, offsets, N)

The packing depends on weights alone, so `hoist` moves it to load time. A tied embedding reads its
rows out of the same copy:

before:  e = embedding(w, ids)
after:   e = fxlm.packed_rows(p, ids, K)

The layout is that of `fxlm.compiler.ops.linear`. A layer is left alone if its weight depends on
tokens, has another type than x, or serves other ops too (it would then be held twice).

In the column only where it pays (`fxlm.runtime.front.packing`): on a CPU with our kernels, in
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
ADDMM = aten.addmm.default
EMBEDDING = aten.embedding.default
DTYPES = (torch.bfloat16, torch.float32)


def _layers(program: Program) -> list[fx.Node]:
    return program.find(LINEAR, ADDMM, ops.grouped_linear.default)


def _packable(program: Program) -> int:
    fixed = program.weight_only()
    return sum(not _obstacle(node, fixed) for node in _layers(program))


@graph_pass(
    after=("fuse_qkv", "fuse_gate_up", "sample", "fuse_quantized_linear"),
    expects=_packable,
    last=True,
)
def pack_linears(program: Program) -> int:
    """Replace each layer over a weight; returns how many."""
    fixed = program.weight_only()
    reasons = {node: _obstacle(node, fixed) for node in _layers(program)}
    packed: dict[fx.Node, fx.Node] = {}
    for node, reason in reasons.items():
        if reason:
            program.miss(node, reason)
            continue
        weight = _weight(node)
        if weight not in packed:
            packed[weight] = _pack(program, weight, node)
        _replace_layer(program, node, packed[weight])
    for weight, panels in packed.items():
        for user in [u for u in weight.users if u.target is EMBEDDING]:
            _replace_embedding(program, user, panels)
    return sum(not reason for reason in reasons.values())


def _x(node: fx.Node) -> Any:
    return node.args[1 if node.target is ADDMM else 0]


def _weight(node: fx.Node) -> Any:
    return node.args[2 if node.target is ADDMM else 1]


def _is_grouped(node: fx.Node) -> bool:
    return node.target is ops.grouped_linear.default


def _obstacle(node: fx.Node, fixed: set[fx.Node]) -> str:
    """Why a layer cannot be packed; empty if it can."""
    weight = _weight(node)
    if weight not in fixed:
        return "the weight depends on tokens"
    value, dim = weight.meta["val"], 3 if _is_grouped(node) else 2
    if value.dim() != dim or value.dtype not in DTYPES or value.dtype != _x(node).meta["val"].dtype:
        return f"the weight is {value.dtype} with {value.dim()} dimensions"
    if node.target is ADDMM and (obstacle := _addmm_obstacle(node)):
        return obstacle
    for user in weight.users:
        if obstacle := _use_obstacle(user, weight, node.target):
            return obstacle
    return ""


def _addmm_obstacle(node: fx.Node) -> str:
    bias: Any = node.args[0]
    shape = bias.meta["val"].shape
    if len(shape) != 1 or shape[0] != _weight(node).meta["val"].shape[1] or node.kwargs:
        return "it adds more than a bias"
    return ""


def _use_obstacle(user: fx.Node, weight: fx.Node, target: Any) -> str:
    """Why a use of the weight keeps it from being packed for ``target``."""
    embeds = user.target is EMBEDDING and target is LINEAR
    if (user.target is not target and not embeds) or _uses(user, weight) != 1:
        return f"the weight serves {user.target} too"
    if embeds:
        return "" if user.args[0] is weight else "the weight serves as indices"
    if _weight(user) is not weight:
        return "the weight serves as an input too"
    if _x(user).meta["val"].dtype != weight.meta["val"].dtype:
        return "the weight serves inputs of several types"
    return ""


def _uses(user: fx.Node, weight: fx.Node) -> int:
    return sum(argument is weight for argument in (*user.args, *user.kwargs.values()))


def _pack(program: Program, weight: fx.Node, like: fx.Node) -> fx.Node:
    """The packing, right behind what makes the weight: an embedding may come early."""
    last = program.placeholders()[-1]
    with program.graph.inserting_before(last.next if weight.op == "placeholder" else weight.next):
        if like.target is ADDMM:
            weight = program.call(aten.t.default, weight, like=like)
        return program.call(ops.pack_weight.default, weight, like=like)


def _replace_layer(program: Program, node: fx.Node, panels: fx.Node) -> None:
    value = _weight(node).meta["val"]
    outputs = int(value.shape[-1] if node.target is ADDMM else value.shape[-2])
    with program.graph.inserting_before(node):
        if _is_grouped(node):
            args = (_x(node), panels, node.args[2], outputs)
            new = program.call(ops.packed_grouped_linear.default, *args, like=node)
        else:
            args = (_x(node), panels, _bias(node), outputs)
            new = program.call(ops.packed_linear.default, *args, like=node)
    program.replace(node, new)


def _bias(node: fx.Node) -> Any:
    if node.target is ADDMM:
        return node.args[0]
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _replace_embedding(program: Program, node: fx.Node, panels: fx.Node) -> None:
    weight, ids = node.args[:2]
    inputs = int(weight.meta["val"].shape[1])  # type: ignore[union-attr]
    with program.graph.inserting_before(node):
        new = program.call(ops.packed_rows.default, panels, ids, inputs, like=node)
    program.replace(node, new)

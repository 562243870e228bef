"""Rotary embeddings half by half, in the order in which tokens lie.

before:  y = x * cos + cat([-x[..., n:], x[..., :n]]) * sin        x = transpose(v, 1, 2)
after:   y = transpose(cat([v[..., :n] * cos[..., :n] + -v[..., n:] * sin[..., :n],
                            v[..., n:] * cos[..., n:] + v[..., :n] * sin[..., n:]]), 1, 2)

The same numbers. Before, the swapped halves of q and k are written to memory and read again, head
by head, which takes strides of a whole token; after, each half is computed where it belongs, token
by token. The two transposes are left out where something else than attention reads y.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.passes.merged_linears import bounds_of

aten = torch.ops.aten


class _Rope(NamedTuple):
    """What a sum rotates, and by what; ``half`` is the width of a half."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    half: int


def _rotated(program: Program) -> int:
    return sum(_rope(node) is not None for node in program.find(aten.add.Tensor))


@graph_pass(after="paged_attention", expects=_rotated, last=True)
def split_rope(program: Program) -> int:
    """Compute each rotary embedding in halves; returns how many."""
    cut: dict[tuple[fx.Node, bool], list[fx.Node]] = {}  # q and k share cos and sin

    def halves(node: fx.Node, size: int, swap: bool) -> list[fx.Node]:
        if (node, swap) not in cut:
            cut[node, swap] = _halves(program, node, size, swap)
        return cut[node, swap]

    rewritten, attentions = 0, set(program.attentions())
    for total in program.find(aten.add.Tensor):
        rope = _rope(total)
        if rope is None:
            continue
        swap = attentions.issuperset(total.users) and all(
            node.meta["val"].dim() == 4 for node in (rope.x, rope.cos, rope.sin)
        )
        (low, high), cos, sin = (
            halves(node, rope.half, swap) for node in (rope.x, rope.cos, rope.sin)
        )
        with program.graph.inserting_before(total):
            minus = program.call(aten.neg.default, high, like=total)
            result = program.call(aten.cat.default, [
                _sum(program, (low, cos[0]), (minus, sin[0]), total),
                _sum(program, (high, cos[1]), (low, sin[1]), total),
            ], -1, like=total)  # fmt: skip
            if swap:
                result = program.call(aten.transpose.int, result, 1, 2, like=total)
        program.replace(total, result)
        rewritten += 1
    return rewritten


def _halves(program: Program, node: fx.Node, size: int, swap: bool) -> list[fx.Node]:
    """Views of both halves of the last dimension, made where the node is."""
    with program.graph.inserting_before(node.next):
        if swap:
            node = program.call(aten.transpose.int, node, 1, 2, like=node)
        bounds = ((0, size), (size, 2 * size))
        return [program.call(aten.slice.Tensor, node, -1, *b, like=node) for b in bounds]


def _sum(
    program: Program,
    left: tuple[fx.Node, fx.Node],
    right: tuple[fx.Node, fx.Node],
    like: fx.Node,
) -> fx.Node:
    products = [program.call(aten.mul.Tensor, *pair, like=like) for pair in (left, right)]
    return program.call(aten.add.Tensor, *products, like=like)


def _rope(total: fx.Node) -> _Rope | None:
    """What a sum rotates, if it is a rotary embedding whose halves are apart."""
    products = [n for n in total.args if isinstance(n, fx.Node) and n.target is aten.mul.Tensor]
    if len(products) != 2 or len(total.args) != 2 or total.kwargs:
        return None
    for plain, swapped in (products, products[::-1]):
        for turned, sin in _factors(swapped):
            found = _turned(turned)
            for x, cos in _factors(plain):
                if found is not None and x is found[0] and _wide(cos, x) and _wide(sin, x):
                    return _Rope(x, cos, sin, found[1])
    return None


def _factors(product: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The two factors, either way round; nothing if one is a number."""
    if not all(isinstance(factor, fx.Node) for factor in product.args):
        return []
    left, right = product.args
    return [(left, right), (right, left)]  # type: ignore[list-item]


def _wide(factor: fx.Node, x: fx.Node) -> bool:
    """Whether a factor has a value for each element of the last dimension."""
    shape: Any = getattr(factor.meta["val"], "shape", ())
    return len(shape) > 0 and bool(shape[-1] == x.meta["val"].shape[-1])


def _turned(node: fx.Node) -> tuple[fx.Node, int] | None:
    """x and n, where a node is ``cat([-x[..., n:], x[..., :n]])`` and x is 2 n wide."""
    if node.target is not aten.cat.default or len(node.users) > 1:
        return None
    parts: Any = node.args[0]
    last = node.meta["val"].dim() - 1
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if len(parts) != 2 or dim % (last + 1) != last or parts[0].target is not aten.neg.default:
        return None
    high, low = parts[0].args[0], parts[1]
    if high.target is not aten.slice.Tensor or low.target is not aten.slice.Tensor:
        return None
    x = low.args[0]
    width = x.meta["val"].shape[-1]
    if high.args[0] is not x or not isinstance(width, int) or width % 2:
        return None
    bounds = [bounds_of(part, last, width) for part in (low, high)]
    half = width // 2
    return (x, half) if bounds == [(0, half), (half, width)] else None

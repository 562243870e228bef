"""Part linears whose output is only used in pieces; the opposite of `merge_linears`.

before:  y = linear(x, w [N, K]); a = y[..., :n]; b = y[..., n:]
after:   a = linear(x, w[:n]); b = linear(x, w[n:])

A checkpoint with q, k and v in one tensor has no rows that could be cut into equal parts; its
pieces have. `fuse_qkv` and `fuse_gate_up` join what is left of them. Not a pass: `shard` calls it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxlm.compiler.program import INT64_MAX, Program
from fxlm.passes.layout import sizes

aten = torch.ops.aten

LINEAR = aten.linear.default
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def part_merged_linears(program: Program) -> int:
    """Part every linear over a weight whose users take pieces of its features; returns how many."""
    fixed = program.weight_only()
    count = 0
    for node in program.linears():
        if node.args[1] in fixed:
            pieces = pieces_of(node)
            if len(pieces) > 1:
                _part(program, node, pieces)
                count += 1
    return count


def pieces_of(node: fx.Node) -> dict[fx.Node, tuple[int, int]]:
    """Users that are slices of the last dimension, with start and end; {} if others are there."""
    found: dict[fx.Node, tuple[int, int]] = {}
    last = len(sizes(node)) - 1
    width = sizes(node)[-1]
    for user in node.users:
        if user.target is aten.slice.Tensor and user.args[0] is node:
            bounds = bounds_of(user, last, width)
            if bounds is None:
                return {}
            found[user] = bounds
        elif user.target in _SPLITS and _along(user) % (last + 1) == last:
            if any(item.target is not operator.getitem for item in user.users):
                return {}
            widths = [int(value.shape[-1]) for value in user.meta["val"]]
            for item in user.users:
                index: Any = item.args[1]
                begin = sum(widths[:index])
                found[item] = (begin, begin + widths[index])
        else:
            return {}
    return found


def _along(node: fx.Node) -> int:
    given: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return int(given)


def bounds_of(node: Any, last: int, width: int) -> tuple[int, int] | None:
    """What a slice takes of the last dimension; None if it is another, or takes steps."""
    dim, start, end, step = [*node.args[1:], None, None, None, None][:4]
    if (dim or 0) % (last + 1) != last or step not in (None, 1):
        return None
    start, end = start or 0, width if end in (None, INT64_MAX) else end
    plain = isinstance(start, int) and isinstance(end, int) and 0 <= start < end
    return (start, min(end, width)) if plain else None


def _part(program: Program, node: Any, pieces: dict[fx.Node, tuple[int, int]]) -> None:
    x, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    for piece, (start, end) in pieces.items():
        with program.graph.inserting_before(node):
            rows = program.call(aten.slice.Tensor, weight, 0, start, end, like=node)
            terms = [] if bias is None else [
                program.call(aten.slice.Tensor, bias, 0, start, end, like=node)
            ]  # fmt: skip
            made = program.call(LINEAR, x, rows, *terms, like=node)
        program.replace(piece, made)

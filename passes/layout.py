"""How a value lies over the ranks, and where its dimensions go.

Here: `Layout`, and the arithmetic of shapes that `shard` needs. Not here: the rules of the ops.

    whole     every rank has all of it
    split     each rank has one of ``parts`` equal parts of dimension ``dim``; with fewer parts
              than ranks, neighbouring ranks have the same one (KV heads)
    partial   the sum over the ranks is the value
    rows      each row is right on one rank, and zero on the others (outputs of split experts)
    owned     each row is right on one rank, and anything on the others
    tokens    each rank has ceil(T / parts) of the T tokens along ``dim``; those that the last ranks
              lack are rows of their own, which nobody reads

``rows`` and ``owned`` have their rows in an order of the rank's own: they cannot be summed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

aten = torch.ops.aten

# Stands for a size that changes from step to step: prime, and larger than any width.
ANY_SIZE = 2**31 - 1

# Each element stays itself, up to its type; torch does not tag them as pointwise.
COPIES = (
    aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default,
    aten.detach.default, aten.alias.default,
)  # fmt: skip

Kind = Literal["whole", "split", "partial", "rows", "owned", "tokens"]


@dataclass(frozen=True, slots=True)
class Layout:
    """See the module; ``dim`` (not negative) and ``parts`` are those of a split or of tokens."""

    kind: Kind
    dim: int = -1
    parts: int = 0


WHOLE = Layout("whole")
PARTIAL = Layout("partial")
ROWS = Layout("rows")
OWNED = Layout("owned")


def split(dim: int, parts: int) -> Layout:
    """One of ``parts`` parts of dimension ``dim``."""
    return Layout("split", dim, parts)


def tokens(dim: int, parts: int) -> Layout:
    """One of ``parts`` shares of the step's tokens, which lie along ``dim``."""
    return Layout("tokens", dim, parts)


def sizes(node: Any) -> tuple[int, ...]:
    """Shape of a node's tensor as plain numbers; sizes that change are `ANY_SIZE`."""
    return tuple(number(size) for size in node.meta["val"].shape)


def number(size: Any) -> int:
    """A size as a plain number; every symbol counts as `ANY_SIZE`."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, ANY_SIZE)))


def viewed_dim(before: Sequence[int], after: Sequence[int], dim: int, parts: int) -> int | None:
    """Where ``parts`` parts of dimension ``dim`` are after a view; None if they are torn.

    What is outermost stays so: the dimension of the new shape with as many elements before it,
    if it can be cut into as many parts.
    """
    lead = math.prod(before[:dim])
    for place, size in enumerate(after):
        if math.prod(after[:place]) == lead and size % parts == 0 and size >= parts:
            return place
    return None


def is_pointwise(target: Any) -> bool:
    """Whether an op computes each element from the elements at its place."""
    if target in COPIES:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


_REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.linalg_vector_norm.default,
)
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def is_token_wise(node: Any, dim: int) -> bool:
    """Whether an op computes each index of ``dim`` from that index alone, and keeps its place.

    Args:
        node: a call.
        dim: of the operand that is split, not negative; dimensions behind it may be reduced.
    """
    if is_pointwise(node.target) or node.target is aten.type_as.default:
        return True
    if node.target not in (*_REDUCTIONS, *_NORMS):
        return False
    rank = len(node.args[0].meta["val"].shape)
    if node.target in _NORMS:
        return dim < rank - len(node.args[1])
    at = 2 if node.target is aten.linalg_vector_norm.default else 1
    given = node.args[at] if len(node.args) > at else None
    dims = given if isinstance(given, list | tuple) else []
    return len(dims) > 0 and all(d % rank > dim for d in dims)


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)

"""Sums split over the tokens: sequence parallelism, an option of `shard`.

before:  r = all_reduce(linear(o, wo)); h = x + r; y = norm(h)                [1, T, H] everywhere
after:   r = reduce_scatter(linear(o, wo)); h = x + r; y = norm(h)            [1, ceil(T / n), H]
         y = all_gather(y)                                                    [1, T, H]

A sum over the ranks that ops take token by token is made for a share of the tokens alone, and
what follows stays so until an op needs other tokens or is a linear, which then gets all of
them. An op is known by what it computes: element by element, or over dimensions behind that
of the tokens. Not here: the other layouts (`shard_rules`), which never see this one.

The last ranks' shares may have rows that are no tokens. They start as zeros, only ops of a row
alone see them, and the gather drops them.

Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxlm.passes.layout import (
    PARTIAL,
    WHOLE,
    Layout,
    is_pointwise,
    is_tensor,
    is_token_wise,
    tokens,
)
from fxlm.passes.shard_rules import replace, stays_partial
from fxlm.passes.sharder import Sharder


def apply(sharder: Sharder, node: fx.Node) -> Layout | None:
    """The layout of an op that runs token by token; any other one gets whole tokens, and None."""
    operands = [i for i in node.all_input_nodes if is_tensor(i)]
    held = [i for i in operands if sharder.layout(i).kind == "tokens"]
    waiting = [i for i in operands if sharder.layout(i) == PARTIAL]
    if not sharder.over_tokens or not (held or waiting):
        return None
    if not held:
        if not is_pointwise(node.target):
            return None
        if stays_partial(sharder, node, operands):
            return PARTIAL
    found = _layout(sharder, node, operands)
    if found is None:
        for operand in held:
            replace(sharder, node, operand, sharder.whole(operand))
        return None
    for operand in waiting:
        replace(sharder, node, operand, sharder.scattered(operand))
    return found


def _layout(sharder: Sharder, node: Any, operands: list[fx.Node]) -> Layout | None:
    """Where the tokens are in the result; None if the op cannot run on a share of them."""
    places: set[int | None] = set()
    for operand in operands:
        layout = sharder.layout(operand)
        rank = len(sharder.shape(operand))
        if layout.kind == "tokens":
            places.add(rank - layout.dim)
        elif layout == PARTIAL:
            dim = sharder.token_dim(operand)
            places.add(None if dim is None else rank - dim)
        elif layout != WHOLE:
            return None
    if len(places) != 1:
        return None
    (place,) = places
    if place is None:
        return None
    fits = all(_fits(sharder, node, operand, place) for operand in operands)
    longest = max(len(sharder.shape(operand)) for operand in operands)
    return tokens(longest - place, sharder.ranks) if fits else None


def _fits(sharder: Sharder, node: Any, operand: fx.Node, place: int) -> bool:
    """Whether an operand has a share of the tokens as well, or one row for all of them."""
    shape = sharder.shape(operand)
    if sharder.layout(operand) != WHOLE:
        return is_token_wise(node, len(shape) - place)
    return len(shape) < place or shape[-place] == 1

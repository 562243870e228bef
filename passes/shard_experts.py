"""Experts over the ranks: each rank sorts its own experts' rows to the front.

before:  ids = flat[argsort(flat)]; ends = sum(ids[None] <= arange(E)[:, None])
         y = grouped_linear(x, w [E, O, I], ends); y = y + bias[ids.clamp(max=E - 1)]
after:   own = (flat - first) % (E + 1); the same on own, with arange(E / n), and
         y = grouped_linear(x, w[first : first + E / n], ends)     other rows give zero
         y = y + cat(bias[first : ...], 0)[ids.clamp(max=E / n)]

The pattern is that of `fxlm.models.experts`. What it finds is marked ``owned``; the rules of
`shard_rules` carry that to where the rows are summed. Not here: those rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxlm.passes.layout import OWNED, ROWS
from fxlm.passes.sharder import Sharder

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Routing:
    """One router: what is sorted, the sort, sorted ids, and the list of experts."""

    flat: fx.Node
    order: fx.Node
    ids: fx.Node
    experts: fx.Node


def split_experts(sharder: Sharder) -> None:
    """Give each rank its share of the experts of every router that is found."""
    routers: dict[fx.Node, list[fx.Node]] = {}
    for node in sharder.program.find(torch.ops.fxlm.grouped_linear.default):
        routers.setdefault(node.args[2], []).append(node)  # type: ignore[arg-type]
    for ends, layers in routers.items():
        routing = _routing(ends)
        count = sharder.shape(ends)[0]
        if routing is None or any(n.args[1] not in sharder.fixed for n in layers):
            sharder.program.miss(ends, "these experts are not routed as fxlm.models.experts does")
            sharder.counts["experts whole"] += 1
            continue
        if count % sharder.ranks:
            raise sharder.refuse(ends, f"{count} experts do not divide")
        _split(sharder, routing, layers, count)


def _routing(ends: Any) -> _Routing | None:
    """The nodes of a router, from the ends of its groups; None if it is another one."""
    try:
        ids, experts = (side.args[0] for side in ends.args[0].args)
        flat, (order,) = ids.args
        fits = (
            ends.target is aten.sum.dim_IntList and ends.args[0].target is aten.le.Tensor
            and ids.target is aten.index.Tensor and experts.target is aten.arange.default
            and order.target is aten.argsort.stable and order.args[0] is flat
        )  # fmt: skip
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    return _Routing(flat, order, ids, experts) if fits else None


def _split(sharder: Sharder, routing: _Routing, layers: list[fx.Node], count: int) -> None:
    share = count // sharder.ranks
    flat, call = routing.flat, sharder.program.call
    dtype = flat.meta["val"].dtype
    first = sharder.constant(f"first_expert_of_{share}", sharder.rank * share, dtype)
    with sharder.program.graph.inserting_before(flat.next):
        moved = call(aten.sub.Tensor, flat, first, like=flat)
        # One more than there are experts: an id that means no expert stays behind all of them.
        own = call(aten.remainder.Scalar, moved, count + 1, like=flat)
    sharder.layouts[own] = OWNED
    routing.order.replace_input_with(flat, own)
    routing.ids.replace_input_with(flat, own)
    routing.experts.update_arg(0, share)
    sharder.layouts[routing.experts] = OWNED
    for node in layers:
        node.update_arg(1, sharder.cut(node.args[1], 0, sharder.ranks))  # type: ignore[arg-type]
    _split_biases(sharder, routing, count, share)
    sharder.counts["experts"] += 1
    sharder.counts["experts a rank"] = share


def _split_biases(sharder: Sharder, routing: _Routing, count: int, share: int) -> None:
    """A row looks its expert's bias up; the rows of other ranks find a zero behind ours."""
    for clamp in list(routing.ids.users):
        if clamp.target is not aten.clamp.default or clamp.kwargs.get("max", clamp.args[-1]) != (
            count - 1
        ):
            continue
        clamp.args, clamp.kwargs = (routing.ids, None, share), {}
        for lookup in list(clamp.users):
            table: Any = lookup.args[0]
            if lookup.target is not aten.index.Tensor or table not in sharder.fixed:
                raise sharder.refuse(lookup, "it uses the number of a row's expert")
            part = sharder.cut(table, 0, sharder.ranks)
            lookup.update_arg(0, sharder.parts.padded(part, share + 1))
            sharder.layouts[lookup] = ROWS

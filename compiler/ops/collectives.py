"""Collectives: sums and gathers over the ranks that run one model together.

Here: the ops ``fxlm::all_reduce``, ``fxlm::reduce_scatter`` and ``fxlm::all_gather``, which name
the group that they run over, and `use_group`, which says what stands behind a name in this
process. Ops of ours rather than ``_c10d_functional``: those find a group by a name that
torch.distributed makes up at run time, which no artifact can know. Not here: starting ranks
(`fxlm.runtime.parallel`), placing the ops (`fxlm.passes.shard`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import fx

    from fxlm.compiler.program import Program

TENSOR_GROUP = "tp"  # the ranks that hold parts of the same layers

_library = torch.library.Library("fxlm", "FRAGMENT")
_library.define("all_reduce(Tensor x, str group) -> Tensor")
_library.define("reduce_scatter(Tensor x, int dim, int size, str group) -> Tensor")
_library.define("all_gather(Tensor x, int dim, int size, SymInt length, str group) -> Tensor")


class Group(Protocol):
    """Ranks that call the same collectives in the same order; x is contiguous."""

    @property
    def rank(self) -> int: ...

    def all_reduce(self, x: Tensor) -> None:
        """Sum over the ranks, in place."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum over the ranks of [size, ...]; gives this rank's entry."""
        ...

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """What each rank gave, in order of ranks."""
        ...


_groups: dict[str, Group] = {}


def use_group(name: str, group: Group | None) -> None:
    """Let ``group`` stand behind ``name`` in this process; None forgets it."""
    if group is None:
        _groups.pop(name, None)
    else:
        _groups[name] = group


def _group(name: str) -> Group:
    found = _groups.get(name)
    assert found is not None, f"no group {name!r} in this process: the ranks were not started"
    return found


def all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum ``x`` over the ranks; every rank gets it."""
    total = x.clone(memory_format=torch.contiguous_format)
    _group(group).all_reduce(total)
    return total


def reduce_scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Sum ``x`` over ``size`` ranks; rank r keeps part r of ``dim``.

    Parts have ceil(length / size) indices; what the last ones lack is zero.
    """
    part = -(-x.shape[dim] // size)
    padded = x.new_zeros(_resized(x, dim, part * size))
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    return _group(group).reduce_scatter(torch.stack(padded.chunk(size, dim)))


def all_gather(x: Tensor, dim: int, size: int, length: int, group: str) -> Tensor:
    """Join the parts of ``size`` ranks along ``dim``; keep the first ``length`` indices."""
    parts = _group(group).all_gather(x.contiguous())
    assert len(parts) == size, (len(parts), size)
    whole = torch.cat(parts, dim)
    return whole if whole.shape[dim] == length else whole.narrow(dim, 0, length).contiguous()


def _fake_all_reduce(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_reduce_scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    return x.new_empty(_resized(x, dim, (x.shape[dim] + size - 1) // size))


def _fake_all_gather(x: Tensor, dim: int, size: int, length: int, group: str) -> Tensor:
    return x.new_empty(_resized(x, dim, length))


def _resized(x: Tensor, dim: int, length: Any) -> list[Any]:
    return [length if d == dim % x.dim() else s for d, s in enumerate(x.shape)]


for _name, _kernel, _fake in (
    ("all_reduce", all_reduce, _fake_all_reduce),
    ("reduce_scatter", reduce_scatter, _fake_reduce_scatter),
    ("all_gather", all_gather, _fake_all_gather),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxlm::{_name}", _fake, lib=_library)


def collectives(graph: fx.Graph) -> Iterable[fx.Node]:
    """The collectives of a graph, in order."""
    ops = torch.ops.fxlm
    kinds = (ops.all_reduce.default, ops.reduce_scatter.default, ops.all_gather.default)
    return [n for n in graph.nodes if n.op == "call_function" and n.target in kinds]


def sent_bytes(graph: fx.Graph, ranks: int, sizes: dict[Any, int]) -> int:
    """Bytes that each rank sends in one run of ``graph``, with ring algorithms.

    A ring all-reduce of b bytes sends 2 b (n - 1) / n, a gather or a reduce-scatter whose whole
    has b bytes half of that (Patarasuk and Yuan, JPDC 69, 2009).

    Args:
        graph: with metadata.
        ranks: n.
        sizes: values of the symbols of its shapes.
    """
    total = 0
    for node in collectives(graph):
        reduces = node.target is not torch.ops.fxlm.all_gather.default
        source: Any = node.args[0] if reduces else node
        count = source.meta["val"].numel()
        count = count if isinstance(count, int) else int(count.node.expr.subs(sizes))
        rounds = 2 if node.target is torch.ops.fxlm.all_reduce.default else 1
        total += rounds * count * source.meta["val"].element_size() * (ranks - 1) // ranks
    return total


def sent_per_step(program: Program, ranks: int) -> dict[str, int]:
    """Collectives of a step over ``ranks``, and bytes that each sends per token and logits row."""
    found = list(collectives(program.graph))
    if not found:
        return {"count": 0, "per_token": 0, "per_row": 0}
    tokens, rows = (program.symbol(name).node.expr for name in ("T", "R"))
    neither = sent_bytes(program.graph, ranks, {tokens: 0, rows: 0})
    token = sent_bytes(program.graph, ranks, {tokens: 1, rows: 0})
    row = sent_bytes(program.graph, ranks, {tokens: 0, rows: 1})
    return {"count": len(found), "per_token": token - neither, "per_row": row - neither}

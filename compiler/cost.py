"""Cost: operations and bytes of one step of a graph, from its metadata.

Counted: matrix products and attention as 2 operations a multiply-add; each weight that a step
reads, once; the KV cache; what every op reads and writes of activations (compiled code fuses, so
that is an upper bound). Not counted: elementwise arithmetic. Not here: what the machine can do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxlm.compiler.hoist import Cut, hoist
from fxlm.compiler.ops.epilogue import GATED
from fxlm.compiler.program import Program

UNCACHED = ("captured", "bound")  # stages without a KV cache

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Who is in a step: ``num_seqs`` sequences with ``num_new`` tokens each, ``context`` after it.

    A graph without a cache must run all of the context anew.
    """

    name: str
    num_seqs: int
    num_new: int
    context: int

    @property
    def pairs(self) -> int:
        """Pairs of query and key, causal."""
        past = self.context - self.num_new
        return self.num_seqs * (self.num_new * past + self.num_new * (self.num_new + 1) // 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one step.

    Attributes:
        operations: floating-point, a multiply-add counts 2.
        weight_bytes, cache_bytes, activation_bytes: moved at least once.
    """

    operations: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int

    @property
    def needed_bytes(self) -> int:
        """What even perfectly fused code moves: weights and cache."""
        return self.weight_bytes + self.cache_bytes


def step_cost(program: Program, shape: Shape, cut: Cut | None = None) -> Cost:
    """Cost of one step of a program at any stage (its ``hoist`` may be given)."""
    return _Counter(program, cut or hoist(program), shape_run(program, shape)).count()


def shape_run(program: Program, shape: Shape) -> Shape:
    """The step that a program runs for a shape: without a cache, all of the context as new."""
    if program.stage not in UNCACHED:
        return shape
    return Shape(
        name=shape.name, num_seqs=shape.num_seqs, num_new=shape.context, context=shape.context
    )


class _Counter:
    def __init__(self, program: Program, cut: Cut, shape: Shape) -> None:
        self.cut = cut
        self.shape = shape
        tokens, seqs = shape.num_seqs * shape.num_new, shape.num_seqs
        values = dict.fromkeys(("S", "R", "G"), seqs) | dict.fromkeys(("S+1", "R+1"), seqs + 1)
        values |= {"T": tokens, "N": 1, "B": -(-shape.context // program.facts.block_size)}
        program.symbol("T")
        self.sizes = {
            size.node.expr: values[name]
            for name, size in program.symbols.items()
            if name in values
        }  # fmt: skip

    def count(self) -> Cost:
        operations = activations = cached = 0
        whole: dict[fx.Node, int] = {}
        for node in self.cut.step.nodes:
            if node.op != "call_function" or not _is_tensor(node):
                continue
            operations += self.operations(node)
            cached += self.cache_bytes(node)
            activations += self.activation_bytes(node)
            for given in node.all_input_nodes:
                if self.is_weight(given):
                    share = self.share(node, given)
                    whole[given] = max(whole.get(given, 0), share)
        return Cost(
            operations=operations, weight_bytes=sum(whole.values()), cache_bytes=cached,
            activation_bytes=activations,
        )  # fmt: skip

    def is_weight(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and self.cut.step_inputs[node.name].role == "weight"

    def operations(self, node: fx.Node) -> int:
        name = str(node.target)
        if "attention" in name:
            return 2 * self.shape.pairs * _attention_width(node)
        inner = self.inner(node, name)
        sums = 2 if _is_gated(node) else 1  # behind each number of the result
        return 2 * inner * sums * self.numel(node.meta["val"]) if inner else 0

    def inner(self, node: fx.Node, name: str) -> int:
        """Length of the sums of a matrix product; 0 for anything else."""
        if not any(word in name for word in ("linear", "matmul", ".mm.", ".bmm.", ".addmm.")):
            return 0
        first = 1 if "addmm" in name else 0
        value: Any = node.args[first].meta["val"]  # type: ignore[union-attr]
        return self.number(value.shape[-1])

    def cache_bytes(self, node: fx.Node) -> int:
        """Keys and values read, and those of the new tokens written."""
        if node.target is not torch.ops.fxlm.paged_attention.default:
            return 0
        k, v = (node.args[i].meta["val"] for i in (3, 4))  # type: ignore[union-attr]
        heads, width = int(k.shape[1]), int(k.shape[3]) + int(v.shape[3])
        per_token = heads * width * int(k.element_size())
        return per_token * self.shape.num_seqs * (self.shape.context + self.shape.num_new)

    def activation_bytes(self, node: fx.Node) -> int:
        if _is_view(node):
            return 0
        given = [n for n in node.all_input_nodes if n.op != "placeholder" and _is_tensor(n)]
        return sum(self.bytes(value) for n in [*given, node] for value in _tensors(n))

    def share(self, node: fx.Node, weight: fx.Node) -> int:
        """Bytes of a weight that an op reads: of a table, only the rows looked up."""
        value = weight.meta["val"]
        if any(word in str(node.target) for word in ("embedding", "packed_rows", "index")):
            return min(self.bytes(value), sum(self.bytes(v) for v in _tensors(node)))
        return self.bytes(value)

    def bytes(self, value: torch.Tensor) -> int:
        return self.numel(value) * value.element_size()

    def numel(self, value: torch.Tensor) -> int:
        return math.prod(self.number(size) for size in value.shape)

    def number(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        known = size.node.expr.subs(self.sizes)
        return int(known) if known.is_number else int(size.node.hint)


def _is_gated(node: fx.Node) -> bool:
    """Whether a layer's result has half its outputs."""
    last = node.args[-1] if node.args else None
    return isinstance(last, str) and last.endswith(GATED)


def _attention_width(node: fx.Node) -> int:
    """Query heads times the sizes of a key and of a value; v may lie in the cache alone."""
    paged = node.target is torch.ops.fxlm.paged_attention.default
    q, v = (node.args[i].meta["val"] for i in (0, 4 if paged else 2))  # type: ignore[union-attr]
    return int(q.shape[1]) * (int(q.shape[3]) + int(v.shape[3]))


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _is_tensor(node: fx.Node) -> bool:
    return bool(_tensors(node))


def _is_view(node: fx.Node) -> bool:
    """Whether an op only looks at memory anew."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target is aten.to.dtype:
        return not isinstance(target, torch._ops.OpOverload)
    alias = target._schema.returns[0].alias_info if target._schema.returns else None
    return alias is not None and not alias.is_write


def summary(cost: Cost) -> Mapping[str, int]:
    """Plain values."""
    return {
        "operations": cost.operations, "weight_bytes": cost.weight_bytes,
        "cache_bytes": cost.cache_bytes, "activation_bytes": cost.activation_bytes,
    }  # fmt: skip

"""What `shard` knows while it walks the graph, and how a value changes its layout.

Here: the layout of each value, the collectives and slices that bring a value into another one,
and numbers that differ by rank (constants of the graph, so that the graph is the same on every
rank). Not here: which layout an op takes and gives (`shard_rules`), where to begin (`shard`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from fxlm.compiler.errors import PassError
from fxlm.compiler.ops.collectives import TENSOR_GROUP
from fxlm.compiler.program import Input, Program, module_path
from fxlm.passes.layout import WHOLE, Layout, is_tensor, is_token_wise, sizes, split, tokens
from fxlm.passes.weight_parts import WeightParts

aten = torch.ops.aten
ops = torch.ops.fxlm


class Sharder:
    """State of one run of the pass.

    Attributes:
        ranks, rank: how many there are, and which one this is.
        fixed: nodes that depend on weights alone.
        parts: of the weights.
        columns: linears to cut by output features, and into how many parts.
        whole_sizes: shape of every value before the pass.
        counts: what was cut, by kind; for the report.
        over_tokens: sums may be split over the tokens; see `shard_tokens`.
    """

    def __init__(self, program: Program, ranks: int, rank: int, over_tokens: bool = False) -> None:
        self.program = program
        self.ranks = ranks
        self.rank = rank
        self.over_tokens = over_tokens
        self.fixed = program.weight_only()
        self.parts = WeightParts(program)
        self.columns: dict[fx.Node, int] = {}
        self.layouts: dict[fx.Node, Layout] = {}
        self.whole_sizes = {n: sizes(n) for n in program.graph.nodes if is_tensor(n)}
        self.counts: Counter[str] = Counter()
        self._converted: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self._constants: dict[str, fx.Node] = {}
        self._length: fx.Node | None = None

    def layout(self, node: Any) -> Layout:
        """Of a value; weights and numbers are whole."""
        return self.layouts.get(node, WHOLE)

    def settle(self, node: fx.Node, layout: Layout) -> None:
        """Note the layout of a value; one that several ops take is summed once, and now."""
        self.layouts[node] = layout
        if layout.kind == "partial" and len(node.users) > 1:
            total = self.scattered(node) if self._serves_tokens(node) else self.whole(node)
            node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)

    def _serves_tokens(self, node: fx.Node) -> bool:
        """Whether somebody takes the sum token by token."""
        dim = self.token_dim(node)
        return dim is not None and any(is_token_wise(user, dim) for user in node.users)

    def token_dim(self, node: fx.Node) -> int | None:
        """The dimension of the step's tokens, if the value is worth a split there."""
        if not self.over_tokens:
            return None
        value: Any = node.meta["val"]
        total = self.program.symbol("T").node.expr
        symbolic = [d for d, size in enumerate(value.shape) if not isinstance(size, int)]
        if len(symbolic) != 1 or value.shape[symbolic[0]].node.expr != total:
            return None
        # One number a token (squares of a norm over all heads) is summed in one go.
        return None if value.numel().node.expr == total else symbolic[0]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a value before it was cut."""
        return self.whole_sizes[node] if node in self.whole_sizes else sizes(node)

    def refuse(self, node: fx.Node, reason: str) -> PassError:
        """The error of a model that cannot be cut, naming the module."""
        where = module_path(node) or node.name
        return PassError(f"shard: {where} cannot be cut into {self.ranks} parts: {reason}")

    # ---- bringing a value into a layout ------------------------------------------------------

    def whole(self, node: fx.Node) -> fx.Node:
        """All of the value on every rank: a sum, a gather, or the value itself."""
        layout = self.layout(node)
        if layout == WHOLE:
            return node
        key = (node, WHOLE)
        if key not in self._converted:
            if layout.kind == "partial":
                made = self.behind(node, ops.all_reduce.default, node, TENSOR_GROUP)
            elif layout.kind == "split":
                made = self._gather(node, layout)
            elif layout.kind == "tokens":
                length = self._num_tokens()
                made = self.behind(
                    node, ops.all_gather.default, node, layout.dim, self.ranks, length, TENSOR_GROUP
                )
                self.counts["tokens gathered"] += 1
            else:
                raise self.refuse(node, "rows of split experts are used before they are summed")
            self._converted[key] = made
        return self._converted[key]

    def scattered(self, node: fx.Node) -> fx.Node:
        """The sum that a partial value stands for, each rank with its share of the tokens."""
        dim = self.token_dim(node)
        assert dim is not None, node.format_node()
        layout = tokens(dim, self.ranks)
        key = (node, layout)
        if key not in self._converted:
            made = self.behind(
                node, ops.reduce_scatter.default, node, dim, self.ranks, TENSOR_GROUP
            )
            self._converted[key] = made
            self.layouts[made] = layout
            self.whole_sizes[made] = self.shape(node)
        return self._converted[key]

    def _num_tokens(self) -> fx.Node:
        """T of the step as a node, ahead of all calls."""
        if self._length is None:
            ids = self.program.find_step_input("input_ids")
            self._length = self.parts.after(ids, aten.sym_size.int, ids, 1)
        return self._length

    def _gather(self, node: fx.Node, layout: Layout) -> fx.Node:
        dim, extent = layout.dim, self.shape(node)[layout.dim]
        copies = self.ranks // layout.parts
        self.counts["gathered"] += 1
        if copies == 1:
            return self.behind(
                node, ops.all_gather.default, node, dim, self.ranks, extent, TENSOR_GROUP
            )
        part = extent // layout.parts
        total = part * self.ranks
        joined = self.behind(node, ops.all_gather.default, node, dim, self.ranks, total,
                             TENSOR_GROUP)  # fmt: skip
        pieces = []
        last = joined
        for index in range(layout.parts):
            begin = index * copies * part
            last = self.behind(last, aten.slice.Tensor, joined, dim, begin, begin + part)
            pieces.append(last)
        return self.behind(last, aten.cat.default, pieces, dim)

    def cut(self, node: fx.Node, dim: int, parts: int) -> fx.Node:
        """The value as ``split(dim, parts)``, which costs no communication if it is whole."""
        wanted = split(dim, parts)
        if self.layout(node) == wanted:
            return node
        key = (node, wanted)
        if key not in self._converted:
            self._converted[key] = self._cut(node, dim, parts)
        return self._converted[key]

    def _cut(self, node: fx.Node, dim: int, parts: int) -> fx.Node:
        extent = self.shape(node)[dim]
        if extent % parts:
            raise self.refuse(node, f"{extent} indices of dimension {dim} do not divide")
        length = extent // parts
        start = self.index(parts) * length
        if node in self.fixed:
            return self.parts.dense(self.parts.take(node, dim, start, length))
        self.counts["sliced"] += 1
        source = self.whole(node)
        return self.behind(source, aten.slice.Tensor, source, dim, start, start + length)

    def index(self, parts: int) -> int:
        """Which of ``parts`` parts this rank has."""
        return self.rank * parts // self.ranks

    # ---- building ----------------------------------------------------------------------------

    def behind(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call right behind ``node``."""
        return self.parts.after(node, target, *args, **kwargs)

    def constant(self, name: str, value: float | int, dtype: torch.dtype) -> fx.Node:
        """A number that differs by rank, as an input: the graph is then the same on every rank."""
        source = f"shard.{name}.{str(dtype).removeprefix('torch.')}"
        if source not in self._constants:
            self.program.constants[source] = torch.tensor(value, dtype=dtype)
            fake = self.program.fake_tensor([], dtype)
            spec = Input(role="constant", source=source)
            node = self.program.add_input(source.replace(".", "_"), spec, fake)
            self._constants[source] = node
            self.fixed.add(node)
        return self._constants[source]

    def on_first_rank(self, node: fx.Node) -> fx.Node:
        """``node`` on the first rank and zero on the others: a term that is added once."""
        dtype = node.meta["val"].dtype
        factor = self.constant("first", float(self.rank == 0), dtype)
        return self.behind(node, aten.mul.Tensor, node, factor)

"""Logits only where a token will be drawn or scored.

before:  logits = linear(h[1, T, H], head)                               [1, T, V]
after:   rows = index_select(h, 1, logits_indices); logits = linear(rows, head)   [1, R, V]

A prompt chunk of 512 tokens needs one row of the head, not 512. The rows are taken before the
head; if the logits do not come from a matmul by way of row-wise ops, they are taken from the
logits themselves, which is right but saves nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program

aten = torch.ops.aten

_MATMULS = (aten.linear.default, aten.matmul.default)
_ROW_WISE = (
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.tanh.default,
    aten.to.dtype, aten.to.device, aten._to_copy.default, aten.clone.default,
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.contiguous.default,
    aten.slice.Tensor, aten.clamp.default,
)  # fmt: skip


@graph_pass(expects=1)
def last_tokens(program: Program) -> int:
    """Take the rows ``logits_indices`` int64 [R]; returns 1."""
    logits = program.logits()
    indices = program.step_input("logits_indices", ["R"], torch.int64)
    head = _head(program, logits)
    if head is None:
        program.miss(logits, "the logits come from no matmul; rows are taken behind it")
        with program.graph.inserting_after(logits):
            rows = program.call(aten.index_select.default, logits, 1, indices, like=logits)
        program.set_results([rows])
        return 1
    hidden = head.args[0]
    assert isinstance(hidden, fx.Node)
    with program.graph.inserting_before(head):
        rows = program.call(aten.index_select.default, hidden, 1, indices, like=head)
    head.args = (rows, *head.args[1:])
    program.propagate(since=rows)
    return 1


def _head(program: Program, logits: fx.Node) -> fx.Node | None:
    """The matmul with the vocabulary, if only row-wise ops follow it."""
    fixed = program.weight_only()
    node = logits
    while True:
        if node.target in _MATMULS and node.args[1] in fixed:
            value: Any = node.args[0].meta["val"]  # type: ignore[union-attr]
            return node if value.dim() == 3 else None
        gathers = node.target is torch.ops.fxlm.all_gather.default and node.args[1] == 2
        if node.target not in _ROW_WISE and not gathers:
            return None
        if node.target is aten.slice.Tensor and node.args[1] == 1:
            return None  # it already picks rows by their place in the batch
        moving = [i for i in node.all_input_nodes if i not in fixed]
        if len(moving) != 1 or len(node.users) != 1:
            return None
        node = moving[0]

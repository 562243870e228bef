"""Add a vector of the request's own to hidden states.

before:  h                                          what leaves model.layers.3        [1, T, H]
after:   rows = index_select(steer_table, 0, steer_rows)                              [T, P * H]
         h + to(slice(rows, 1, p * H, (p + 1) * H), h.dtype)

Row 0 of the table is zero and serves every request that does not steer; the runtime writes the
others. Not here: who may steer, and how far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxlm.compiler.errors import PassError
from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program
from fxlm.compiler.rewrite import insert_after, module_output

aten = torch.ops.aten


@graph_pass(before=("tap", "paged_attention"))
def steer(program: Program, *, points: tuple[str, ...] = ()) -> int:
    """Add a row of ``steer_table`` to the output of the module at each path; returns how many."""
    if not points:
        return 0
    sizes = [_hidden_size(program, path) for path in points]
    table = program.step_input("steer_table", ["steered", sum(sizes)], torch.float32)
    rows = program.step_input("steer_rows", ["T"], torch.int64)
    with program.graph.inserting_before(program.placeholders()[-1].next):
        vectors = program.call(aten.index_select.default, table, 0, rows, like=table)
    for index, path in enumerate(points):
        begin = sum(sizes[:index])

        def added(
            program: Program, value: fx.Node, begin: int = begin, size: int = sizes[index]
        ) -> fx.Node:
            part = program.call(aten.slice.Tensor, vectors, 1, begin, begin + size, like=value)
            whole = program.call(aten.unsqueeze.default, part, 0, like=value)
            kind = value.meta["val"].dtype
            cast = program.call(aten.to.dtype, whole, kind, like=value)
            return program.call(aten.add.Tensor, value, cast, like=value)

        insert_after(program, path, added)
    program.steered = {path: size for path, size in zip(points, sizes, strict=True)}
    return len(points)


def _hidden_size(program: Program, path: str) -> int:
    value: Any = module_output(program, path).meta["val"]
    if value.dim() != 3 or value.shape[0] != 1 or value.shape[1] != program.symbol("T"):
        raise PassError(f"--steer {path}: its output is {list(value.shape)}, must be [1, T, H]")
    return int(value.shape[2])

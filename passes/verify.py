"""Make the model the verifier of tokens drafted for it: count in the graph how many are right.

before:  ids, logprobs, logprob_ids, ranks = fxlm.sample(...)           a row a token to draw
         return ids [R], logprobs [R, L + 1], logprob_ids [R, L + 1], ranks [R]
after:   wrong = (ids != draft_ids)                  [R] drafted for the same place; -1: nothing
         seen = cumsum(wrong)
         goal = seen[draw_start] - wrong[draw_start] + 1
         num_accepted = searchsorted(seen, goal) - draw_start + 1        [G]
         return ids, logprobs, logprob_ids, ranks, num_accepted

A sequence with k drafted tokens has a group of k + 1 rows, one for each token to draw after its
last one and after each draft. What a row draws depends on its logits, seed and position alone, so
it is what plain decoding would draw there if the drafts before it were right. Hence the rule: a
draft holds if it equals what was drawn in its place, the first draw that differs corrects it, and
if none does, the last row's draw comes on top. For a drafted token x that is accepted with the
probability p(x) that the model gives it, and a correction is drawn from p without x: rejection
sampling (Leviathan et al. 2023) with a proposal that is certain. Beyond that, the very tokens of
plain decoding with this seed come out.

Plain ops, so it runs wherever the graph does. The searched index is that of the first wrong row at
or after the start; the last row of a group is always wrong, as -1 is no token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program

aten = torch.ops.aten


@graph_pass(expects=1, requires="sample", stage="verified")
def verify(program: Program) -> int:
    """Append the number of tokens to keep of each group of rows; returns 1."""
    results = program.results()
    ids = results[0]
    drafts = program.step_input("draft_ids", ["R"], torch.int64)
    starts = program.step_input("draw_start", ["G"], torch.int64)

    def call(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        return program.call(op, *args, like=ids, **kwargs)

    with program.graph.inserting_before(program.output()):
        differs = call(aten.ne.Tensor, ids, drafts)
        wrong = call(aten._to_copy.default, differs, dtype=torch.int64)
        seen = call(aten.cumsum.default, wrong, 0)
        before = call(aten.sub.Tensor, seen, wrong)
        goal = call(aten.add.Scalar, call(aten.index_select.default, before, 0, starts), 1)
        found = call(aten.searchsorted.Tensor, seen, goal)
        accepted = call(aten.add.Scalar, call(aten.sub.Tensor, found, starts), 1)
    program.set_results([*results, accepted])
    return 1

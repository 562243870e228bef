"""Make the model the verifier of tokens drafted for it: count in the graph how many are right.

before:  ids, logprobs, logprob_ids, ranks = fxlm.sample(...)           a row a token to draw
         return ids [R], logprobs [R, L + 1], logprob_ids [R, L + 1], ranks [R]
after:   wrong = (ids != draft_ids)                  [R] drafted for the same place; -1: nothing
         kept = arange(1, R + 1) - draw_start[:, None]         [G, R] tokens up to a row
         num_accepted = min over R of kept, where wrong and kept > 0     [G]
         return ids, logprobs, logprob_ids, ranks, num_accepted

A sequence with k drafted tokens has a group of k + 1 rows, one for each token to draw after its
last one and after each draft. What a row draws depends on its logits, seed and position alone, so
it is what plain decoding would draw there if the drafts before it were right. Hence the rule: a
draft holds if it equals what was drawn in its place, the first draw that differs corrects it, and
if none does, the last row's draw comes on top. For a drafted token x that is accepted with the
probability p(x) that the model gives it, and a correction is drawn from p without x: rejection
sampling (Leviathan et al. 2023) with a proposal that is certain. Beyond that, the very tokens of
plain decoding with this seed come out.

Plain ops, so it runs wherever the graph does, and of kinds that are fused into one loop: a step of
a small model has no time for more. What is kept ends with the first wrong row at or after the
start; the last row of a group is always wrong, as -1 is no token.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program

aten = torch.ops.aten

MANY = 1 << 40  # more than there are rows


@graph_pass(expects=1, requires="sample", stage="verified")
def verify(program: Program) -> int:
    """Append the number of tokens to keep of each group of rows; returns 1."""
    results = program.results()
    ids = results[0]
    drafts = program.step_input("draft_ids", ["R"], torch.int64)
    starts = program.step_input("draw_start", ["G"], torch.int64)

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return program.call(op, *args, like=ids, **kwargs)

    with program.graph.inserting_before(program.output()):
        device = ids.meta["val"].device
        end = call(operator.add, call(aten.sym_size.int, ids, 0), 1)
        rows = call(aten.arange.start, 1, end, device=device)
        kept = call(aten.sub.Tensor, rows, call(aten.unsqueeze.default, starts, 1))
        wrong = call(aten.ne.Tensor, ids, drafts)
        last = call(aten.logical_and.default, wrong, call(aten.gt.Scalar, kept, 0))
        accepted = call(aten.amin.default, call(aten.where.ScalarOther, last, kept, MANY), [1])
    program.set_results([*results, accepted])
    return 1

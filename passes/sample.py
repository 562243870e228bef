"""Draw tokens inside the graph, so that only ids leave it.

before:  return logits [1, R, V]
after:   rows = logits.select(0, 0)
         ids, logprobs, logprob_ids, ranks = fxlm.sample(rows, sample_floats, sample_ints, ...)
         return ids [R], logprobs [R, L + 1], logprob_ids [R, L + 1], ranks [R]

Logprobs are computed for the rows that ask. What a row draws depends on its logits, its seed
and its position alone, never on the batch around it.
"""

from __future__ import annotations

import operator

import torch

from fxlm.compiler.pipeline import graph_pass
from fxlm.compiler.program import Program


@graph_pass(expects=1, requires="last_tokens", stage="final")
def sample(program: Program) -> int:
    """Append the sampler; returns 1."""
    logits = program.logits()
    extra = [
        program.step_input("sample_floats", ["R", 6], torch.float32),
        program.step_input("sample_ints", ["R", 5], torch.int64),
        program.step_input("adjust_start", ["R+1"], torch.int32),
        program.step_input("adjust_ids", ["N"], torch.int64),
        program.step_input("adjust_counts", ["N"], torch.int32),
        program.step_input("adjust_bias", ["N"], torch.float32),
    ]
    with program.graph.inserting_before(program.output()):
        rows = program.call(torch.ops.aten.select.int, logits, 0, 0, like=logits)
        drawn = program.call(
            torch.ops.fxlm.sample.default, rows, *extra, program.facts.max_logprobs, like=logits
        )
        parts = [program.call(operator.getitem, drawn, i, like=logits) for i in range(4)]
    program.set_results(parts)
    return 1

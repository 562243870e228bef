"""last_tokens: rows are taken before the head."""

from __future__ import annotations

import torch

from fxlm.compiler import pipeline
from fxlm.passes.cleanup import cleanup
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.paged_attention import paged_attention
from tests.programs import IDS, captured, run_dense


def test_last_tokens_stand_before_the_head() -> None:
    program = pipeline.run(captured(), [cleanup, paged_attention, last_tokens])
    (rows,) = program.find(torch.ops.aten.index_select.default)
    (user,) = rows.users
    assert user.target is torch.ops.aten.linear.default
    assert user.meta["val"].shape[-1] == 256


def test_last_tokens_reach_through_soft_capping() -> None:
    program = pipeline.run(captured("gemma2"), [cleanup, paged_attention, last_tokens])
    (rows,) = program.find(torch.ops.aten.index_select.default)
    assert next(iter(rows.users)).target is torch.ops.aten.linear.default


def test_rows_equal_those_of_all_logits() -> None:
    program = pipeline.run(captured(), [cleanup])
    expected = run_dense(program, IDS)
    picked = [2, len(IDS) - 1]
    pipeline.run(program, [last_tokens])
    rows = run_dense(program, IDS, logits_indices=torch.tensor(picked))
    torch.testing.assert_close(rows, expected[:, picked])


def test_logits_that_come_from_no_matmul_are_picked_themselves() -> None:
    program = pipeline.run(captured(), [cleanup])
    (logits,) = program.output().args[0]
    with program.graph.inserting_before(program.output()):
        odd = program.call(torch.ops.aten.cumsum.default, logits, 1, like=logits)
    program.output().args = ((odd,),)
    pipeline.run(program, [last_tokens])
    (rows,) = program.find(torch.ops.aten.index_select.default)
    assert rows.args[0] is odd

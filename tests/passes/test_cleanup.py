"""cleanup: identities go, everything else stays."""

from __future__ import annotations

import torch

from fxlm.compiler import pipeline
from fxlm.passes.cleanup import cleanup
from tests.programs import IDS, captured, run_dense


def test_cleanup_removes_casts_to_the_same_type() -> None:
    program = pipeline.run(captured(), [cleanup])
    assert program.log[-1].removed["aten.to.dtype"] == program.log[-1].rewrites - 2
    left = program.find(torch.ops.aten.to.dtype)
    assert [n.args[0].meta["val"].dtype for n in left] == [torch.int64]  # positions to float


def test_cleanup_leaves_a_cast_that_changes_the_type() -> None:
    program = captured()
    node = program.linears()[0]
    with program.graph.inserting_before(node.next):
        cast = program.call(torch.ops.aten.to.dtype, node, torch.float64, like=node)
        back = program.call(torch.ops.aten.to.dtype, cast, torch.float32, like=node)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not cast)
    pipeline.run(program, [cleanup])
    assert cast in program.graph.nodes
    assert back in program.graph.nodes


def test_equals() -> None:
    program = captured("gemma3_text")
    expected = run_dense(program, IDS)
    pipeline.run(program, [cleanup])
    assert torch.equal(run_dense(program, IDS), expected)

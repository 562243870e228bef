"""sharder: how a value changes its layout, and what that costs."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import ops, pipeline
from fxlm.compiler.errors import PassError
from fxlm.passes.cleanup import cleanup
from fxlm.passes.layout import OWNED, PARTIAL, split
from fxlm.passes.sharder import Sharder
from tests.programs import captured


@pytest.fixture
def sharder() -> Sharder:
    ops.load()
    program = pipeline.run(captured("llama", num_hidden_layers=1), [cleanup])
    return Sharder(program, ranks=4, rank=3)


def test_a_sum_is_made_once(sharder: Sharder) -> None:
    (node, *_) = sharder.program.linears("o_proj")
    sharder.layouts[node] = PARTIAL
    made = sharder.whole(node)
    assert made.target is torch.ops.fxlm.all_reduce.default
    assert sharder.whole(node) is made


def test_a_part_that_two_ranks_have_is_gathered_once(sharder: Sharder) -> None:
    (node, *_) = sharder.program.linears("k_proj")
    sharder.layouts[node] = split(2, 2)
    made = sharder.whole(node)
    assert made.target is torch.ops.aten.cat.default
    starts = [piece.args[2] for piece in made.args[0]]  # type: ignore[union-attr]
    assert starts == [0, 32]  # of ranks 0 and 2, 16 features each


def test_a_weight_is_cut_at_the_checkpoint(sharder: Sharder) -> None:
    weight = sharder.program.linears("q_proj")[0].args[1]
    assert isinstance(weight, torch.fx.Node)
    part = sharder.cut(weight, 0, 4)
    spec = sharder.program.inputs[part.name].part
    assert spec is not None
    assert (spec.dim, spec.start, spec.length) == (0, 48, 16)


def test_rows_of_experts_cannot_be_summed_where_they_are(sharder: Sharder) -> None:
    (node, *_) = sharder.program.linears("o_proj")
    sharder.layouts[node] = OWNED
    with pytest.raises(PassError, match="before they are summed"):
        sharder.whole(node)

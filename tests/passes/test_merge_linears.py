"""merge_linears: what keeps a group from being merged is said, and fails the pass."""

from __future__ import annotations

import pytest

from fxlm.compiler import pipeline
from fxlm.compiler.errors import PassError
from fxlm.compiler.program import Program
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_qkv import fuse_qkv
from tests.programs import captured


@pytest.fixture
def llama() -> Program:
    return pipeline.run(captured(), [cleanup])


def test_only_some_have_a_bias(llama: Program) -> None:
    first = llama.linears("q_proj")[0]
    bias = next(n for n in llama.placeholders("weight") if "norm" in n.name)
    first.args = (*first.args, bias)
    with pytest.raises(PassError, match=r"1 places, but 2 .*only some of the linears"):
        pipeline.run(llama, [fuse_qkv])


def test_a_weight_that_serves_elsewhere(llama: Program) -> None:
    first, second = llama.linears("q_proj")
    second.args = (second.args[0], first.args[1])
    with pytest.raises(PassError, match="a weight is used elsewhere too"):
        pipeline.run(llama, [fuse_qkv])

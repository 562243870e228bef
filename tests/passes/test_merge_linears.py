"""merge_linears: what keeps a group from being merged is said; a missing bias is zeros."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.program import Program
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_qkv import fuse_qkv
from fxlm.passes.merge_linears import merge_linears
from tests.programs import IDS, captured, run_dense


@pytest.fixture
def llama() -> Program:
    return pipeline.run(captured(), [cleanup])


def add_bias(program: Program) -> None:
    """Give one of three projections a bias: a norm's weight, for want of another vector."""
    first = program.linears("q_proj")[0]
    first.args = (*first.args, next(n for n in program.placeholders("weight") if "norm" in n.name))


def test_a_missing_bias_is_zeros(llama: Program) -> None:
    add_bias(llama)
    expected = run_dense(llama, IDS)
    pipeline.run(llama, [fuse_qkv])
    assert llama.log[-1].rewrites == 2
    torch.testing.assert_close(run_dense(llama, IDS), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_that_serves_elsewhere_is_left_alone(llama: Program) -> None:
    first, second = llama.linears("q_proj")
    second.args = (second.args[0], first.args[1])
    assert not merge_linears(llama, [first, llama.linears("k_proj")[0]])
    assert "used elsewhere too" in llama.misses[-1]
    pipeline.run(llama, [fuse_qkv])
    assert llama.log[-1].rewrites == 0


def test_different_inputs_are_left_alone(llama: Program) -> None:
    first, second = llama.linears("q_proj")
    assert not merge_linears(llama, [first, second])
    assert "different inputs" in llama.misses[-1]

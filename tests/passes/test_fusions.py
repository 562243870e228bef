"""fuse_qkv and fuse_gate_up: they fire, they equal, they stay away."""

from __future__ import annotations

import pytest
import torch
from fxlm.compiler import pipeline
from fxlm.compiler.program import Program
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_gate_up import fuse_gate_up
from fxlm.passes.fuse_qkv import fuse_qkv

from tests.programs import captured, run_dense

IDS = [3, 17, 99, 4, 5, 200, 17]


@pytest.fixture
def llama() -> Program:
    return pipeline.run(captured(), [cleanup])


@pytest.mark.parametrize(
    ("item", "fewer"), [(fuse_qkv, 4), (fuse_gate_up, 2)], ids=["fuse_qkv", "fuse_gate_up"]
)
def test_fires_once_a_layer(llama: Program, item: pipeline.GraphPass, fewer: int) -> None:
    before = len(llama.linears())
    pipeline.run(llama, [item])
    assert llama.log[-1].rewrites == 2
    assert before - len(llama.linears()) == fewer
    assert llama.log[-1].added == {"aten.cat.default": 2, "aten.slice.Tensor": fewer + 2}


@pytest.mark.parametrize("item", [fuse_qkv, fuse_gate_up], ids=["fuse_qkv", "fuse_gate_up"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2"])
def test_equals(item: pipeline.GraphPass, model_type: str) -> None:
    program = pipeline.run(captured(model_type), [cleanup])
    expected = run_dense(program, IDS)
    pipeline.run(program, [item])
    # The same sums in the same order: one wide matmul may still block differently.
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-5, atol=1e-5)


def test_fuse_qkv_stays_away_from_merged_projections() -> None:
    program = pipeline.run(captured("phi3"), [cleanup, fuse_qkv])
    assert program.log[-1].rewrites == 0


def test_fuse_gate_up_stays_away_from_plain_mlps() -> None:
    program = pipeline.run(captured("gpt_neox"), [cleanup, fuse_gate_up])
    assert program.log[-1].rewrites == 0


def test_fuse_qkv_stays_away_if_only_some_have_a_bias(llama: Program) -> None:
    first = llama.linears("q_proj")[0]
    bias = next(n for n in llama.placeholders("weight") if "norm" in n.name)
    first.args = (*first.args, bias)
    with pytest.raises(pipeline.PassError, match=r"1 places, but 2 .*only some of the linears"):
        pipeline.run(llama, [fuse_qkv])

"""fuse_gate_up: it fires, it equals, it stays away."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_gate_up import fuse_gate_up
from tests.programs import IDS, captured, run_dense


def test_fires_once_a_layer() -> None:
    program = pipeline.run(captured(), [cleanup])
    before = len(program.linears())
    pipeline.run(program, [fuse_gate_up])
    assert program.log[-1].rewrites == 2
    assert before - len(program.linears()) == 2


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2"])
def test_equals(model_type: str) -> None:
    program = pipeline.run(captured(model_type), [cleanup])
    expected = run_dense(program, IDS)
    pipeline.run(program, [fuse_gate_up])
    # The same sums; one wide matmul may block them differently.
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-5, atol=1e-5)


def test_stays_away_where_there_is_nothing_to_merge() -> None:
    program = pipeline.run(captured("gpt_neox"), [cleanup, fuse_gate_up])
    assert program.log[-1].rewrites == 0

"""split_rope: it fires, it equals, it stays away."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.passes.cleanup import cleanup
from fxlm.passes.split_rope import split_rope
from tests.programs import IDS, captured, run_dense

aten = torch.ops.aten


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt_neox", "phi"])
def test_equals_to_the_bit(model_type: str) -> None:
    program = pipeline.run(captured(model_type), [cleanup])
    expected = run_dense(program, IDS)
    pipeline.run(program, [split_rope])
    assert program.log[-1].rewrites == 2 * program.facts.num_layers
    assert torch.equal(run_dense(program, IDS), expected)


def test_q_and_k_share_the_halves_of_cos_and_sin() -> None:
    program = pipeline.run(captured(), [cleanup, split_rope])
    halves = 2 * (2 + 2)  # of q and k, of cos and sin
    assert len(program.find(aten.slice.Tensor)) == halves * program.facts.num_layers


def test_attention_reads_tokens_as_they_lie() -> None:
    program = pipeline.run(captured(), [cleanup, split_rope])
    for attention in program.attentions():
        query = attention.args[0]
        assert query.meta["val"].transpose(1, 2).is_contiguous(), query.meta["val"].stride()


def test_stays_away_where_values_are_not_turned() -> None:
    program = pipeline.run(captured("gpt2"), [cleanup, split_rope])
    assert program.log[-1].rewrites == 0


def test_stays_away_from_halves_of_other_widths() -> None:
    program = pipeline.run(captured(), [cleanup])
    part = next(n for n in program.find(aten.slice.Tensor) if n.args[2] == 0)
    part.update_arg(3, part.args[3] - 1)
    before = program.find(aten.cat.default)
    pipeline.run(program, [split_rope])
    assert len(program.find(aten.cat.default)) == len(before)
    assert program.log[-1].rewrites == 2 * program.facts.num_layers - 1

"""cost: operations and bytes of a step, against counts by hand."""

from __future__ import annotations

import pytest

from fxlm.compiler import pipeline
from fxlm.compiler.cost import Shape, step_cost
from fxlm.compiler.program import Program
from fxlm.passes.cleanup import cleanup
from fxlm.passes.fuse_activation import fuse_activation
from fxlm.passes.fuse_gate_up import fuse_gate_up
from fxlm.passes.last_tokens import last_tokens
from fxlm.passes.pack_linears import pack_linears
from fxlm.passes.paged_attention import paged_attention
from fxlm.passes.sample import sample
from tests.programs import captured

# tests.programs: 2 layers, hidden 64, 4 heads and 2 KV heads of 16, MLP 96, vocabulary 256, float32
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
HEAD = 64 * 256
NORMS = 5 * 64
DECODE = Shape(name="decode", num_seqs=3, num_new=1, context=32)
PREFILL = Shape(name="prefill", num_seqs=1, num_new=32, context=32)


@pytest.fixture(scope="module")
def paged() -> Program:
    return pipeline.run(captured(), [cleanup, paged_attention, last_tokens, sample])


def test_decode(paged: Program) -> None:
    found = step_cost(paged, DECODE)
    attention = 2 * (3 * 32) * 4 * (16 + 16) * 2
    assert found.operations == 2 * 3 * (2 * LAYER + HEAD) + attention
    assert found.cache_bytes == 2 * 2 * (16 + 16) * 4 * 3 * (32 + 1)
    embedding = 3 * 64
    rotation = 8
    assert found.weight_bytes == 4 * (2 * LAYER + HEAD + NORMS + embedding + rotation)


def test_a_gate_inside_a_layer_saves_activations_alone(paged: Program) -> None:
    column = [cleanup, fuse_gate_up, paged_attention, last_tokens, sample, pack_linears]
    program = pipeline.run(captured(), column)
    before = step_cost(program, PREFILL)
    found = step_cost(pipeline.run(program, [fuse_activation]), PREFILL)
    assert found.operations == before.operations == step_cost(paged, PREFILL).operations
    assert found.weight_bytes == before.weight_bytes
    assert found.activation_bytes < before.activation_bytes


def test_prefill_draws_one_row(paged: Program) -> None:
    pairs = 32 * 33 // 2
    attention = 2 * pairs * 4 * (16 + 16) * 2
    assert step_cost(paged, PREFILL).operations == 2 * (32 * 2 * LAYER + HEAD) + attention


def test_without_a_cache_everything_is_done_again() -> None:
    program = pipeline.run(captured(), [cleanup])
    found = step_cost(program, DECODE)
    pairs = 3 * (32 * 33 // 2)
    attention = 2 * pairs * 4 * (16 + 16) * 2
    assert found.operations == 2 * 3 * 32 * (2 * LAYER + HEAD) + attention
    assert found.cache_bytes == 0

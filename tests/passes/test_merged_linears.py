"""merged_linears: a projection that is used in pieces becomes several; others stay."""

from __future__ import annotations

import torch

from fxlm.compiler import pipeline
from fxlm.passes.cleanup import cleanup
from fxlm.passes.merged_linears import part_merged_linears
from tests.programs import IDS, captured, run_dense


def test_parts_and_equals() -> None:
    program = pipeline.run(captured("phi3"), [cleanup])
    expected, before = run_dense(program, IDS), len(program.linears())
    assert part_merged_linears(program) == 4  # qkv and gate_up of two layers
    program.eliminate_dead_code()
    assert len(program.linears()) == before + 2 * (2 + 1)
    torch.testing.assert_close(run_dense(program, IDS), expected, rtol=1e-5, atol=1e-5)


def test_stays_away_from_linears_that_are_used_whole() -> None:
    program = pipeline.run(captured("llama", num_hidden_layers=1), [cleanup])
    assert part_merged_linears(program) == 0

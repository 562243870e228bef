"""steer: it fires, it equals, it stays away."""

from __future__ import annotations

import pytest
import torch

from fxlm.compiler import pipeline
from fxlm.compiler.errors import PassError
from fxlm.compiler.program import Program
from fxlm.passes.steer import steer
from fxlm.passes.tap import tap
from tests.passes.options import with_options
from tests.programs import IDS, captured, run_dense

FIRST, SECOND = "model.layers.0", "model.layers.1"


def steered(*points: str, taps: tuple[str, ...] = (), model_type: str = "llama") -> Program:
    column = [with_options(steer, points=points), with_options(tap, points=taps)]
    return pipeline.run(captured(model_type), column)


def hidden(program: Program, table: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """What the tap behind the first layer gives."""
    inputs = {"steer_table": table, "steer_rows": torch.tensor(rows)}
    program.output().args = (tuple(reversed(program.output().args[0])),)  # type: ignore[arg-type]
    program.module.recompile()
    return run_dense(program, IDS, **inputs)


def test_each_point_has_columns_of_its_own() -> None:
    program = steered(FIRST, SECOND)
    assert program.log[-2].rewrites == 2
    assert program.steered == {FIRST: 64, SECOND: 64}
    assert program.find_step_input("steer_table").meta["val"].shape[1] == 128


def test_the_vector_of_a_row_is_added_to_its_tokens_alone() -> None:
    table = torch.zeros(3, 128)
    table[2, :64] = torch.linspace(-1, 1, 64)
    rows = [0, 0, 2, 0, 0, 0, 2]
    plain = hidden(steered(FIRST, SECOND, taps=(FIRST,)), torch.zeros(3, 128), rows)
    moved = hidden(steered(FIRST, SECOND, taps=(FIRST,)), table, rows)
    difference = moved - plain
    expected = torch.zeros(len(IDS), 64)
    expected[[2, 6]] = table[2, :64]
    torch.testing.assert_close(difference, expected, rtol=1e-5, atol=1e-5)


def test_row_zero_changes_nothing() -> None:
    inputs = {"steer_table": torch.zeros(2, 64), "steer_rows": torch.zeros(len(IDS)).long()}
    same = run_dense(steered(SECOND), IDS, **inputs)
    torch.testing.assert_close(same, run_dense(captured(), IDS), rtol=0, atol=0)


def test_it_stays_away_without_points() -> None:
    program = steered()
    assert program.log[-2].rewrites == 0
    assert not program.steered


def test_a_module_that_gives_no_hidden_state_is_refused() -> None:
    with pytest.raises(PassError, match=r"must be \[1, T, H\]"):
        steered("model.layers.0.self_attn.q_norm", model_type="qwen3")
